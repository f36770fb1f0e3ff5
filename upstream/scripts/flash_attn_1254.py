"""Dao-AILab/flash-attention#1254: FlashAttention 3's varlen backward does not end where documents have no queries."""

import importlib.util
import subprocess
import sys

SECONDS = 90.0


def attend():
    """Says what has ended: start-up, import and forward are no part of the report."""
    import torch
    from flash_attn_interface import flash_attn_varlen_func

    sums_q = torch.tensor([0, 0, 0, 1023], dtype=torch.int32, device="cuda")
    sums_k = torch.tensor([0, 0, 1, 2046], dtype=torch.int32, device="cuda")
    shapes = ((1023, 32, 128), (2046, 32, 128), (2046, 32, 128))
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    for deterministic in (False, True):
        options = {"causal": True, "deterministic": deterministic}
        out = flash_attn_varlen_func(*tensors, sums_q, sums_k, 1023, 2045, **options)
        out = out[0] if isinstance(out, tuple) else out
        torch.cuda.synchronize()
        print(f"forward, deterministic {deterministic}", flush=True)
        torch.autograd.grad(out, tensors, torch.ones_like(out))
        torch.cuda.synchronize()
        print(f"backward, deterministic {deterministic}", flush=True)


if sys.argv[1:] == ["attend"]:
    attend()
    sys.exit(0)
if importlib.util.find_spec("flash_attn_interface") is None:
    print("flash-attn-3 is not installed")
    sys.exit(3)
child = subprocess.Popen(
    [sys.executable, __file__, "attend"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
)
try:
    said, errors = child.communicate(timeout=SECONDS)
except subprocess.TimeoutExpired:
    child.kill()
    ended = child.communicate()[0].splitlines()
    if not ended or not ended[-1].startswith("forward"):
        raise
    print(f"the backward after this did not end in {SECONDS:.0f} s: {ended[-1]}")
    sys.exit(1)
if child.returncode != 0:
    raise RuntimeError(f"ended with {child.returncode} after {said!r}: {errors[-1000:]}")
print("both backward passes ended, with deterministic and without")
