"""A plain per-case test as attention suites are written, to be measured beside the two modes (evaluation/bench.py).

One parametrised case a test: four documents, random tensors, a float32 reference by autograd, allclose. Run by pytest
with the backend, the device and the file for the result in the environment.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata

DOCUMENTS = 4
NAME, DEVICE, RESULT, CASES = (
    os.environ.get(f"ATTN_FUZZ_PLAIN_{x}", "") for x in ("BACKEND", "DEVICE", "FILE", "CASES")
)


@pytest.fixture(scope="module", autouse=True)
def _clock() -> Iterator[None]:
    """Seconds from before the first test to behind the last; the first, which warms up, is left out."""
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    yield
    Path(RESULT).write_text(json.dumps({"cases": len(_ends) - 1, "seconds": _ends[-1] - _ends[0]}))


_ends: list[float] = []


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], keys: list[int], scale: float
) -> torch.Tensor:
    """Causal attention of each document by itself in float32."""
    outs, begin, key_begin = [], 0, 0
    group = q.shape[1] // k.shape[1]
    for length, count in zip(lengths, keys, strict=True):
        qd = q[begin : begin + length].float().transpose(0, 1)
        kd, vd = (x[key_begin : key_begin + count].float().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        seen = torch.ones(length, count, dtype=torch.bool, device=q.device).tril(count - length)
        weights = (scale * (qd @ kd.transpose(-1, -2))).masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append((weights @ vd).transpose(0, 1))
        begin, key_begin = begin + length, key_begin + count
    return torch.cat(outs)


@pytest.mark.parametrize("seed", range(int(CASES or 1)))
@pytest.mark.parametrize("heads", [(4, 2)])
@pytest.mark.parametrize("head_dim", [64])
def test_varlen(seed: int, heads: tuple[int, int], head_dim: int) -> None:
    """Forward and backward against the float32 reference."""
    torch.manual_seed(seed)
    device = torch.device(DEVICE)
    dtype = torch.bfloat16
    lengths = torch.randint(1, 65, (DOCUMENTS,)).tolist()
    keys = [int(torch.randint(length, 129, ())) for length in lengths]
    q = torch.randn(sum(lengths), heads[0], head_dim, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(sum(keys), heads[1], head_dim, device=device, dtype=dtype, requires_grad=True) for _ in "kv")
    metadata = VarlenMetadata(lengths_q=tuple(lengths), lengths_k=tuple(keys), device=device)
    options = AttentionOptions(scale=head_dim**-0.5, causal=True)
    out = registry.load(NAME).kernel.attend(q, k, v, metadata, options).out
    wanted = reference(q, k, v, lengths, keys, options.scale)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    expected = torch.autograd.grad(wanted, (q, k, v), dout.float())
    assert torch.allclose(out.float(), wanted, atol=3e-2, rtol=3e-2)
    for got, want in zip(gradients, expected, strict=True):
        assert torch.allclose(got.float(), want.float(), atol=2e-1, rtol=5e-2)
    # As the modes are timed (timing.py): a busy machine is to measure as an idle one does.
    _ends.append(time.process_time() if DEVICE == "cpu" else time.perf_counter())
