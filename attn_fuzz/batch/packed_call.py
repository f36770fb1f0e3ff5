"""One wide call of one backend: poisoned memory, forward, backward, everything left on the device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.execution.observation import in_our_convention
from attn_fuzz.execution.poison import filler, poisoned
from attn_fuzz.reference.answer import Inputs, kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.memory import Placed, bits, layout_of, place


@dataclasses.dataclass(frozen=True)
class Call:
    """A case's tensors in their places, ready for any number of backends."""

    case: Case
    device: torch.device
    placed: dict[str, Placed]
    """``q``, ``k``, ``v`` and ``dout``, between guard margins."""
    metadata: VarlenMetadata

    @classmethod
    def of(cls, case: Case, device: torch.device, inputs: Inputs | None = None) -> Call:
        """The call that a kernel case describes.

        Args:
            case: without ``capacity``.
            device: where it will run.
            inputs: the case's tensors on the device; drawn when not given.
        """
        drawn = kernel_inputs(case, device) if inputs is None else inputs
        names = ("q", "k", "v", "dout")
        placed = {name: place(getattr(drawn, name), layout_of(name, case.memory), filler("nan")) for name in names}
        metadata = VarlenMetadata(lengths_q=case.packed_lengths, lengths_k=case.packed_key_lengths, device=device)
        return cls(case, device, placed, metadata)

    @property
    def inputs(self) -> Inputs:
        """The tensors as they lie there now."""
        return Inputs(*(self.placed[name].tensor for name in ("q", "k", "v", "dout")))

    def changed(self) -> torch.Tensor:
        """Whether any input or guard margin has lost its bits: bool scalar on the device."""
        return torch.stack([(bits(item.storage) != item.before).any() for item in self.placed.values()]).any()


@contextlib.contextmanager
def _poisoned_results(call: Call, poison: str, *, compiled: bool) -> Iterator[None]:
    """Whatever the backend allocates for its results and leaves unwritten holds a poison."""
    if call.device.type != "cuda":
        with poisoned(poison, call.device, compiled=compiled):
            yield
        return
    # Filled without a kernel of ours before every allocation: the caching allocator hands these blocks out again.
    fill, tensors = filler(poison), call.placed.values()
    blocks = [torch.full_like(item.tensor, fill, memory_format=torch.contiguous_format) for item in tensors]
    blocks.append(torch.full(call.inputs.q.shape[:2], fill, dtype=torch.float32, device=call.device))
    del blocks
    yield


def run(call: Call, backend: Backend, poison: str = "nan") -> dict[str, torch.Tensor]:
    """Forward and backward of a backend: its results on the device, token-major, ``lse [tokens_q, heads]``.

    Nothing here waits for the device.
    """
    q, k, v = leaves = [call.placed[name].tensor.detach().requires_grad_() for name in ("q", "k", "v")]
    with _poisoned_results(call, poison, compiled=backend.kernel.compiled):
        attended = backend.kernel.attend(q, k, v, call.metadata, AttentionOptions.of(call.case))
        gradients = torch.autograd.grad(attended.out, leaves, call.placed["dout"].tensor)
    results = {"out": attended.out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    if attended.lse is not None:
        results["lse"] = in_our_convention(attended.lse.detach().T, backend, call.device)
    return results
