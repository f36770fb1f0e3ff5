"""Simulated roundings: how far a chain of correct operations strays, element by element.

The layer's budget is not a formula but an experiment on the reference itself. Every tensor carries a leading dimension
of samples; sample 0 is exact, and wherever a correct layer rounds, the others receive that rounding's own noise. The
spread of the samples at the end is the propagated error, through projections, norms, rotary and attention alike.
"""

from __future__ import annotations

import torch

from reference.budget import rounding_variance
from reference.profile import ACCUMULATION

SAMPLES = 8
"""Enough to pass a clean case; its own noise can mimic a 10 sigma error about once in 1e5 independent elements."""

CONFIRMING_SAMPLES = 64
"""For a second look at a suspect: Student's t with 64 degrees of freedom exceeds 10 with probability 1e-14."""


class Arithmetic:
    """Rounding points of one reference evaluation.

    Args:
        dtype: storage dtype.
        device: where the reference runs.
        seed: of the simulated noise; budgets depend on it, answers do not.
        samples: how many noisy evaluations accompany the exact one.
    """

    def __init__(self, dtype: str, device: torch.device | str, seed: int, samples: int = SAMPLES) -> None:
        self._dtype, self._samples = dtype, samples
        self._generator = torch.Generator(device).manual_seed(seed)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor that every sample has alike, ``[...]`` to ``[1, ...]`` float64."""
        return x.double()[None]

    def _noise(self, x: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        noise = torch.randn((self._samples + 1, *x.shape[1:]), dtype=x.dtype, device=x.device, generator=self._generator)
        noise[0] = 0
        return x + noise * variance.sqrt()

    def store(self, x: torch.Tensor) -> torch.Tensor:
        """Rounds to the storage dtype."""
        return self._noise(x, rounding_variance(x[0], self._dtype))

    def accumulate(self, x: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """The error of a float32 sum whose terms' squares add up to ``squares`` (without samples)."""
        return self._noise(x, ACCUMULATION**2 * squares)

    def perturb(self, x: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Noise of a given variance (without samples)."""
        return self._noise(x, variance)

    def variance(self, x: torch.Tensor, *, stored: bool) -> torch.Tensor:
        """Error variance per element of a result ``[samples, rows, ...]`` or ``[samples, channels]``, not yet rounded.

        A few samples know an element's variance poorly and a row's well, so each is drawn half-way to the mean of its
        row (of all channels, where there are no rows). The last rounding, if the result is stored in the dtype, is known exactly.
        """
        if len(x) == 1:
            propagated = torch.zeros_like(x[0])
        else:
            propagated = (x[1:] - x[:1]).square().mean(0)
            within_row = tuple(range(min(1, propagated.dim() - 1), propagated.dim()))
            propagated = (propagated + propagated.mean(within_row, keepdim=True)) / 2
        return propagated + rounding_variance(x[0], self._dtype if stored else "fp32")
