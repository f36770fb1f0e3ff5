"""Kernels that misbehave, for a soak: they crash, hang, leak, fill the memory, print, return rubbish, or are wrong.

Each computes what is right, but for what its name says, and that in some of its calls only.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

import torch

Tensor = torch.Tensor
Kernel = Callable[..., Any]

_LEAK: Final = 1 << 18
"""Numbers that a call leaves behind: a megabyte."""

_FILL: Final = 1 << 26
"""Numbers that are asked for again and again: a quarter of a gigabyte."""

_LEAKED: list[Tensor] = []


def _right(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, scale: float | None, causal: bool
) -> Tensor:
    """Attention of one document after another."""
    out = []
    for (qb, qe), (kb, ke) in zip(ends_q.unfold(0, 2, 1).tolist(), ends_k.unfold(0, 2, 1).tolist(), strict=True):
        mask = torch.ones(qe - qb, ke - kb, dtype=torch.bool, device=q.device)
        mask = mask.tril(ke - kb - (qe - qb)) if causal else mask
        group = q.shape[1] // k.shape[1]
        one, keys, values = (x.float().transpose(0, 1) for x in (q[qb:qe], k[kb:ke], v[kb:ke]))
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = one @ keys.mT * (q.shape[2] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        out.append((weights @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(out)


def _kernel(deed: Callable[[Tensor, Tensor], Any]) -> Kernel:
    """A kernel that hands its queries and its right output to a deed, and gives back what that gives."""

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Any:
        return deed(q, _right(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal))

    kernel.capabilities = {"devices": ("cpu", "cuda"), "queries_without_keys": False}  # type: ignore[attr-defined]
    return kernel


def _crash(q: Tensor, out: Tensor) -> Tensor:
    if len(q) % 13 == 5:
        ctypes.string_at(0)
    return out


def _hang(q: Tensor, out: Tensor) -> Tensor:
    if len(q) % 13 == 2:
        threading.Event().wait()
    return out


def _leak(q: Tensor, out: Tensor) -> Tensor:
    _LEAKED.append(torch.ones(_LEAK, device=q.device))
    return out


def _fill(q: Tensor, out: Tensor) -> Tensor:
    taken = []
    while len(q) % 13 == 3:
        taken.append(torch.ones(_FILL, device=q.device))
    return out


def _print(q: Tensor, out: Tensor) -> Tensor:
    sys.stdout.write("a kernel that prints\n" * 20)
    sys.stdout.flush()
    return out


def _rubbish(q: Tensor, out: Tensor) -> Any:
    return [out, None, "an output", out[:-1]][len(q) % 4]


def _wrong(q: Tensor, out: Tensor) -> Tensor:
    return out * 1.5 if q.shape[2] > 32 else out


crashing, hanging, leaking, filling = _kernel(_crash), _kernel(_hang), _kernel(_leak), _kernel(_fill)
printing, rubbish, wrong = _kernel(_print), _kernel(_rubbish), _kernel(_wrong)

MODULE: Final = "attn_fuzz.nights.soak_kernels"
"""Where they are named."""

FOUND: Final = {"crashing": "Crashed", "hanging": "Hung", "rubbish": "MissingResult", "wrong": "WrongOutput"}
"""What some of them must be found to do."""

TOKENS: Final = {"crashing": 5, "hanging": 2, "rubbish": 1, "wrong": 1}
"""Queries of the smallest call in which each of those does it."""

INNOCENT: Final = ("leaking", "filling", "printing")
"""What they do is no wrong answer: of memory that a machine has not, a kernel is not accused."""
