"""The calls of a volley: tensors in place, then one run after another, nothing of which waits for the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from attn_fuzz.poison import filler, poisoned
from attn_fuzz.process import raise_lack_of_memory
from attn_fuzz.volley.layouts import Volley
from backends.kernel import Attended, AttentionOptions, UnsupportedCase
from backends.metadata import VarlenMetadata
from backends.registry import Backend
from reference.answer import Inputs
from reference.memory import Placed, bits, layout_of, place

_STEP: Final = 64
"""Calls begin at multiples of so many rows, of whatever size: aligned as tensors of their own are."""

_SUMS_STEP: Final = 32
"""Prefix sums begin at multiples of so many numbers: 128 bytes."""

_SIDES: Final = {"q": "q", "dout": "q", "k": "k", "v": "k"}


@dataclasses.dataclass(frozen=True)
class _Side:
    """Where the rows of one side of the calls lie."""

    begins: tuple[int, ...]
    """First row of each call in the arena."""
    counts: tuple[int, ...]
    """Rows of each call."""
    rows: int
    """Of the arena, gaps included."""
    places: torch.Tensor
    """int64 ``[tokens]``: row in the arena of each row of the packed case."""


def _side(volley: Volley, lengths: tuple[int, ...], device: torch.device) -> _Side:
    counts = [sum(lengths[slice(*span)]) for span in volley.spans]
    begins, row = [], 0
    for count in counts:
        begins.append(row)
        # A row at least between calls is nobody's.
        row += (count // _STEP + 1) * _STEP
    gaps = [begin - packed for begin, packed in zip(begins, itertools.accumulate(counts, initial=0))]
    numbers = torch.tensor([counts, gaps], dtype=torch.int64).to(device, non_blocking=True)
    tokens = sum(counts)
    shifts = torch.repeat_interleave(numbers[1], numbers[0], output_size=tokens)
    return _Side(tuple(begins), tuple(counts), row, shifts + torch.arange(tokens, device=device))


def _sums(volley: Volley, device: torch.device) -> tuple[torch.Tensor, list[VarlenMetadata]]:
    """(all prefix sums in one allocation, the metadata of each call, whose prefix sums are parts of it)."""
    numbers: list[int] = []
    places: list[tuple[int, int]] = []
    lengths_q, lengths_k = volley.case.packed_lengths, volley.case.packed_key_lengths
    for span in volley.spans:
        for lengths in (lengths_q, lengths_k):
            own = list(itertools.accumulate(lengths[slice(*span)], initial=0))
            places.append((len(numbers), len(numbers) + len(own)))
            numbers += own + [-1] * (-len(own) % _SUMS_STEP)
    every = torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)
    made = [
        VarlenMetadata.of_sums(
            lengths_q[slice(*span)], lengths_k[slice(*span)], every[slice(*sums_q)], every[slice(*sums_k)]
        )
        for span, sums_q, sums_k in zip(volley.spans, places[::2], places[1::2], strict=True)
    ]
    return every, made


class Loaded:
    """A volley's tensors in their places, ready for any number of runs.

    Args:
        volley: what will run.
        inputs: tensors of its packed case, on the device.
        device: where.
    """

    def __init__(self, volley: Volley, inputs: Inputs, device: torch.device) -> None:
        self.volley, self.device = volley, device
        case = volley.case
        self.sides = {
            "q": _side(volley, case.packed_lengths, device),
            "k": _side(volley, case.packed_key_lengths, device),
        }
        self.placed = {name: self._place(name, getattr(inputs, name)) for name in _SIDES}
        self.sums, self.metadata = _sums(volley, device)
        self._sums_before = self.sums.clone()
        self.options = AttentionOptions.of(case)

    def _place(self, name: str, x: torch.Tensor) -> Placed:
        side, fill = self.sides[_SIDES[name]], filler("nan")
        arena = x.new_full((side.rows, *x.shape[1:]), fill)
        arena[side.places] = x
        return place(arena, layout_of(name, self.volley.case.memory), fill)

    @functools.cached_property
    def of_calls(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Each call's own rows of q, k, v and dout."""
        views = []
        for name in ("q", "k", "v", "dout"):
            side, whole = self.sides[_SIDES[name]], self.placed[name].tensor
            pairs = zip(side.begins, side.counts, strict=True)
            views.append([whole.narrow(0, begin, count) for begin, count in pairs])
        return list(zip(*views, strict=True))

    def changed(self) -> torch.Tensor:
        """Whether any input, gap, guard margin or prefix sum has lost its bits: bool scalar on the device."""
        moved = [(bits(item.storage) != item.before).any() for item in self.placed.values()]
        return torch.stack([*moved, (self.sums != self._sums_before).any()]).any()


