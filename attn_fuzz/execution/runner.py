"""Runs a case on a backend and records everything that checks look at."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.layer import Layer
from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.interfering import crossing
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import EVERYTHING, Asked, Call
from attn_fuzz.execution.kept_results import Kept
from attn_fuzz.execution.layer_conventions import GradientRows, without_autograd, without_padding
from attn_fuzz.execution.layer_tensors import LayerTensors
from attn_fuzz.execution.observation import HandedBack, Observation, Stray, Watch, in_our_convention
from attn_fuzz.execution.poison import poisoned
from attn_fuzz.execution.process import beyond_its_call
from attn_fuzz.reference.answer import Inputs, kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs, layer_inputs
from attn_fuzz.reference.layout import Span, active_extent, micro_sequences
from attn_fuzz.reference.memory import Placed


def require_support(backend: Backend, case: Case, device: torch.device) -> None:
    """Raises UnsupportedCase when the backend declares that it does not take the case."""
    if (reason := backend.refusal(case, device.type)) is not None:
        raise UnsupportedCase(f"{backend.name} does not take {reason}")


class WroteBeforeRefusing(Exception):
    """A backend refused a case after it had written to what it was handed."""


@contextlib.contextmanager
def refusing_cleanly(runs: Sequence[KernelCall | LayerRun]) -> Iterator[None]:
    """A backend that refuses must not have written anything."""
    try:
        yield
    except (UnsupportedCase, NotImplementedError) as refusal:
        if changed := [what for run in runs for what in run.changed()]:
            raise WroteBeforeRefusing(f"{changed[0]} changed before it refused: {refusal}") from refusal
        raise UnsupportedCase(str(refusal)) from refusal


def around(
    interfering: Case | None,
    made: Callable[[Case], KernelCall | LayerRun],
    *,
    crossed: bool,
    lockstep: bool = False,
) -> Iterator[None]:
    """Yields once, for the forward under test, between an interfering call's forward and the whole of another one.

    What is kept by shape is then the other call's when the case comes, and what is shared by shape is the other call's
    again when the case's backward comes. An interfering call that fails is a case of its own, some other time.

    Args:
        interfering: what runs around the case, or None.
        made: gives a run of the interfering call.
        crossed: there is only one, alive all the time, whose backward comes where otherwise the other one does.
        lockstep: an interfering call that fails fails the case, since other ranks wait for what it did not get to.
    """

    def attempt(begun: KernelCall | LayerRun | None, *, whole: bool) -> KernelCall | LayerRun | None:
        if interfering is None:
            return None
        try:
            if begun is None:
                begun = made(interfering)
                begun.forward()
            if whole:
                begun.backward()
        except Exception as error:
            refused = isinstance(error, (UnsupportedCase, NotImplementedError))
            if beyond_its_call(error) or (lockstep and not refused):
                raise
            return None
        return begun

    kept = attempt(None, whole=False)
    if not crossed:
        # Gone before the case's tensors are made, which then lie where its own did.
        kept = None
    yield
    attempt(kept, whole=True)


class KernelCall(Call):
    """A case by itself: a batch of one call, in its place.

    Args:
        backend: what runs it.
        case: what to run; ``capacity`` says how many rows there are behind its last document.
        inputs: its tensors.
        poison: what margins and rows behind the last document hold.
        device: where.
        asked: of autograd.
    """

    def __init__(
        self,
        backend: Backend,
        case: Case,
        inputs: Inputs,
        poison: str,
        device: torch.device,
        asked: Asked = EVERYTHING,
    ) -> None:
        self.case, self.poison = case, poison
        tensors = BatchTensors.of(backend, CallBatch.of_one(case), inputs, device, (case.capacity,), poison)
        super().__init__(tensors, 0, backend, asked)

    @property
    def placed(self) -> dict[str, Placed]:
        """q, k, v and dout in their allocations."""
        return self.tensors.placed

    def changed(self) -> list[str]:
        """Inputs, metadata or guard margins whose bits changed, in words."""
        return self.tensors.changes()

    def observe(self) -> Observation:
        """What the call gave back, on the CPU."""
        assert self.attended is not None
        results, tails = self.results(), dict[str, torch.Tensor]()
        if "lse" in results:
            results["lse"] = in_our_convention(results["lse"], self.backend, self.tensors.device)
        for name, result in list(results.items()):
            results[name], nobodys = self.tensors.parted(name, 0, result)
            if nobodys is not None:
                tails[name] = nobodys
        paths = frozenset({self.attended.path})
        observation = Observation(self.poison, results, paths=paths, tails=tails, spent=self.spent)
        observation.changed = self.changed()
        return observation.on_cpu()


def run_kernel(
    backend: Backend,
    case: Case,
    inputs: Inputs,
    poison: str,
    device: torch.device,
    interfering: Case | None = None,
    asked: Asked = EVERYTHING,
) -> Observation:
    """Forward and backward of one varlen call on ``device``, around those of an interfering call where one is given.

    Raises:
        UnsupportedCase: when the backend itself refuses; the message says if it had written anything by then.
    """
    made = functools.partial(KernelCall, backend, poison=poison, device=device)
    # Drawn once, and with nobody filling the memory that it takes.
    others = kernel_inputs(interfering, "cpu") if interfering is not None else inputs
    calls: list[KernelCall] = []
    with poisoned(poison, device, free_blocks=backend.kernel.compiled), refusing_cleanly(calls):
        for _ in around(interfering, lambda other: made(case=other, inputs=others), crossed=crossing(case)):
            # Not before another call that goes is gone, whose memory this one then gets: kept addresses are stale.
            calls.append(made(case=case, inputs=inputs, asked=asked))
            calls[0].forward()
        calls[0].backward()
    return calls[0].observe()


class LayerRun:
    """A packed sequence through a layer: all micro-sequences forward, then all backward in reverse.

    Args:
        backend: whose layer.
        case: what to run.
        tensors: its own in their places, or those of a batch.
        index: which call of the batch it is.
        kept: where its results are kept.
        watched: whether the K/V buffer is compared step by step, and what is handed back when all is over.
        evaluation: whether it is run without autograd, and forward only; so is every layer without a backward.
    """

    def __init__(
        self,
        backend: Backend,
        case: Case,
        tensors: LayerTensors,
        index: int = 0,
        kept: Kept | None = None,
        *,
        watched: bool = True,
        evaluation: bool = False,
    ) -> None:
        self.backend, self.case, self.tensors, self.watched = backend, case, tensors, watched
        self.x, self.dout = (tensors.of_call(name, index) for name in ("x", "dout"))
        stated = backend.kernel.capabilities_on(self.x.device.type)
        self.conventions = stated.conventions
        self.evaluation = evaluation or not backend.goes_back(self.x.device.type)
        self.observation = Observation(tensors.poison, {})
        self.parts = micro_sequences(case)
        self.kept = kept or Kept()
        self.outputs, self.input_gradients = (HandedBack(name, self.kept, watched=watched) for name in ("out", "dx"))

    def make_layer(self, weights: dict[str, torch.Tensor]) -> Layer:
        """The layer under test."""
        return self.backend.layer(weights, self.case, self.backend.kernel)

    def own(self, part: Span) -> Span:
        """The tokens of a micro-sequence that this layer is handed: all of them."""
        return part

    def slice_of_queries(self, part: Span) -> Span:
        """The tokens of a micro-sequence that this layer attends from: all of them."""
        return part

    def forward(self) -> None:
        # Tensors of its own, in memory that is shared: gradients that autograd leaves on them are this layer's.
        self.layer = self.make_layer({name: weight.detach() for name, weight in self.tensors.weights.items()})
        self.buffer = Watch(("k", "v"), self.layer.key_value, watched=self.watched)
        self.buffer_gradient = Watch(("dk", "dv"), self.key_value_gradients, watched=self.watched)
        for part in self.parts:
            step = f"forward of {list(part)}"
            with without_autograd(self.case) if self.evaluation else contextlib.nullcontext():
                out = self.layer.forward(self.x[slice(*self.own(part))], *part)
            self.outputs.add(step, out, part)
            if self.watched:
                self.observation.strays += self.buffer.compare(step, *part)
                self.observation.strays += self.buffer_gradient.compare(step, 0, 0)

    def key_value_gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The live gradient buffer; none without a backward."""
        return None if self.evaluation else self.layer.key_value_gradients()

    def backward(self) -> None:
        if self.evaluation:
            return
        self.before_own = GradientRows(self.layer.key_value_gradients)
        for part in reversed(self.parts):
            step = f"backward of {list(part)}"
            if self.conventions.gradient_rows == "consumed":
                self.before_own.take(*part)
            self.input_gradients.add(step, self.layer.backward(self.dout[slice(*self.own(part))]), part)
            if self.watched:
                extent = active_extent(self.case.packed_lengths, self.slice_of_queries(part))
                self.observation.strays += self.buffer_gradient.compare(step, *extent)
                self.observation.strays += self.buffer.compare(step, 0, 0)

    def results(self) -> dict[str, torch.Tensor]:
        """What the layer gave back, on the device; buffers as far as it shows them."""
        layer, consumed = self.layer, self.conventions.gradient_rows == "consumed"
        found = {"out": self.outputs.joined()}
        live: dict[str, torch.Tensor] = {}
        if not self.evaluation:
            found["dx"] = self.input_gradients.joined(last_first=True)
        gradient_rows = self.before_own.values() if consumed and not self.evaluation else self.key_value_gradients()
        for names, tensors in ((("k", "v"), layer.key_value()), (("dk", "dv"), gradient_rows)):
            if tensors is not None:
                live |= {name: x.detach()[: self.case.tokens] for name, x in zip(names, tensors, strict=True)}
        if not self.evaluation:
            # A parameter that nothing ever reached may have None: that result is missing. Others may be live.
            gradients = layer.parameter_gradients().items()
            live |= {f"d_{name}": got.detach() for name, got in gradients if isinstance(got, torch.Tensor)}
        found |= self.kept.whole(live)
        without_padding(found, self.case, self.conventions)
        return found

    def observe(self) -> Observation:
        """What the layer gave back, on the CPU."""
        observation = self.observation
        observation.results |= self.results()
        self.strays()
        # A user's own layer need not say which implementation ran.
        observation.paths = getattr(self.layer, "paths", frozenset)()
        observation.changed = self.changed()
        return observation.on_cpu()

    def flags(self) -> list[torch.Tensor]:
        """Looks for the last time; flags one of which is set where ``strays`` has some of a GPU's memory to tell."""
        handed_back = self.outputs, self.input_gradients
        for each in handed_back:
            each.look()
        return [flag for each in (self.buffer, self.buffer_gradient, *handed_back) for flag in each.flags()]

    def strays(self) -> list[Stray]:
        """Rows that changed where nothing may be written, in the order of the steps; asked once, when all is over."""
        found = self.observation.strays
        found += self.buffer.settle() + self.buffer_gradient.settle()
        found += self.outputs.changed() + self.input_gradients.changed()
        return found

    def changed(self) -> list[str]:
        """Inputs, weights or guard margins whose bits changed, in words."""
        return self.tensors.changes()


LayerRuns = Callable[[Backend, Case, LayerTensors], LayerRun]
"""Makes a run of a layer."""


def run_layer(
    backend: Backend,
    case: Case,
    inputs: LayerInputs,
    poison: str,
    device: torch.device,
    interfering: Case | None = None,
    how: LayerRuns | None = None,
) -> Observation:
    """A packed sequence through the backend's layer on ``device``, around an interfering call's where one is given.

    Args:
        backend: whose layer.
        case: what to run.
        inputs: its tensors.
        poison: contents of unwritten memory.
        device: where.
        interfering: what runs around it.
        how: makes the run; None for ``LayerRun``.
    """
    run = (how or LayerRun)(backend, case, LayerTensors.of_one(case, inputs, device, poison))
    # Drawn once, and with nobody filling the memory that it takes.
    others = layer_inputs(interfering, "cpu") if interfering is not None else inputs
    with poisoned(poison, device, free_blocks=backend.kernel.compiled), refusing_cleanly([run]):
        for _ in around(
            interfering,
            lambda other: LayerRun(backend, other, LayerTensors.of_one(other, others, device, poison), watched=False),
            crossed=crossing(case),
        ):
            run.forward()
        run.backward()
    return run.observe()
