"""torch's scaled_dot_product_attention with one of its kernels forced."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Final

from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.reference.profile import Profile

BACKENDS: Final = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

MOST_MASKED: Final = 1 << 32
"""Entries of a mask beyond which torch's memory-efficient kernel reads the wrong ones (pytorch#187227)."""

CPU_EXP_ERROR: Final = 20 * 2.0**-23
"""torch's flash attention for CPUs uses a vectorised exponential good to 20 units in the last place."""


def as_flash_does(profile: Profile, device: str) -> Profile:
    """A profile of what may be torch's flash attention, which on CPUs is another than on GPUs."""
    return dataclasses.replace(profile, stores_partial_sums=device == "cpu")


def as_softmax_does(profile: Profile, device: str) -> Profile:
    """A profile of what takes torch's softmax, which on CPUs has the exponential of its flash attention there."""
    return dataclasses.replace(profile, exp_error=CPU_EXP_ERROR) if device == "cpu" else profile


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """Lets torch take one kernel and no other.

    Raises:
        UnsupportedCase: when that kernel does not take what it is given.
    """
    try:
        with sdpa_kernel(BACKENDS[name]):
            yield
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise UnsupportedCase(f"torch's {name} kernel does not take these tensors") from error
        raise