@dataclasses.dataclass
class Fired:
    """What came out of a run of all calls."""

    results: dict[str, torch.Tensor]
    """As those of the packed case, on the device; rows of calls that brought nothing are 0."""
    broken: dict[int, str]
    """Calls that raised, or gave something else than was asked for, in words."""
    refused: dict[int, str]
    """Calls that the backend refused, in words."""
    paths: frozenset[str]
    """Implementations that ran."""


def _primed(like: torch.Tensor, keys: torch.Tensor, byte: float) -> None:
    """Leaves poison in the blocks that a GPU's next results will be given."""
    heads = like.shape[:2]
    blocks = [torch.full(x.shape, byte, dtype=x.dtype, device=x.device) for x in (like, like, keys, keys)]
    blocks.append(torch.full(heads, byte, dtype=torch.float32, device=like.device))
    del blocks


@contextlib.contextmanager
def _memory(loaded: Loaded, poison: str, *, compiled: bool) -> Iterator[None]:
    """Unwritten memory holds a poison, of a CPU for all calls together; a GPU's is filled call by call."""
    if loaded.device.type == "cuda":
        # Deterministic mode would choose other kernels.
        yield
        return
    with poisoned(poison, loaded.device, compiled=compiled):
        yield


def _one(
    loaded: Loaded, index: int, backend: Backend, poison: str, gradients: Sequence[str]
) -> tuple[Attended, tuple[torch.Tensor, ...]]:
    *tensors, dout = loaded.of_calls[index]
    named = zip(("q", "k", "v"), tensors, strict=True)
    q, k, v = leaves = [x.detach().requires_grad_(name in gradients) for name, x in named]
    if loaded.device.type == "cuda" and poison != "none":
        _primed(q, k, filler(poison))
    with torch.set_grad_enabled(bool(gradients)):
        attended = backend.kernel.attend(q, k, v, loaded.metadata[index], loaded.options)
    if not gradients:
        return attended, ()
    asked = [x for x in leaves if x.requires_grad]
    return attended, torch.autograd.grad(attended.out, asked, dout)


def fire(
    loaded: Loaded,
    backend: Backend,
    poison: str,
    *,
    gradients: Sequence[str] = ("q", "k", "v"),
    backwards: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> Fired:
    """Forward and backward of every call, one after another.

    Args:
        loaded: the calls.
        backend: what runs them.
        poison: contents of unwritten memory; ``none`` for what it happens to hold.
        gradients: the inputs that require one; none for the forward alone, without autograd, as inference runs it.
        backwards: the last call first.
        beat: called before every call, for whoever would take a slow kernel for one that hangs.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    shapes = {name: loaded.placed[name].tensor.shape for name in ("q", "k")}
    dtype = loaded.placed["q"].tensor.dtype
    given = tuple(f"d{name}" for name in ("q", "k", "v") if name in gradients)
    names = ("out", "lse", *given)
    meant = backend.kernel.paths_on(loaded.device.type)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    order = range(len(loaded.volley.ends))
    fired = Fired({}, {}, {}, frozenset())
    paths: set[str] = set()
    with _memory(loaded, poison, compiled=backend.kernel.compiled):
        for index in reversed(order) if backwards else order:
            beat()
            rows = {side: (loaded.sides[side].counts[index], *shapes[side][1:]) for side in ("q", "k")}
            shape_of = {"out": rows["q"], "dq": rows["q"], "dk": rows["k"], "dv": rows["k"], "lse": rows["q"][:2]}
            wanted = {name: shape_of[name] for name in names}
            got: dict[str, torch.Tensor] = {}
            try:
                attended, grads = _one(loaded, index, backend, poison, gradients)
                got = {"out": attended.out.detach(), **dict(zip(given, grads, strict=True))}
                if attended.lse is not None:
                    got["lse"] = attended.lse.detach().T
                paths.add(attended.path)
                if meant and attended.path not in meant:
                    fired.broken[index] = f"{attended.path!r} ran, but should be {' or '.join(sorted(meant))}"
            except (UnsupportedCase, NotImplementedError) as refusal:
                fired.refused[index] = str(refusal)
            except Exception as error:
                raise_lack_of_memory(error)
                fired.broken[index] = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['-'])[0][:300]}"
            wrong = [name for name, x in got.items() if x.shape != wanted[name] or (name != "lse" and x.dtype != dtype)]
            if wrong:
                fired.broken[index] = f"{', '.join(wrong)} of another shape or dtype"
            for name, shape in wanted.items():
                if name in got and name not in wrong:
                    parts[name].append(got[name])
                elif name != "lse" or not got or wrong:
                    parts[name].append(torch.zeros(shape, dtype=dtype, device=loaded.device))
    results = {
        name: torch.cat(some[::-1] if backwards else some) for name, some in parts.items() if len(some) == len(order)
    }
    fired.paths = frozenset(paths)
    fired.results = results
    return fired
