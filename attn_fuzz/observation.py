"""What one run gave back, and what changed where nothing may be written."""

from __future__ import annotations

import dataclasses

import torch

from reference.memory import bits, same_bits


@dataclasses.dataclass(frozen=True)
class Stray:
    """Rows that changed where nothing may be written."""

    tensor: str
    """Buffer ``k`` or ``v``, gradient buffer ``dk`` or ``dv``, or ``out`` or ``dx`` as handed back."""
    step: str
    """The micro-sequence and the pass, in words."""
    rows: tuple[int, ...]
    value: float
    """One of the values found there."""

    def on_rank(self, rank: int) -> Stray:
        """The same, seen by one of several ranks."""
        return dataclasses.replace(self, step=f"{self.step} on rank {rank}")


@dataclasses.dataclass
class Observation:
    """What one run gave back."""

    poison: str
    results: dict[str, torch.Tensor]
    """By the names of the reference's answer; token-major, detached. A result the backend does not give is absent."""
    changed: list[str] = dataclasses.field(default_factory=list)
    """Inputs, metadata or guard margins whose bits changed, in words."""
    strays: list[Stray] = dataclasses.field(default_factory=list)
    paths: frozenset[str] = frozenset()
    tails: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Rows of results behind the last document, where the case has capacity for more."""
    by_rank: tuple[dict[str, torch.Tensor], ...] = ()
    """Where there are several ranks, each one's whole buffers ``k``, ``v``, ``dk``, ``dv``, as far as it shows them."""

    def on_cpu(self) -> Observation:
        """The same, with results on the CPU."""
        self.results = {name: tensor.cpu() for name, tensor in self.results.items()}
        return self


def differing(first: Observation, second: Observation) -> list[str]:
    """Names of results whose bits differ between two runs of the same case."""
    return [
        name
        for name, value in first.results.items()
        if name in second.results and not same_bits(value, second.results[name])
    ]


def strays(name: str, step: str, before: torch.Tensor, after: torch.Tensor, begin: int, end: int) -> list[Stray]:
    """Rows outside ``[begin, end)`` whose bits differ, of those that were there before: a buffer may grow."""
    if begin == end and same_bits(before, after):
        # By far the most frequent case, and several times as fast.
        return []
    if before.shape[1:] != after.shape[1:] or before.dtype != after.dtype:
        # Nothing to compare row by row; what it is in the end is judged by its shape and dtype.
        return []
    rows_kept = min(len(before), len(after))
    before, after = before[:rows_kept], after[:rows_kept]
    differs = (bits(before) != bits(after)).flatten(1).any(1)
    differs[begin:end] = False
    rows = differs.nonzero()[:, 0].tolist()
    if not rows:
        return []
    row_differs = bits(before)[rows[0]] != bits(after)[rows[0]]
    return [Stray(name, step, tuple(rows), after[rows[0]][row_differs][0].item())]


class HandedBack:
    """What was handed back, and what it was then: nothing that comes later may change it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._given: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def add(self, step: str, tensor: torch.Tensor) -> None:
        """Remembers a result as it is."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"the {step} should give a tensor, but gave {type(tensor).__name__}")
        self._given.append((step, tensor.detach(), tensor.detach().clone()))

    def values(self) -> list[torch.Tensor]:
        """The results as they were when they were handed back, in that order."""
        return [then for _, _, then in self._given]

    def changed(self) -> list[Stray]:
        """Rows of results that are no longer what they were."""
        return [stray for step, now, then in self._given for stray in strays(self.name, step, then, now, 0, 0)]


class Watch:
    """Compares a buffer's bits before and after each step.

    Args:
        names: of the two tensors watched.
    """

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names
        self.before: tuple[torch.Tensor, ...] | None = None

    def compare(
        self, tensors: tuple[torch.Tensor, torch.Tensor] | None, step: str, begin: int, end: int
    ) -> list[Stray]:
        """Rows outside ``[begin, end)`` that changed since the last look."""
        found: list[Stray] = []
        if tensors is not None and self.before is not None:
            for name, before, after in zip(self.names, self.before, tensors, strict=True):
                found += strays(name, step, before, after, begin, end)
        self.note(tensors)
        return found

    def note(self, tensors: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Remembers the bits as they are."""
        if tensors is not None and (not isinstance(tensors, (tuple, list)) or len(tensors) != len(self.names)):
            raise TypeError(f"a buffer should be two tensors, {' and '.join(self.names)}, or None")
        self.before = None if tensors is None else tuple(tensor.detach().clone() for tensor in tensors)
