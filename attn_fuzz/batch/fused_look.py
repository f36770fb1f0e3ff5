"""Fused float32 answers for whom they are compiled: a campaign never waits for the compiler of its own reference.

A kind of cases (``fused_answer.Kind``) that is met a second time is compiled beside everything else, one at a time.
Once it is, its first answer is compared with the float64 one of the same call, and used from then on if they agree.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch

from attn_fuzz.reference.answer import Expected, Inputs
from attn_fuzz.reference.batched import chunk_bytes, kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.fused_answer import Fused, Kind, bytes_of, compile_kind, fused_answer, unsupported_reason
from attn_fuzz.reference.profile import Profile

_DEVICES: Final = ("cuda",)

_MOST_OFF: Final = {"lse": 4.0}
"""Standard deviations by which values may be off, by name: exponentials and logarithms of GPUs are good to a few units
in the last place of a result in float32. Of those in half precision it is ``_MOST_OFF_HALF``."""

_MOST_OFF_HALF: Final = 0.5

_OFF_BUDGET: Final = 0.1
"""Share by which a standard deviation may be off."""

_EXACT_TIMES: Final = 2
"""The float64 answer to a whole call takes so many times the memory."""

_OF_OTHERS: Final = 1.5
"""What is off by so much in the first call may be off by so many times as much in others."""


class Look(NamedTuple):
    """A fused answer, and how far it can be trusted."""

    found: dict[str, Fused]
    off: dict[str, float]
    """Standard deviations by which values are off at most, by name, as far as calls have been compared."""

    def sure(self, name: str, limit: float) -> float:
        """Below so many standard deviations of a result it is sure that the exact answer's are below the limit."""
        return (limit - _OF_OTHERS * self.off.get(name, 0.0)) / (1 + _OFF_BUDGET)


@dataclasses.dataclass
class _Known:
    """What is known of a kind on a device."""

    met: int = 0
    thread: threading.Thread | None = None
    why_not: str | None = None
    """Why it is not used, where it does not compile, or does not agree."""
    off: dict[str, float] | None = None
    """Of the call that was compared; None before."""


_KINDS: dict[tuple[Kind, torch.device], _Known] = {}


def look(case: Case, inputs: Inputs, profile: Profile) -> Look | None:
    """The fused answer to a call, or None where there is none: not of such cases, not yet, or not to be trusted.

    Args:
        case: a kernel case.
        inputs: its tensors, on a GPU.
        profile: the roundings of what ran.
    """
    device = inputs.q.device
    if device.type not in _DEVICES or unsupported_reason(case, profile) is not None:
        return None
    if _EXACT_TIMES * bytes_of(case) > chunk_bytes(device):
        # An answer in chunks never holds more than one of them.
        return None
    kind = Kind.of(case)
    known = _KINDS.setdefault((kind, device), _Known())
    known.met += 1
    if not _compiled(known, kind, device):
        return None
    found = fused_answer(case, inputs, profile)
    if known.off is None:
        off = distances(found, kernel_answer(case, inputs, profile))
        known.why_not = disagreement(off)
        known.off = {name: far for name, (far, _) in off.items()}
    return Look(found, known.off) if known.why_not is None else None


def settle() -> None:
    """Waits until what is being compiled is, as benchmarks do."""
    for known in _KINDS.values():
        if known.thread is not None:
            known.thread.join()


def state(case: Case, device: torch.device) -> str:
    """What became of a case's kind, in words: ``in use``, or why not."""
    known = _KINDS.get((Kind.of(case), device), _Known())
    if known.why_not is not None:
        return known.why_not
    return "in use" if known.off is not None else "not compiled"


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


def distances(found: Mapping[str, Fused], exact: Mapping[str, Expected]) -> dict[str, tuple[float, float]]:
    """How far a fused answer is from the exact one, by name.

    Returns:
        (standard deviations of values, share of a standard deviation, or of degrees of freedom that are fewer) at most;
        inf where the bits that are owed are others, or something is no number.
    """
    told = {}
    for name, expected in exact.items():
        deviation, owed = expected.variance.sqrt(), expected.variance == 0
        value, ratio = found[name].value.double(), found[name].inverse.double() * deviation
        off = (value - expected.value).abs() / deviation
        # Equal infinities: the LSE of rows that see no key.
        off = torch.where(value == expected.value, 0.0, off)
        # Where the inverse is inf nothing but this very number passes, and all others are a doubt.
        strict = found[name].inverse.isinf()
        off = torch.where(owed, torch.where(strict & (value == expected.value), 0.0, torch.inf), off)
        off = torch.where(strict & ~owed, 0.0, off)
        budget = torch.where(owed | strict, 0.0, (ratio - 1).abs())
        shares = [off, budget]
        if (degrees := found[name].degrees) is not None and expected.degrees is not None:
            # Where bits are owed there are no errors to be counted; and more of them make a bound that is stricter.
            fewer = (1 - degrees / expected.degrees).masked_fill(owed.any(-1), 0.0)
            shares.append(fewer)
        far, *budgets = (each.nan_to_num(torch.inf).amax().item() if each.numel() else 0.0 for each in shares)
        told[name] = far, max(budgets)
    return told


def disagreement(distances: Mapping[str, tuple[float, float]]) -> str | None:
    """Why answers so far from each other do not agree, or None."""
    for name, (off, budget) in distances.items():
        if not off < _MOST_OFF.get(name, _MOST_OFF_HALF):
            return f"{name} is off by {off:.2g} standard deviations"
        if not budget < _OFF_BUDGET:
            return f"the budget of {name} is off by {budget:.2g} of it"
    return None
