"""Float32 sums over keys: outputs and dQ whose running sums are far larger than they (known_answer/swamping.py)."""

from __future__ import annotations

from collections.abc import Iterator

from attn_fuzz.oracle.checks.exact import CPU, observe_known
from attn_fuzz.oracle.known_answer.swamping import Swamping, beside
from attn_fuzz.oracle.symptoms import Symptom
from attn_fuzz.oracle.trial import Trial


def sums_not_swamped(trial: Trial) -> Iterator[Symptom]:
    """The last row of each long document holds the whole sum over its keys, forward and backward."""
    if (known := Swamping.of(trial.case, CPU, trial.profile)) is None:
        return
    for compared in known.judge(observe_known(trial, known).results):
        if (wrong := compared.first()) is None:
            continue
        row, head, channel = wrong.index
        unit, keys = known.unit(compared.tensor)[row].item(), int(known.places.key_lengths[row])
        moved, should = (beside(x[row, head])[channel].item() / unit for x in (compared.got, compared.expected))
        yield known.symptoms[compared.tensor](
            "swamping",
            compared.tensor,
            f"{wrong.element.place}: the small ones of {keys} keys, beside large ones that cancel, add up to "
            f"{moved:.4g} instead of {should:.0f}; {int(compared.wrong[row].sum())} elements wrong",
            element=wrong.element,
        )
