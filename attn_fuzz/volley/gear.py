"""A volley from end to end: run its calls, judge every document of every call, and wait for the device once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch

from attn_fuzz.checks.budget import LIMIT, limit
from attn_fuzz.checks.isolation import garbage_of
from attn_fuzz.measured import measured
from attn_fuzz.volley.calls import Fired, Loaded, fire
from attn_fuzz.volley.layouts import Volley
from attn_fuzz.wide.gear import effective_profile, promised
from attn_fuzz.wide.judge import COLUMNS, largest_z, of_documents, other_bits
from attn_fuzz.wide.probe import wide_probe, wrong_documents
from backends.registry import Backend
from reference.answer import KERNEL_TENSORS, Inputs, kernel_inputs
from reference.case import Case
from reference.packed import packed

PROBED: Final = tuple(f"{name} of the probe" for name in KERNEL_TENSORS)
APART: Final = "isolation"
NAMES: Final = (*COLUMNS, APART, *PROBED)
"""What is judged of each document: as of a wide call, isolation from others, then the results of the exact probe."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a backend made of a volley."""

    volley: Volley
    z: torch.Tensor
    """float64 ``[documents, len(NAMES)]`` on the CPU; inf where something exact is wrong."""
    broken: dict[int, str]
    """Calls that raised or gave something else than was asked for, in words."""
    refused: dict[int, str]
    """Calls that the backend refused."""
    touched: bool
    """Some input, gap or prefix sum has other bits than before; nobody knows which call's work that was."""
    paths: frozenset[str]
    turn: Turn
    """What was asked."""

    def worst(self) -> list[tuple[float, str]]:
        """Of every call: the largest deviation in units in which the verdict is at LIMIT, and whose it is."""
        found = []
        for index, (begin, end) in enumerate(self.volley.spans):
            if index in self.broken:
                found.append((torch.inf, self.broken[index]))
                continue
            own = self.z[begin:end]
            if index in self.refused or not own.numel():
                found.append((0.0, ""))
                continue
            largest, column = own.amax(0).max(0)
            found.append((largest.item() * LIMIT / limit(self.volley.case), NAMES[int(column)]))
        return found

    def largest(self) -> dict[str, tuple[float, int]]:
        """Of each result: its largest deviation in the same units, and the call in which it was seen."""
        ends = torch.tensor(self.volley.ends)
        z = self.z * LIMIT / limit(self.volley.case)
        for index in self.refused | self.broken:
            z[slice(*self.volley.spans[index])] = 0.0
        worst, places = z.max(0)
        calls = torch.searchsorted(ends, places, right=True).tolist()
        return {
            name: (z, index)
            for name, z, index in zip(NAMES, worst.tolist(), calls, strict=True)
            if name in COLUMNS and name != "bits"
        }

    def failing(self) -> list[int]:
        """Calls that are beyond the limit, worst first."""
        worst = self.worst()
        beyond = [index for index, (z, _) in enumerate(worst) if z > LIMIT]
        return sorted(beyond, key=lambda index: -worst[index][0])


class Turn(NamedTuple):
    """What is asked of a volley, beside the budgets."""

    poison: str
    """Contents of unwritten memory when the drawn values run."""
    probe: bool = False
    """Census and support, in a run of their own from memory of the other kind."""
    inference: bool = False
    """The forward without autograd, which the same budgets hold for."""
    partly: bool = False
    """Gradients of some inputs only, which the same budgets hold for."""
    apart: bool = False
    """Every other document full of garbage, for the same results of the others."""
    again: bool = False
    """The drawn values once more from memory of the other kind, the last call first, for the same bits."""


TURNS: Final = (
    Turn("nan", probe=True),
    Turn("finite", inference=True),
    Turn("nan", probe=True),
    Turn("finite", again=True),
    Turn("nan", probe=True),
    Turn("finite", apart=True),
    Turn("nan", probe=True),
    Turn("finite", partly=True),
)
"""Of every campaign, in turn: each run costs as much as the drawn values' own, and a volley more is worth more."""

_OTHER: Final = {"nan": "finite", "finite": "nan"}


