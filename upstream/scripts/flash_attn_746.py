"""Dao-AILab/flash-attention#746: the attention modules take deterministic=True and do not pass it on."""

import inspect
import sys

import torch

try:
    from flash_attn.modules import mha
except ImportError as error:
    print(f"flash_attn.modules.mha is not there: {error}")
    sys.exit(3)

NAMES = [
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_kvpacked_func",
    "flash_attn_varlen_kvpacked_func",
]
passed = {}


def watch(name):
    """Replaces a function that the modules call by one that notes what it is asked for."""
    function = getattr(mha, name)

    def call(*arguments, **options):
        bound = inspect.signature(function).bind(*arguments, **options)
        passed[name] = bound.arguments.get("deterministic", False)
        return function(*arguments, **options)

    setattr(mha, name, call)


for name in NAMES:
    watch(name)
qkv = torch.randn(8, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
sums = torch.tensor([0, 3, 8], dtype=torch.int32, device="cuda")
alone, across = (module(deterministic=True) for module in (mha.FlashSelfAttention, mha.FlashCrossAttention))
alone(qkv[None])
alone(qkv, cu_seqlens=sums, max_seqlen=5)
across(qkv[None, :, 0], qkv[None, :, 1:])
across(qkv[:, 0], qkv[:, 1:], cu_seqlens=sums, max_seqlen=5, cu_seqlens_k=sums, max_seqlen_k=5)
assert set(passed) == set(NAMES), "a module did not come by the function that it used to call"
lost = [name for name in NAMES if passed[name] is not True]
print(f"not passed on to {', '.join(lost)}" if lost else "passed on to all four functions")
sys.exit(bool(lost))
