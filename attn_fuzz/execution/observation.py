"""What one run gave back, and what changed where nothing may be written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.execution.kept_results import Kept
from attn_fuzz.reference.memory import live_bits, same_bits


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
    """Rows of results that are nobody's: between documents, then behind the last one, where the case has such."""
    spent: bool = False
    """The graph could not be taken back twice, so that gradients are absent."""
    by_rank: tuple[dict[str, torch.Tensor], ...] = ()
    """Where there are several ranks, each one's whole buffers ``k``, ``v``, ``dk``, ``dv``, as far as it shows them."""

    def on_cpu(self) -> Observation:
        """The same, with copies of the results on the CPU."""
        self.results, self.tails = on_cpu(self.results), on_cpu(self.tails)
        return self


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the tensors on the CPU, for which the device is waited for once: others may be waiting for it, too.

    Copies, since whoever gave them may write there again: a module that persists hands its gradients out live.
    """
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    found = {}
    for name, tensor in tensors.items():
        # Pinned memory is what a copy need not be waited for in.
        found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        found[name].copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(next(tensor.device for tensor in tensors.values() if tensor.is_cuda)).synchronize()
    return found


def in_our_convention(lse: torch.Tensor, backend: Backend, device: torch.device) -> torch.Tensor:
    """A backend's LSE with -inf for rows that see no key; a finite sentinel stays what it is, and wrong."""
    convention = backend.kernel.capabilities_on(device.type).lse_of_blind_rows
    return torch.where(lse == convention, -torch.inf, lse)


def differing(first: Observation, second: Observation) -> list[str]:
    """Names of results whose bits differ between two runs of the same case."""
    return [
        name
        for name, value in first.results.items()
        if name in second.results and not same_bits(value, second.results[name])
    ]


def waited_for(tensor: torch.Tensor) -> bool:
    """Whether looking at a tensor's values means waiting for a device, which others may keep busy."""
    return tensor.is_cuda


class _Watched:
    """One tensor's bits at the last look. Few operations: every tensor is looked at after every step of every run."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name = name
        self._tensor, self._live = tensor, live_bits(tensor)
        self._before = self._live.clone()
        self._pending: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """Looks at a GPU's memory that were not waited for: step, whether rows differ, which elements, its values."""

    def compare(self, tensor: torch.Tensor, step: str, begin: int, end: int) -> list[Stray]:
        """Rows outside ``[begin, end)`` that changed since the last look; of a GPU's memory, ``settle`` says it."""
        if tensor is not self._tensor or tensor.data_ptr() != self._live.data_ptr():
            # A layer may hand out a new view every time, or have moved.
            self._tensor, self._live = tensor, live_bits(tensor)
        before, live = self._before, self._live
        if before.shape != live.shape or before.dtype != live.dtype:
            return self._resized(step, begin, end)
        if waited_for(live):
            differs, self._before = before != live, live.clone()
            differs[begin:end] = False
            self._pending.append((step, differs.any(), differs, self._before.view(self._tensor.dtype)))
            return []
        if begin == end and torch.equal(before, live):
            # By far the most frequent case, and nothing to remember.
            return []
        differs = before != live
        differs[begin:end] = False
        found = [self._stray(differs, step, self._tensor)] if differs.any() else []
        before.copy_(live)
        return found

    def flags(self) -> list[torch.Tensor]:
        """Of the looks that have not been waited for: whether rows differ, one element each."""
        return [differ for _, differ, _, _ in self._pending]

    def settle(self) -> list[Stray]:
        """What those looks saw."""
        pending, self._pending = self._pending, []
        return [self._stray(differs, step, then) for step, differ, differs, then in pending if differ]

    def _resized(self, step: str, begin: int, end: int) -> list[Stray]:
        """The same for a buffer of another size: what it is in the end is judged by its shape and dtype."""
        before, self._before = self._before, self._live.clone()
        if before.shape[1:] != self._live.shape[1:] or before.dtype != self._live.dtype:
            return []
        kept = min(len(before), len(self._live))
        differs = before[:kept] != self._live[:kept]
        differs[begin:end] = False
        return [self._stray(differs, step, self._tensor)] if differs.any() else []

    def _stray(self, differs: torch.Tensor, step: str, values: torch.Tensor) -> Stray:
        rows = differs.flatten(1).any(1).nonzero()[:, 0].tolist()
        value = values.detach()[rows[0]][differs[rows[0]]][0].item()
        return Stray(self._name, step, tuple(rows), value)


