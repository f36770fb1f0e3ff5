"""Simulated roundings: how far a chain of correct operations strays, element by element.

The layer's budget is not a formula but an experiment on the reference itself. Every tensor carries a leading dimension
of samples; sample 0 is exact, and wherever a correct layer rounds, the others receive that rounding's own noise. The
spread of the samples at the end is the propagated error, through projections, norms, rotary and attention alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from attn_fuzz.reference.profile import ACCUMULATION, ALIKE
from attn_fuzz.reference.rounding import rounding_variance

SAMPLES = 8
"""Enough to pass a clean case; its own noise can mimic a 10 sigma error about once in 1e5 independent elements."""

CONFIRMING_SAMPLES = 64
"""For a second look at a candidate: Student's t with 64 degrees of freedom exceeds 10 with probability 1e-14."""


_BANK = {"cpu": 1 << 21, "cuda": 1 << 23}
"""Normal numbers that are kept, of which a GPU's batches take more at a time: 16 MiB, or 64."""

_APART = 4099
"""How far apart samples begin where all of them together take more than there are: no two meet the same number in an
element, and one's are another's of some other row."""


@functools.lru_cache(maxsize=4)
def _bank(device: torch.device) -> torch.Tensor:
    """Standard normals, drawn once per device: drawing them anew would cost more than the reference itself."""
    generator = torch.Generator("cpu").manual_seed(0)
    count = _BANK.get(device.type, _BANK["cuda"])
    return torch.randn(count, dtype=torch.float64, generator=generator).to(device)


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
        self._bank = _bank(torch.device(device))
        self._state = seed
        self._common: torch.Tensor | None = None

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor that every sample has alike, ``[...]`` to ``[1, ...]`` float64."""
        return x.double()[None]

    def _normals(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normals for every sample of such a shape, from where nothing else in the bank is likely to start."""
        # Knuth's MMIX generator; its high bits choose the place.
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        each, kept = math.prod(shape), len(self._bank)
        apart = each if self._samples * each <= kept else _APART
        count = each + (self._samples - 1) * apart
        bank = self._bank if count <= kept else self._bank.repeat(math.ceil(count / kept))
        start = (self._state >> 20) % (len(bank) - count + 1)
        return bank.as_strided((self._samples, each), (apart, 1), start).view(self._samples, *shape)

    def _beside(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a tensor for all samples of which the exact one is there, what the others are made of)."""
        made = x.new_empty(1 + self._samples, *x.shape[1:])
        made[0] = x[0]
        return made, x[1:] if x.shape[0] > 1 else x

    def _noisy(self, x: torch.Tensor, errors: torch.Tensor, normals: Sequence[int], *, fresh: bool) -> torch.Tensor:
        """``x`` whose samples have ``errors`` times normal numbers of such a shape; ``fresh`` may be overwritten."""
        if not self._samples:
            return x
        if fresh and x.shape[0] > 1:
            x[1:].addcmul_(self._normals(normals), errors)
            return x
        noisy, samples = self._beside(x)
        torch.addcmul(samples, self._normals(normals), errors, out=noisy[1:])
        return noisy

    def rounding(self, x: torch.Tensor) -> torch.Tensor:
        """The error variance of storing a tensor in the storage dtype (without samples)."""
        return rounding_variance(x[0], self._dtype)

    def store(self, x: torch.Tensor) -> torch.Tensor:
        """Rounds to the storage dtype."""
        return self.perturb(x, self.rounding(x))

    def store_sum_(self, x: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """A float32 sum whose terms' squares add up to ``squares`` (without samples), stored; as ``perturb_``."""
        return self.perturb_(x, ACCUMULATION**2 * squares + self.rounding(x))

    def accumulate_(self, x: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """The error of a float32 sum whose terms' squares add up to ``squares`` (without samples); as ``perturb_``."""
        return self.perturb_(x, ACCUMULATION**2 * squares)

    def perturb(self, x: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Noise of a given variance (without samples)."""
        return self._noisy(x, variance.sqrt(), x.shape[1:], fresh=False)

    def perturb_(self, x: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """The same, of a tensor that nothing else is made of: it is overwritten where it has samples."""
        return self._noisy(x, variance.sqrt(), x.shape[1:], fresh=True)

    def agree(self, x: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
        """Noise that a row's elements have together: each row of ``errors`` (without samples) times a normal number."""
        return self._noisy(x, errors, (*x.shape[1:-1], 1), fresh=False)

    def agree_(self, x: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
        """The same, of a tensor that nothing else is made of."""
        return self._noisy(x, errors, (*x.shape[1:-1], 1), fresh=True)

    def shrink(self, x: torch.Tensor, most: float) -> torch.Tensor:
        """Noise that everything has together: all of ``x`` times 1 plus ``ALIKE`` of an error that agrees everywhere.

        What cuts operands off does so wherever it multiplies: each sample has one normal number for all such places.

        Args:
            x: any tensor.
            most: how much of itself ``x`` may lose at most.
        """
        if not self._samples or not most:
            return x
        if self._common is None:
            self._common = self._normals((1,))[:, 0]
        factors = 1 + ALIKE**0.5 * most * self._common
        noisy, samples = self._beside(x)
        torch.mul(samples, factors.view(-1, *(1,) * (x.dim() - 1)), out=noisy[1:])
        return noisy

    def variance(self, x: torch.Tensor, *, stored: bool) -> torch.Tensor:
        """Error variance per element of a result ``[samples, rows, ...]`` or ``[samples, channels]``, not yet rounded.

        A few samples know an element's variance poorly and a row's well, so each is drawn half-way to the mean of its
        row (of all channels, where there are no rows). The last rounding, to the dtype if the result is stored in it,
        is known exactly.
        """
        return self.variance_of(x[0], spread(x[1:] - x[:1]), stored=stored)

    def variance_of(self, value: torch.Tensor, spread: torch.Tensor, *, stored: bool) -> torch.Tensor:
        """The same of a value ``[rows, ...]`` and the ``spread`` of its samples."""
        within_row = tuple(range(min(1, spread.dim() - 1), spread.dim()))
        propagated = (spread + spread.mean(within_row, keepdim=True)) / 2
        return propagated + rounding_variance(value, self._dtype if stored else "fp32")


def spread(deviations: torch.Tensor) -> torch.Tensor:
    """Mean square ``[...]`` of the samples' deviations from the exact one ``[samples, ...]``; 0 of no samples."""
    return deviations.square_().mean(0) if len(deviations) else deviations.sum(0)
