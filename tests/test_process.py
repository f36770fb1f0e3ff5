"""What every process that runs cases is set up with."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from attn_fuzz.execution.process import interrupt_once, lacks_memory

_PRODUCT = """
import sys
sys.path[:0] = {path!r}
import torch
from attn_fuzz.execution.process import set_up_process

set_up_process("cpu")
buffer = torch.full((17, 88), torch.nan, dtype=torch.bfloat16)
buffer[:, :80] = 1
print(bool((buffer[:, :80] @ torch.ones(4, 80, dtype=torch.bfloat16).T).isfinite().all()))
"""


@pytest.mark.slow
def test_products_read_their_rows_and_no_further() -> None:
    """In a fresh process: the library reads its settings at the first product (docs/oracle.md)."""
    code = _PRODUCT.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_signal_that_comes_twice_interrupts_once() -> None:
    before = signal.signal(signal.SIGTERM, interrupt_once)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("ran out of memory"), False),
    ],
)
def test_what_is_a_lack_of_memory(error: Exception, lacking: bool) -> None:
    assert lacks_memory(error) is lacking
