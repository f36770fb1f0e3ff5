"""Fused float32 answers for whom they are compiled: a campaign never waits for the compiler of its own reference.

A kind of cases (``fused_answer.Kind``) that is met a second time is compiled beside everything else, one at a time.
Once it is, its first answer is compared with the float64 one of the same call, and used from then on if they agree.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Final

import torch

from attn_fuzz.reference.answer import Expected, Inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.fused_answer import Fused, Kind, compile_kind, fused_answer, unsupported_reason
from attn_fuzz.reference.profile import Profile

_DEVICES: Final = ("cuda",)

_OFF: Final = {"lse": 2.0}
"""Standard deviations by which values may be off, by name: exponentials and logarithms of GPUs are good to a few units
in the last place of a result in float32. Of those in half precision it is ``_OFF_HALF``."""

_OFF_HALF: Final = 0.5

_OFF_BUDGET: Final = 0.1
"""Share by which a standard deviation may be off. With both, what is beyond the limit of 10 is beyond the 7 from which
on the float64 answer is asked (``verdicts.OFF``)."""


@dataclasses.dataclass
class _Known:
    """What is known of a kind on a device."""

    met: int = 0
    thread: threading.Thread | None = None
    why_not: str | None = None
    """Why it is not used, where it does not compile, or does not agree."""
    agreed: bool = False


_KINDS: dict[tuple[Kind, torch.device], _Known] = {}


def look(case: Case, inputs: Inputs, profile: Profile) -> dict[str, Fused] | None:
    """The fused answer to a call, or None where there is none: not of such cases, not yet, or not to be trusted.

    Args:
        case: a kernel case.
        inputs: its tensors, on a GPU.
        profile: the roundings of what ran.
    """
    if inputs.q.device.type not in _DEVICES or unsupported_reason(case, profile) is not None:
        return None
    known = _KINDS.setdefault((Kind.of(case), inputs.q.device), _Known())
    known.met += 1
    if not _compiled(known, Kind.of(case), inputs.q.device):
        return None
    found = fused_answer(case, inputs, profile)
    if not known.agreed:
        known.why_not = disagreement(found, kernel_answer(case, inputs, profile, degrees=False))
        known.agreed = known.why_not is None
    return found if known.agreed else None


def settle() -> None:
    """Waits until what is being compiled is, as benchmarks do."""
    for known in _KINDS.values():
        if known.thread is not None:
            known.thread.join()


def _compiled(known: _Known, kind: Kind, device: torch.device) -> bool:
    """Whether a kind can be used; begins to compile it where it has been met before and nothing else is compiled."""
    if known.why_not is not None:
        return False
    if known.thread is not None:
        return not known.thread.is_alive()
    busy = any(other.thread is not None and other.thread.is_alive() for other in _KINDS.values())
    if known.met > 1 and not busy:
        # A daemon: it does not keep a process that is done.
        known.thread = threading.Thread(target=_compile, args=(known, kind, device), daemon=True)
        known.thread.start()
    return False


def _compile(known: _Known, kind: Kind, device: torch.device) -> None:
    try:
        compile_kind(kind, device)
    except Exception as error:
        known.why_not = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def disagreement(found: Mapping[str, Fused], exact: Mapping[str, Expected]) -> str | None:
    """What of a fused answer is not the exact one's, or None."""
    for name, expected in exact.items():
        owed = expected.variance == 0
        value, ratio = found[name].value.double(), found[name].inverse.double() * expected.variance.sqrt()
        off = (value - expected.value).abs() / expected.variance.sqrt()
        # Equal infinities: the LSE of rows that see no key.
        off = torch.where(value == expected.value, 0.0, off)[~owed]
        if not torch.equal(value[owed], expected.value[owed]):
            return f"{name} is not what it has to be to the bit"
        if off.numel() and not off.max() < _OFF.get(name, _OFF_HALF):
            return f"{name} is off by {off.max().item():.2g} standard deviations"
        if off.numel() and not (ratio[~owed] - 1).abs().max() < _OFF_BUDGET:
            return f"the budget of {name} is off"
    return None
