"""Known issues: defects of backends that are not ours to mend, as data.

A case that an issue covers runs like any other. What the issue explains is counted as known and ends nothing; anything
else that goes wrong in it is a finding. The minimal case of every issue must keep failing on the versions it was seen
on (tests/test_known.py): an issue that is gone is taken out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

import torch

from reference.case import Case

Calls = Sequence[Sequence[tuple[int, int]]]
"""For every varlen call that a case makes, (queries, keys) of its documents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownIssue:
    """One defect of one backend."""

    id: str
    backends: tuple[str, ...]
    device: str
    about: str
    reference: str
    """Where it is reported, or on what it was seen."""
    present: Callable[[], bool]
    """Whether the versions here are those it was seen on."""
    covers: Callable[[Case, Calls], bool]
    tensors: frozenset[str]
    """Results that it makes wrong."""
    symptoms: frozenset[str]
    """Names of the symptoms that it explains."""
    minimal: Case
    crashes: bool = False
    """It takes the process or its CUDA context along: such cases run only in processes of their own, a few of them."""

    def applies(self, backend: str, device: str) -> bool:
        """Whether the issue is to be expected of this backend here."""
        name = backend.removeprefix("legacy:").removeprefix("any:")
        return name in self.backends and device == self.device and self.present()


def _cudnn_919() -> bool:
    version = torch.backends.cudnn.version()
    return torch.cuda.is_available() and version is not None and 91900 <= version < 92000


def _whole_key_tiles(case: Case, calls: Calls) -> bool:
    """The dispatcher takes cuDNN: half precision, head_dim a multiple of 8; and no rest of a tile of 64 keys."""
    half = case.dtype in ("bf16", "fp16") and case.head_dim % 8 == 0
    return half and any((keys := sum(k for _, k in call)) > 0 and keys % 64 == 0 for call in calls)


KNOWN: Final[tuple[KnownIssue, ...]] = (
    KnownIssue(
        id="cudnn-masked-backward-nan",
        backends=("sdpa_dense", "sdpa_dense_cudnn"),
        device="cuda",
        about="cuDNN's backward with an explicit mask gives NaN where exp(score - lse) of a masked or padding entry "
        "overflows float32: rows whose scores are all far below zero (-181; -90 is fine), or far below those of keys "
        "that they do not see. Only with a multiple of 64 keys; the memory-efficient and math kernels are right.",
        reference="torch 2.11.0+cu130 with cuDNN 9.19 on an H100, 2026-11-23; not reported before as far as we know",
        present=_cudnn_919,
        covers=_whole_key_tiles,
        tensors=frozenset({"dq", "dk", "dv", "dx", "d_query", "d_key", "d_value", "d_key_value"}),
        symptoms=frozenset({"PoisonLeaked", "WrongKeysBackward", "NotIsolated", "NotExact"}),
        minimal=Case.from_json(
            '{"level": "kernel", "lengths": [1], "key_lengths": [64], "head_dim": 8, "dtype": "bf16", "seed": 1}'
        ),
    ),
)


def issues_of(backend: str, device: str, case: Case, calls: Calls) -> tuple[KnownIssue, ...]:
    """Issues that a case on a backend may run into here."""
    return tuple(issue for issue in KNOWN if issue.applies(backend, device) and issue.covers(case, calls))


def crash_issue_of(backend: str, device: str, case: Case, calls: Calls) -> KnownIssue | None:
    """The crash-class issue that a case on a backend runs into here, if any."""
    return next((issue for issue in issues_of(backend, device, case, calls) if issue.crashes), None)