def judge(
    volley: Volley,
    backend: Backend,
    device: torch.device,
    turn: Turn = TURNS[0],
    beat: Callable[[], None] = lambda: None,
) -> Judged:
    """Runs every call with drawn values, and whatever else it is the turn of, from poisoned memory; judges all of it.

    Every document's results are held to the budget, element by element and row by row, and census and support of the
    probe to the very number of every key.

    Args:
        volley: the calls.
        backend: what runs them.
        device: where.
        turn: what is asked.
        beat: called before every call of every run.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    case, count = volley.case, len(volley.case.packed_lengths)
    drawn = kernel_inputs(case, device)
    loaded = Loaded(volley, drawn, device)
    other = _OTHER[turn.poison]
    profile = effective_profile(backend.kernel.profile_on(device.type), case)
    convention = backend.kernel.capabilities_on(device.type).lse_of_blind_rows
    runs: list[Fired] = []
    placed = [loaded]

    def run(
        what: Loaded, poison: str, gradients: Sequence[str] = ("q", "k", "v"), *, backwards: bool = False
    ) -> dict[str, torch.Tensor]:
        runs.append(fire(what, backend, poison, gradients=gradients, backwards=backwards, beat=beat))
        _in_our_convention(runs[-1], convention)
        return runs[-1].results

    first = run(loaded, turn.poison)
    held = [first]
    # What is compiled would be compiled once more for each way to ask.
    if turn.inference and not backend.kernel.compiled:
        held.append(run(loaded, other, ()))
    if turn.partly and not backend.kernel.compiled:
        held.append(run(loaded, other, _PARTS[case.seed % len(_PARTS)]))
    z = torch.cat(
        [largest_z(case, drawn, profile, held).amax(0), torch.zeros(count, 1 + len(PROBED), device=device)], 1
    )
    if turn.again and (names := promised(backend, device)):
        moved = other_bits(case, first, run(loaded, other, backwards=True), names)
        z[:, NAMES.index("bits")] = torch.where(moved, torch.inf, 0.0)
    if turn.apart and (names := promised(backend, device)):
        garbage = garbage_of(case, measured(backend, str(device)))
        placed.append(Loaded(volley, _spoiled(case, drawn, garbage), device))
        moved = _moved(case, first, run(placed[-1], turn.poison), names)
        z[:, NAMES.index(APART)] = torch.where(moved, torch.inf, 0.0)
    if turn.probe:
        probe = wide_probe(case, device)
        placed.append(Loaded(volley, probe.inputs, device))
        wrong = wrong_documents(case, probe, run(placed[-1], other))
        z[:, len(NAMES) - len(PROBED) :] = torch.where(wrong, torch.inf, 0.0)
    touched = torch.stack([each.changed() for each in placed]).any()
    # The one transfer: everything before it was only queued.
    flat = torch.cat([z.flatten(), touched[None].double()]).cpu()
    broken: dict[int, str] = {}
    refused: dict[int, str] = {}
    for fired in runs:
        broken = fired.broken | broken
        refused |= fired.refused
    return Judged(
        volley,
        flat[:-1].view(z.shape),
        broken,
        refused,
        bool(flat[-1]),
        frozenset().union(*(fired.paths for fired in runs)),
        turn,
    )


_PARTS: Final = (("q",), ("k",), ("v",), ("k", "v"))
"""Inputs that require a gradient, where not all do."""


def _kept(case: Case, name: str, device: torch.device) -> torch.Tensor:
    """Rows of a result that belong to documents which keep their values: every other one, by the seed."""
    lengths = case.packed_key_lengths if name in ("k", "v", "dk", "dv") else case.packed_lengths
    return packed(lengths, device).owner % 2 == case.seed // 3 % 2


def _spoiled(case: Case, drawn: Inputs, garbage: float) -> Inputs:
    """A case's tensors with garbage in every other document."""
    names = ("q", "k", "v", "dout")
    tensors = {name: getattr(drawn, name) for name in names}
    spoilt = {
        name: torch.where(_kept(case, name, x.device)[:, None, None], x, x.new_tensor(garbage))
        for name, x in tensors.items()
    }
    return Inputs(**spoilt)


def _moved(
    case: Case, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], names: Sequence[str]
) -> torch.Tensor:
    """Documents that kept their values and did not keep a result: bool ``[documents]``."""
    found = torch.zeros(len(case.packed_lengths), dtype=torch.bool, device=before["out"].device)
    for name in names:
        if name in before and name in after and len(before[name]):
            was, now = before[name], after[name]
            # 0 times a negative number is -0: signs of zeros may move.
            differs = ((was != now) & ~(was.isnan() & now.isnan())).flatten(1).any(1)
            found |= of_documents(case, name, differs & _kept(case, name, differs.device))
    return found


def _in_our_convention(fired: Fired, blind: float) -> None:
    """The LSE of rows without keys as this project has it; a finite sentinel stays what it is, and wrong."""
    if "lse" in fired.results:
        lse = fired.results["lse"]
        fired.results["lse"] = torch.where(lse == blind, -torch.inf, lse)
