"""Devices that tests run on, and backends of which an edit is checked on some only."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])]
on_every_device = pytest.mark.parametrize("device", DEVICES)

FORCED = ("sdpa_dense_", "sdpa_nested_")
"""Adapters that are another one's with one of torch's kernels forced."""


def but_forced_slow(names: Iterable[str]) -> list[object]:
    """Backends as parameters of a test, which is slow on those that force a kernel."""
    return [pytest.param(name, marks=pytest.mark.slow) if name.startswith(FORCED) else name for name in names]
