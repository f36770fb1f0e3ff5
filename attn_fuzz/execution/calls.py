"""The calls of a batch: forward and backward of one, or of one after another, nothing of which waits for the device."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from attn_fuzz.backends.kernel import Attended, UnsupportedCase
from attn_fuzz.backends.output import as_output
from attn_fuzz.backends.registry import Backend
from attn_fuzz.execution.autograd_threads import autograd_threads
from attn_fuzz.execution.batch_tensors import BatchTensors, side_of_result
from attn_fuzz.execution.failures import note_failure
from attn_fuzz.execution.poison import filler, poisoned
from attn_fuzz.execution.process import beyond_its_call


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of autograd in a kernel call."""

    gradients: tuple[str, ...] = ("q", "k", "v")
    """The inputs that require a gradient; none: the forward runs without autograd, as inference does."""
    twice: bool = False
    """The backward runs twice over the same graph, and its second results count."""


EVERYTHING: Final = Asked()


@dataclasses.dataclass(frozen=True)
class How:
    """In which way calls are run."""

    asked: Asked = EVERYTHING
    """Of autograd."""
    forward_only: bool = False
    """The forward of training, and no backward."""
    backwards: bool = False
    """The last call first."""
    threaded: bool = False
    """Whether backwards run in a thread of autograd's own."""


PLAIN: Final = How()


@dataclasses.dataclass
class BatchResult:
    """What came out of a run of all calls."""

    results: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """As those of the packed case, on the device; rows of calls that brought nothing are 0."""
    broken: dict[int, str] = dataclasses.field(default_factory=dict)
    """Calls that raised, or gave something else than was asked for, in words."""
    incomplete: set[int] = dataclasses.field(default_factory=set)
    """Those of them that raised nothing, but gave no such result, or one of another shape or dtype."""
    refused: dict[int, str] = dataclasses.field(default_factory=dict)
    """Calls that the backend refused, in words."""
    spent: set[int] = dataclasses.field(default_factory=set)
    """Calls whose graph could not be taken back twice, which they may say."""
    tails: dict[int, list[tuple[str, torch.Tensor]]] = dataclasses.field(default_factory=dict)
    """Of calls with spare rows: those of each result that has some."""
    paths: set[str] = dataclasses.field(default_factory=set)
    """Implementations that ran."""


