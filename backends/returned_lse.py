"""The LSE among what a user's kernel returned: declared, thrown away, or told by its looks."""

from __future__ import annotations

import math

import torch

from attn_fuzz.backends.output import MisshapenResult


def lse_of(returned: object, q: torch.Tensor, declared: bool | None) -> torch.Tensor | None:
    """The LSE ``[heads, rows]``, as differentiable as it came, or None where there is none to be judged.

    Args:
        returned: by the kernel.
        q: ``[rows, heads, head_dim]``, the queries that it was given.
        declared: True: it is the second of a tuple, ``[heads, rows]``; False: what comes there is something else; None:
            nothing is known of it.

    Raises:
        MisshapenResult: where it is declared, and not there.
    """
    second = returned[1] if isinstance(returned, tuple) and len(returned) > 1 else None
    if declared is None:
        return _by_looks(second, q)
    return _declared(second, q) if declared else None


def _declared(second: object, q: torch.Tensor) -> torch.Tensor:
    wanted = (q.shape[1], q.shape[0])
    if isinstance(second, torch.Tensor):
        if tuple(second.shape) == wanted and second.device == q.device:
            return second
        what = f"a tensor {list(second.shape)} on {second.device}"
    else:
        what = type(second).__name__
    raise MisshapenResult(
        f"the kernel declares an LSE, which should be a tensor {list(wanted)} on {q.device}, but is {what}"
    )


def _by_looks(second: object, q: torch.Tensor) -> torch.Tensor | None:
    """Float32 or wider, a number for each row and head, in an order that its shape tells; -inf or inf for blind rows.

    Of a kernel that has declared nothing, half precision, padding and square shapes leave open what it meant.
    """
    rows, heads = q.shape[:2]
    if not isinstance(second, torch.Tensor) or second.dtype not in (torch.float32, torch.float64):
        return None
    if second.device != q.device or rows == heads or tuple(second.shape) not in ((heads, rows), (rows, heads)):
        return None
    lse = (second if second.shape[0] == heads else second.T).float()
    # Who returns what FlashAttention does says of a row without a key that its LSE is +inf.
    return torch.where(lse == math.inf, -math.inf, lse)