def _settled(every: Sequence[_Watched]) -> list[Stray]:
    """What looks at a GPU's memory saw, which is waited for once."""
    flags = [flag for watched in every for flag in watched.flags()]
    if not flags or not torch.stack(flags).any():
        return []
    return [stray for watched in every for stray in watched.settle()]


class HandedBack:
    """What was handed back, and what it was then: nothing that comes later may change it.

    Args:
        name: of the result.
        kept: where copies of it are kept.
        watched: whether ``changed`` will be asked, which takes a copy more of each.
    """

    def __init__(self, name: str, kept: Kept | None = None, *, watched: bool = True) -> None:
        self.name, self._kept, self._watch = name, kept or Kept(), watched
        self._values: list[torch.Tensor] = []
        self._given: list[tuple[str, torch.Tensor, _Watched]] = []
        self._seen: list[Stray] = []

    def add(self, step: str, tensor: torch.Tensor, span: tuple[int, int] = (0, 0)) -> None:
        """Remembers a result of the tokens ``span`` as it is."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"the {step} should give a tensor, but gave {type(tensor).__name__}")
        given = tensor.detach()
        self._values.append(self._kept.part(self.name, *span, given))
        if self._watch:
            self._given.append((step, given, _Watched(self.name, given)))

    def joined(self, *, last_first: bool = False) -> torch.Tensor:
        """The results as they were when they were handed back, one behind another in that order, or the other one."""
        return self._kept.joined(self.name, self._values[::-1] if last_first else self._values)

    def look(self) -> None:
        """Looks whether results are still what they were; of a GPU's memory nobody waits for what that shows."""
        self._seen += [stray for step, now, watched in self._given for stray in watched.compare(now, step, 0, 0)]

    def flags(self) -> list[torch.Tensor]:
        """Of the looks that have not been waited for: whether rows differ, one element each."""
        return [flag for *_, watched in self._given for flag in watched.flags()]

    def changed(self) -> list[Stray]:
        """Rows of results that are no longer what they were."""
        self.look()
        seen, self._seen = self._seen, []
        return seen + _settled([watched for *_, watched in self._given])


class Watch:
    """Compares a buffer's bits before and after each step.

    Args:
        names: of the two tensors watched.
        look: gives them as they are now, or None where there are none to see.
        watched: whether it is compared at all, which copies the buffer each time; what is shown is checked in any case.
    """

    def __init__(
        self,
        names: tuple[str, str],
        look: Callable[[], tuple[torch.Tensor, torch.Tensor] | None],
        *,
        watched: bool = True,
    ) -> None:
        self._names, self._look, self._compares = names, look, watched
        self._watched: list[_Watched] = []
        self._past: list[_Watched] = []
        self.compare("", 0, 0)

    def compare(self, step: str, begin: int, end: int) -> list[Stray]:
        """Rows outside ``[begin, end)`` that changed since the last look; of a GPU's memory, ``settle`` says it."""
        tensors = self._look()
        if tensors is not None and (not isinstance(tensors, (tuple, list)) or len(tensors) != len(self._names)):
            raise TypeError(f"a buffer should be two tensors, {' and '.join(self._names)}, or None")
        if not self._compares:
            return []
        if tensors is None or not self._watched:
            self._past += self._watched
            self._watched = [_Watched(*pair) for pair in zip(self._names, tensors or (), strict=False)]
            return []
        pairs = zip(self._watched, tensors, strict=True)
        return [stray for watched, tensor in pairs for stray in watched.compare(tensor, step, begin, end)]

    def flags(self) -> list[torch.Tensor]:
        """Of the looks that have not been waited for: whether rows differ, one element each."""
        return [flag for watched in (*self._past, *self._watched) for flag in watched.flags()]

    def settle(self) -> list[Stray]:
        """Rows that looks at a GPU's memory found changed; none of them has been waited for until now."""
        return _settled([*self._past, *self._watched])