def _primed(like: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, value: float) -> None:
    """Leaves poison in the blocks that a GPU's next results will be given."""
    # The LSE of a row and a head takes 4 bytes, of which half of the dtypes hold two.
    lse = (*like.shape[:2], 4 // like.element_size())
    shapes = (as_output(like, values).shape, like.shape, keys.shape, values.shape, lse)
    blocks = [torch.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes]
    # A launch or two for all of them, where filling takes one for each; whatever is there, NaN added to it is NaN.
    if not math.isnan(value):
        torch._foreach_zero_(blocks)
    torch._foreach_add_(blocks, value)


@contextlib.contextmanager
def _memory(tensors_of_calls: BatchTensors, poison: str, *, compiled: bool) -> Iterator[None]:
    """Unwritten memory holds a poison, of a CPU for all calls together; a GPU's is filled call by call."""
    if tensors_of_calls.device.type == "cuda":
        # Filling every allocation by itself would take longer than many a call.
        yield
        return
    with poisoned(poison, tensors_of_calls.device, free_blocks=compiled):
        yield


def _copies(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients in memory of their own: a backward may hand out the same again to the next call.

    One operation for all of them, since calls are short.
    """
    together = torch.cat([x.reshape(-1) for x in gradients]).split([x.numel() for x in gradients])
    return [copy.view(x.shape) for copy, x in zip(together, gradients, strict=True)]


_RETAINED: Final = "retain_graph"
"""What torch's compiler speaks of where a graph that is to be kept gives memory that it saved to its backward."""


class Call:
    """One of a batch's calls: forward, then backward.

    Args:
        tensors: the batch in its places.
        index: which of its calls.
        backend: what runs it.
        asked: what is asked of autograd.
    """

    def __init__(self, tensors: BatchTensors, index: int, backend: Backend, asked: Asked = EVERYTHING) -> None:
        self.tensors, self.backend, self.asked = tensors, backend, asked
        *leaves, self.dout = tensors.of_calls[index]
        self.dlse = tensors.lse_gradients[index]
        named = zip(("q", "k", "v"), leaves, strict=True)
        self.leaves = {name: x.detach().requires_grad_(name in asked.gradients) for name, x in named}
        self.metadata = tensors.metadata[index]
        self.attend: Callable[..., Attended] = backend.kernel.attend
        """What is called: the kernel, or what something else has made of it."""
        self.attended: Attended | None = None
        self.gradients: dict[str, torch.Tensor] = {}
        self.spent = False
        """The graph could not be taken back twice, which a backward may say."""

    def forward(self) -> None:
        """Raises what the backend does."""
        q, k, v = self.leaves.values()
        with torch.set_grad_enabled(bool(self.asked.gradients)):
            self.attended = self.attend(q, k, v, self.metadata, self.tensors.options)

    def _outputs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the backward begins from, and the gradients given to it.

        Raises:
            UnsupportedCase: where the LSE should have a gradient, and is marked not differentiable, which is honest.
        """
        assert self.attended is not None
        out, lse = self.attended.out, self.attended.lse
        # By V alone no LSE can be moved.
        if self.dlse is None or (self.asked.gradients == ("v",) and (lse is None or not lse.requires_grad)):
            return [out], [self.dout]
        if lse is None or not lse.requires_grad:
            what = "it returns none" if lse is None else "which is marked not differentiable"
            raise UnsupportedCase(f"{self.backend.name} does not take a gradient for the LSE, {what}")
        return [out, lse], [self.dout, self.dlse]

    def backward(self) -> None:
        """Of what was asked for. Raises what the backend does."""
        assert self.attended is not None
        if not self.asked.gradients:
            return
        leaves, first = [self.leaves[name] for name in self.asked.gradients], True
        outputs, given = self._outputs()
        try:
            gradients = torch.autograd.grad(outputs, leaves, given, retain_graph=self.asked.twice)
            first = False
            if self.asked.twice:
                gradients = torch.autograd.grad(outputs, leaves, given)
        except RuntimeError as error:
            if not self.asked.twice or beyond_its_call(error) or (first and _RETAINED not in str(error)):
                raise
            # A backward that gives back what it saved, and says so, makes no mistake.
            self.spent = True
            return
        self.gradients = {f"d{name}": x for name, x in zip(self.asked.gradients, _copies(gradients), strict=True)}

    def results(self) -> dict[str, torch.Tensor]:
        """What it gave, detached, rows behind the last document included; the LSE ``[tokens, heads]``."""
        assert self.attended is not None
        found = {"out": self.attended.out.detach(), **self.gradients}
        if self.attended.lse is not None:
            found["lse"] = self.attended.lse.detach().T
        return found


def _whole(call: Call, poison: str, *, forward_only: bool) -> str:
    """Runs a call of a batch, and says by which implementation it ran."""
    q, k, v = call.leaves.values()
    if q.is_cuda and poison != "none":
        _primed(q, k, v, filler(poison))
    call.forward()
    if not forward_only:
        call.backward()
    assert call.attended is not None
    return call.attended.path


class _Collector:
    """The results of calls, one after another, on their way to those of the packed case."""

    def __init__(self, tensors_of_calls: BatchTensors, names: Sequence[str]) -> None:
        self.tensors_of_calls, self.batch_result = tensors_of_calls, BatchResult()
        self.parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self.dtype = tensors_of_calls.placed["q"].tensor.dtype
        like = {"out": "dout", "lse": "q", "dq": "q", "dk": "k", "dv": "v"}
        shapes = {name: tensors_of_calls.placed[like[name]].tensor.shape for name in names}
        self.of_row = {name: shape[1 : 2 if name == "lse" else 3] for name, shape in shapes.items()}

    def take(self, index: int, got: dict[str, torch.Tensor]) -> None:
        """Adds what a call gave, and zeros for what it did not."""
        wrong = []
        for name, parts in self.parts.items():
            rows = self.tensors_of_calls.sides[side_of_result(name)].tokens_of(index)
            x = got.get(name)
            if x is not None:
                x, nobodys = self.tensors_of_calls.parted(name, index, x)
                if nobodys is not None:
                    self.batch_result.tails.setdefault(index, []).append((name, nobodys))
            if x is not None and (x.shape != (rows, *self.of_row[name]) or (name != "lse" and x.dtype != self.dtype)):
                wrong.append(name)
                x = None
            if x is not None:
                parts.append(x)
            elif name != "lse" or not got or wrong:
                parts.append(
                    torch.zeros(rows, *self.of_row[name], dtype=self.dtype, device=self.tensors_of_calls.device)
                )
        if wrong:
            self.batch_result.broken[index] = f"{', '.join(wrong)} of another shape or dtype"
            self.batch_result.incomplete.add(index)

    def done(self, calls: int, *, backwards: bool) -> BatchResult:
        """All of it; the LSE only where every call has one."""
        self.batch_result.results = {
            # Gradients of a single call are copies already.
            name: some[0] if calls == 1 and name.startswith("d") else torch.cat(some[::-1] if backwards else some)
            for name, some in self.parts.items()
            if len(some) == calls
        }
        return self.batch_result


def run_batch(
    tensors_of_calls: BatchTensors,
    backend: Backend,
    poison: str,
    how: How = PLAIN,
    *,
    calls: int | None = None,
    beat: Callable[[], None] = lambda: None,
) -> BatchResult:
    """Forward and backward of every call, one after another.

    Args:
        tensors_of_calls: the calls in their places.
        backend: what runs them.
        poison: contents of unwritten memory; ``none`` for what it happens to hold.
        how: in which way.
        calls: how many of them, from the first on; None for all.
        beat: called before every call, so that a slow kernel is not taken for one that hangs.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    given = () if how.forward_only else tuple(f"d{name}" for name in how.asked.gradients)
    meant = backend.kernel.paths_on(tensors_of_calls.device.type)
    collector = _Collector(tensors_of_calls, ("out", "lse", *given))
    batch_result = collector.batch_result
    order = range(len(tensors_of_calls.batch.ends) if calls is None else calls)
    memory = _memory(tensors_of_calls, poison, compiled=backend.kernel.compiled)
    with memory, autograd_threads(own=how.threaded):
        for index in reversed(order) if how.backwards else order:
            beat()
            got: dict[str, torch.Tensor] = {}
            try:
                call = Call(tensors_of_calls, index, backend, how.asked)
                path = _whole(call, poison, forward_only=how.forward_only)
                got = call.results()
                if call.spent:
                    batch_result.spent.add(index)
                batch_result.paths.add(path)
                if meant and path not in meant:
                    batch_result.broken[index] = f"{path!r} ran, but should be {' or '.join(sorted(meant))}"
            except Exception as error:
                note_failure(batch_result, index, error)
            collector.take(index, got)
    return collector.done(len(order), backwards=how.backwards)
