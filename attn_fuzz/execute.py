"""Runs a case on a backend and records everything that checks look at."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.poison import filler, poisoned
from backends.kernel import AttentionOptions, UnsupportedCase
from backends.layer import Layer
from backends.metadata import VarlenMetadata
from backends.registry import Backend
from reference.answer import Inputs
from reference.case import Case
from reference.layer import LayerInputs
from reference.layout import active_extent, micro_sequences
from reference.memory import bits, place, same_bits


@dataclasses.dataclass(frozen=True)
class Stray:
    """Rows that changed where nothing may be written."""

    tensor: str
    """Buffer ``k`` or ``v``, or gradient buffer ``dk`` or ``dv``."""
    step: str
    """The micro-sequence and the pass, in words."""
    rows: tuple[int, ...]
    value: float
    """One of the values found there."""


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


def require_support(backend: Backend, case: Case, device: torch.device) -> None:
    """Raises UnsupportedCase when the backend declares that it does not take the case."""
    if (reason := backend.refusal(case, device.type)) is not None:
        raise UnsupportedCase(f"{backend.name} does not take {reason}")


def run_kernel(backend: Backend, case: Case, inputs: Inputs, poison: str, device: torch.device) -> Observation:
    """Forward and backward of one varlen call on ``device``; what is observed comes back to the CPU."""
    placed = {
        name: place(getattr(inputs, name).to(device), case.memory if name != "dout" else "contiguous", filler(poison))
        for name in ("q", "k", "v", "dout")
    }
    metadata = VarlenMetadata(lengths_q=case.packed_lengths, lengths_k=case.packed_key_lengths, device=device)
    sums = {"cu_seqlens_q": metadata.cu_seqlens_q, "cu_seqlens_k": metadata.cu_seqlens_k}
    sums_before = {name: tensor.clone() for name, tensor in sums.items()}
    leaves = [placed[name].tensor.detach().requires_grad_() for name in ("q", "k", "v")]
    with poisoned(poison, device):
        attended = backend.kernel.attend(leaves[0], leaves[1], leaves[2], metadata, AttentionOptions.of(case))
        gradients = torch.autograd.grad(attended.out, leaves, placed["dout"].tensor)
    observation = Observation(poison, {"out": attended.out.detach()}, paths=frozenset({attended.path}))
    observation.results |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    if attended.lse is not None:
        lse = attended.lse.detach().T
        convention = backend.kernel.capabilities_on(device.type).lse_of_blind_rows
        # In this project's convention; a finite sentinel stays what it is, and wrong.
        observation.results["lse"] = torch.where(lse == convention, -torch.inf, lse)
    observation.changed += [f"{what} of {name}" for name, item in placed.items() if (what := item.changed())]
    observation.changed += [name for name, tensor in sums.items() if not torch.equal(tensor, sums_before[name])]
    return _on_cpu(observation)


def _on_cpu(observation: Observation) -> Observation:
    observation.results = {name: tensor.cpu() for name, tensor in observation.results.items()}
    return observation


def _strays(name: str, step: str, before: torch.Tensor, after: torch.Tensor, begin: int, end: int) -> list[Stray]:
    """Rows outside ``[begin, end)`` whose bits differ."""
    differs = (bits(before) != bits(after)).flatten(1).any(1)
    differs[begin:end] = False
    rows = differs.nonzero()[:, 0].tolist()
    if not rows:
        return []
    row_differs = bits(before)[rows[0]] != bits(after)[rows[0]]
    return [Stray(name, step, tuple(rows), after[rows[0]][row_differs][0].item())]


class _Watch:
    """Compares a buffer's bits before and after each step."""

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names
        self.before: tuple[torch.Tensor, ...] | None = None

    def compare(
        self, tensors: tuple[torch.Tensor, torch.Tensor] | None, step: str, begin: int, end: int
    ) -> list[Stray]:
        found: list[Stray] = []
        if tensors is not None and self.before is not None:
            for name, before, after in zip(self.names, self.before, tensors, strict=True):
                found += _strays(name, step, before, after, begin, end)
        self.note(tensors)
        return found

    def note(self, tensors: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.before = None if tensors is None else tuple(tensor.detach().clone() for tensor in tensors)


def run_layer(backend: Backend, case: Case, inputs: LayerInputs, poison: str, device: torch.device) -> Observation:
    """All micro-sequences of a packed sequence forward, then all backward in reverse, on ``device``."""
    named = {"x": inputs.x, "dout": inputs.dout, **{f"weight {name}": w for name, w in inputs.weights.items()}}
    placed = {name: place(tensor.to(device), "contiguous", filler(poison)) for name, tensor in named.items()}
    x, dout = placed["x"].tensor, placed["dout"].tensor
    observation = Observation(poison, {})
    parts = micro_sequences(case)
    with poisoned(poison, device):
        weights = {name: placed[f"weight {name}"].tensor for name in inputs.weights}
        layer: Layer = backend.layer(weights, case, backend.kernel)
        outputs, gradients = [], []
        buffer, buffer_gradient = _Watch(("k", "v")), _Watch(("dk", "dv"))
        buffer.note(layer.key_value())
        buffer_gradient.note(layer.key_value_gradients())
        for part in parts:
            outputs.append(layer.forward(x[slice(*part)], *part))
            step = f"forward of {list(part)}"
            observation.strays += buffer.compare(layer.key_value(), step, *part)
            observation.strays += buffer_gradient.compare(layer.key_value_gradients(), step, 0, 0)
        for part in reversed(parts):
            gradients.append(layer.backward(dout[slice(*part)]))
            extent = active_extent(case.packed_lengths, part)
            step = f"backward of {list(part)}"
            observation.strays += buffer_gradient.compare(layer.key_value_gradients(), step, *extent)
            observation.strays += buffer.compare(layer.key_value(), step, 0, 0)
    observation.results |= {"out": torch.cat(outputs).detach(), "dx": torch.cat(gradients[::-1]).detach()}
    for names, tensors in ((("k", "v"), layer.key_value()), (("dk", "dv"), layer.key_value_gradients())):
        if tensors is not None:
            observation.results |= {
                name: tensor.detach()[: case.tokens].clone() for name, tensor in zip(names, tensors, strict=True)
            }
    observation.results |= {f"d_{name}": tensor.detach() for name, tensor in layer.parameter_gradients().items()}
    # A user's own layer need not say which implementation ran.
    observation.paths = getattr(layer, "paths", frozenset)()
    observation.changed += [f"{what} of {name}" for name, item in placed.items() if (what := item.changed())]
    return _on_cpu(observation)


def differing(first: Observation, second: Observation) -> list[str]:
    """Names of results whose bits differ between two runs of the same case."""
    return [
        name
        for name, value in first.results.items()
        if name in second.results and not same_bits(value, second.results[name])
    ]
