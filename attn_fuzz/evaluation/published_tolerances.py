"""Pass rules that published test suites use, for comparison only: what would they have said of the same runs?

They judge whole tensors, on memory as it comes, without interfering calls or probes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

Rule = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], bool]
"""(name of the result, result, reference, PyTorch's own result in the same dtype) -> passes."""


def _backward(name: str) -> bool:
    return name.startswith("d")


def multiple_of_pytorch(name: str, got: torch.Tensor, reference: torch.Tensor, pytorch: torch.Tensor) -> bool:
    """flash-attention: the largest error is at most 2 times (gradients: 3 times) that of PyTorch in the same dtype."""
    factor = 3.0 if _backward(name) else 2.0
    allowed = factor * (pytorch - reference).abs().max()
    return bool((got - reference).abs().max() <= allowed + 1e-5)


def fixed(name: str, got: torch.Tensor, reference: torch.Tensor, pytorch: torch.Tensor) -> bool:
    """allclose with atol = rtol = 1e-2."""
    return bool(torch.allclose(got, reference, rtol=1e-2, atol=1e-2))


def relative_rms(name: str, got: torch.Tensor, reference: torch.Tensor, pytorch: torch.Tensor) -> bool:
    """The error's RMS is at most 5e-3 (gradients: 1.5e-2) of the reference's."""
    limit = 1.5e-2 if _backward(name) else 5e-3
    return bool((got - reference).square().mean().sqrt() <= limit * reference.square().mean().sqrt() + 1e-8)


RULES: Final[dict[str, Rule]] = {"2x/3x": multiple_of_pytorch, "1e-2": fixed, "rms": relative_rms}


def failing(
    results: dict[str, torch.Tensor], references: dict[str, torch.Tensor], pytorch: dict[str, torch.Tensor]
) -> set[str]:
    """Names of the rules that some result fails. The LSE is left out, as in most suites.

    Args:
        results: of the backend under test, by name.
        references: float64.
        pytorch: PyTorch's own in the case's dtype; results that it lacks are left out.
    """
    failed: set[str] = set()
    for name, reference in references.items():
        got, own = results.get(name), pytorch.get(name)
        if got is None or own is None or name == "lse" or not got.numel() or got.shape != reference.shape:
            continue
        failed |= {rule for rule, passes in RULES.items() if not passes(name, got.double(), reference, own.double())}
    return failed
