"""Numbers of the host on a device, for which nobody waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def transferred(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Numbers, or rows of them, as a tensor on a device.

    ``torch.tensor(numbers, device=device)`` would wait until a GPU has done all that it was told before, which other
    processes may keep busy.
    """
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
