"""What known issues explain: the results that each makes wrong, and the symptoms by which that is seen.

``backends/known.py`` says which backends have an issue and which cases meet it. Of such a case, symptoms that the issue
explains are counted as known and end nothing; any other symptom is a finding.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from attn_fuzz.backends.known import KnownIssue
from attn_fuzz.oracle.symptoms import (
    DeadRowsNotZero,
    MovedByPlacement,
    NotBatchInvariant,
    NotCompiled,
    NotExact,
    NotIsolated,
    NotMerged,
    NotOrdered,
    NotRegrouped,
    NotRepeatable,
    NotReplayed,
    PoisonLeaked,
    Symptom,
    WrongGradK,
    WrongGradQ,
    WrongGradV,
    WrongInputGradient,
    WrongKeys,
    WrongKeysBackward,
    WrongLse,
    WrongOutput,
    WrongParameterGradient,
    WrongSpread,
    WrongWhenAsked,
)

Symptoms = frozenset[type[Symptom]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """What one known issue does to results."""

    tensors: frozenset[str]
    """Results that it makes wrong."""
    symptoms: Symptoms
    """What it explains of them."""
    nan_symptoms: Symptoms = frozenset()
    """What it explains of them besides, where NaN came back."""


# Results, and what may be said about them, where an issue spoils more than one by more than a little.
_FORWARD: Final = frozenset({"out", "lse"})
_BACKWARD: Final = frozenset({"dq", "dk", "dv"})
_NORMS: Final = frozenset({"d_query_norm", "d_key_norm", "d_value_norm"})
_PARAMETERS: Final = frozenset({"d_query", "d_key", "d_value", "d_key_value", "d_dense", *_NORMS})
_LAYER_BACKWARD: Final = _BACKWARD | _PARAMETERS | {"dx"}
# What is wrong is wrong in another call, too, and otherwise: in other company, in a replay, on another stream.
_RELATED: Final[Symptoms] = frozenset(
    {NotRegrouped, NotMerged, NotBatchInvariant, NotReplayed, NotOrdered, NotCompiled, MovedByPlacement, WrongWhenAsked}
)
_SPOILT: Final[Symptoms] = frozenset({PoisonLeaked, DeadRowsNotZero, NotIsolated, NotExact}) | _RELATED
_WRONG_GRADIENTS: Final[Symptoms] = frozenset(
    {WrongGradQ, WrongGradK, WrongGradV, WrongInputGradient, WrongParameterGradient}
)
_SPOILT_FORWARD: Final[Symptoms] = _SPOILT | {WrongKeys, WrongOutput, WrongLse}
_SPOILT_BACKWARD: Final[Symptoms] = _SPOILT | _WRONG_GRADIENTS | {WrongKeysBackward, NotRepeatable, WrongSpread}

_MASKED_BACKWARD: Final = Effect(
    tensors=_LAYER_BACKWARD - {"d_dense"},
    symptoms=frozenset({PoisonLeaked, WrongKeysBackward, NotIsolated, NotExact}),
    # Drawn values do that too, where a window hides keys of much larger scores.
    nan_symptoms=_WRONG_GRADIENTS | _RELATED,
)

EFFECTS: Final[dict[str, Effect]] = {
    "cudnn-masked-backward-nan": _MASKED_BACKWARD,
    "nested-cudnn-masked-nan": _MASKED_BACKWARD,
    "sdpa-16-byte-rows": Effect(tensors=_FORWARD | _LAYER_BACKWARD, symptoms=_SPOILT_FORWARD | _SPOILT_BACKWARD),
    "efficient-window-backward": Effect(tensors=_LAYER_BACKWARD - {"d_dense"}, symptoms=_SPOILT_BACKWARD),
    "torch-cudnn-row-stride": Effect(tensors=_LAYER_BACKWARD, symptoms=_SPOILT_BACKWARD),
    "nested-cudnn-gradient-stride": Effect(tensors=_BACKWARD, symptoms=_SPOILT_BACKWARD),
    "cudnn-varlen-long-documents": Effect(tensors=_LAYER_BACKWARD, symptoms=_SPOILT_BACKWARD),
    "cudnn-frontend-row-stride": Effect(tensors=_BACKWARD, symptoms=_SPOILT_BACKWARD),
    "cudnn-frontend-no-keys": Effect(tensors=_FORWARD | _LAYER_BACKWARD, symptoms=_SPOILT_FORWARD | _SPOILT_BACKWARD),
    "cublas-k-tail": Effect(tensors=frozenset({"dk", "dv"}), symptoms=_SPOILT_BACKWARD),
    "cublas-k-tail-short": Effect(tensors=frozenset({"dk", "dv"}), symptoms=_SPOILT_BACKWARD),
    "flash4-half-padded-channels": Effect(tensors=_LAYER_BACKWARD - {"d_dense"}, symptoms=_SPOILT_BACKWARD),
}
"""By the id of the issue. That it may end the process, too, is for ``KnownIssue.crashes`` to say."""


def explains(issue: KnownIssue, symptom: Symptom) -> bool:
    """Whether an issue makes a result wrong in such a way."""
    effect = EFFECTS[issue.id]
    seen = effect.symptoms | effect.nan_symptoms if symptom.nan else effect.symptoms
    return symptom.tensor in effect.tensors and type(symptom) in seen
