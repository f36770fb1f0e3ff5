"""How one call computes: everything that the error of its results depends on beside its tensors."""

from __future__ import annotations

import dataclasses
import functools

import torch

from attn_fuzz.reference.case import Case
from attn_fuzz.reference.narrow import Narrow
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.rounding import rounding_variance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """Options of a call that move its roundings, and the arithmetic that makes them."""

    scale: float
    """Of the softmax."""
    softcap: float = 0.0
    """0 for none."""
    dtype: str
    """What is stored is stored in."""
    profile: Profile

    @classmethod
    def of(cls, case: Case, profile: Profile) -> Computation:
        """That of a kernel case on a backend with this profile."""
        return cls(scale=case.softmax_scale, softcap=case.softcap, dtype=case.dtype, profile=profile)

    @functools.cached_property
    def narrow(self) -> Narrow | None:
        """Formats narrower than the dtype; None where there are none."""
        return Narrow.of(self.dtype, self.profile)

    @property
    def rounds_p(self) -> bool:
        """Whether P is rounded to the dtype for its products; what stays in float32 is in float32's own dtype, too."""
        return self.profile.rounds_probabilities or self.dtype == "fp32"

    @property
    def rounds_ds(self) -> bool:
        """Whether dS is rounded to the dtype for its products."""
        return self.profile.rounds_ds or self.dtype == "fp32"

    def rvar(self, x: torch.Tensor) -> torch.Tensor:
        """The error variance of storing ``x`` in the dtype."""
        return rounding_variance(x, self.dtype)
