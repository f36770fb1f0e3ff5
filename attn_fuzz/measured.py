"""What a backend does where nobody has stated it: one small call tells.

Both answers decide what a kernel from outside is asked, so that it is neither accused of what its kind cannot do, nor
spared what it can: a kernel that multiplies by an explicit mask mixes NaN of any document into all others (0 * NaN),
and one that builds its output document by document has no rows behind the last one.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from attn_fuzz.execute import KernelCall
from backends.registry import Backend
from reference.answer import Inputs, kernel_inputs
from reference.case import Case

_LENGTHS = (5, 150, 3)
"""No tile of queries of the last document can touch keys of the first."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The answers."""

    capacity: bool
    """Takes rows behind the last document."""
    isolates_nonfinite: bool
    """NaN in the first document does not reach the last."""


def _call(backend: Backend, case: Case, inputs: Inputs, device: torch.device) -> KernelCall | None:
    call = KernelCall(backend, case, inputs, "finite", device)
    try:
        call.forward()
        call.backward()
    except Exception:
        return None
    return call


@functools.lru_cache(maxsize=64)
def measured(backend: Backend, device: str) -> Measured:
    """Statements where there are any, measurements otherwise."""
    where = torch.device(device)
    stated = backend.kernel.capabilities_on(where.type)
    capacity, isolates = stated.capacity, stated.isolates_nonfinite
    if "kernel" not in backend.levels:
        # A layer cannot be asked in one call; NaN is then kept out of its documents.
        return Measured(bool(capacity), bool(isolates))
    head_dim = stated.head_dim_multiple * max(1, 16 // stated.head_dim_multiple)
    plain = Case(
        level="kernel",
        lengths=_LENGTHS,
        dtype=stated.dtypes[0],
        head_dim=min(head_dim, stated.max_head_dim),
        causal=stated.causal,
        memory="contiguous",
    )
    if capacity is None:
        wide = plain.replace(capacity=3)
        call = _call(backend, wide, kernel_inputs(wide, "cpu"), where)
        capacity = (
            call is not None and call.attended is not None and call.attended.out.shape == call.placed["q"].tensor.shape
        )
    if isolates is None:
        inputs = kernel_inputs(plain, "cpu")
        tensors = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "dout")}
        for tensor in tensors.values():
            tensor[: _LENGTHS[0]] = torch.nan
        call = _call(backend, plain, Inputs(**tensors), where)
        last = slice(sum(_LENGTHS[:2]), None)
        isolates = (
            call is not None
            and call.attended is not None
            and all(bool(x[last].isfinite().all()) for x in (call.attended.out, *call.gradients.values()))
        )
    return Measured(capacity, isolates)
