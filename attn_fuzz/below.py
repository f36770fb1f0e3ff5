"""Known faults below a user's kernel: of torch's own attention, which many kernels call on CUDA.

A user's kernel that is built on such an operator fails where the operator does. That is worth knowing, and nothing that
its author can mend: it is listed as a limit, and whoever wants it as a finding says ``--strict``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from reference.case import Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultBelow:
    """A fault of an operator that kernels are built on."""

    id: str
    operators: tuple[str, ...]
    """Beginnings of the names of operators, one of which a kernel runs."""
    device: str
    covers: Callable[[Case], bool]
    about: str
    reference: str
    """Where it is reported, or on what it was seen."""


_SCALED: Final = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
)

BELOW: Final = (
    FaultBelow(
        id="sdpa-16-byte-rows",
        operators=_SCALED,
        device="cuda",
        covers=lambda case: case.memory == "misaligned",
        about="torch's fused attention on CUDA reads rows in blocks of 16 bytes: where q, k or v does not begin at a "
        "multiple of them it ends in a misaligned address, or computes NaN without a word.",
        reference="pytorch#194818; torch 2.11.0+cu130 on an H200, 2026-11-28",
    ),
)


def fault_below(case: Case, device: str, operators: Sequence[str]) -> FaultBelow | None:
    """A known fault that a case runs into, if a kernel that runs these operators is built on what has it.

    Args:
        case: what failed.
        device: ``cpu`` or ``cuda``.
        operators: names of torch's operators that the kernel ran on a plain case.
    """
    for fault in BELOW:
        built_on = any(name.startswith(fault.operators) for name in operators)
        if fault.device == device and built_on and fault.covers(case):
            return fault
    return None
