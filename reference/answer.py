"""The answer to a kernel case: every result with its budget, token-major, each document computed on its own."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch

from reference import attention, budget
from reference.case import Case
from reference.layout import call_segments
from reference.profile import Profile
from reference.values import draw


@dataclasses.dataclass(frozen=True)
class Expected:
    """One result tensor: what it should be and how far correct arithmetic strays."""

    value: torch.Tensor
    """float64."""
    variance: torch.Tensor
    """float64, same shape; 0 demands equality."""
    degrees: torch.Tensor | None = None
    """Independent errors of each row, ``value.shape[:-1]`` (budget.py); None where nobody has counted them."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors of a kernel case, in its dtype, contiguous."""

    q: torch.Tensor
    """``[tokens_q, heads, head_dim]``"""
    k: torch.Tensor
    """``[tokens_k, kv_heads, head_dim]``"""
    v: torch.Tensor
    dout: torch.Tensor
    """as ``q``"""


SHARED_DIMENSIONS: Final = {"k": 1, "v": 1, "dout": 0}
"""With memory ``broadcast`` K/V repeat over heads, and the output gradient over rows, as that of a sum does."""


def kernel_inputs(case: Case, device: torch.device | str) -> Inputs:
    """The tensors of a kernel case."""
    q = draw(case, "q", case.heads, case.head_dim, device)
    k, v = (draw(case, name, case.kv_heads, case.head_dim, device, keys=True) for name in ("k", "v"))
    dout = draw(case, "dout", case.heads, case.head_dim, device)
    if case.memory == "broadcast":
        shared = {"k": k, "v": v, "dout": dout}
        k, v, dout = (x.narrow(SHARED_DIMENSIONS[name], 0, 1).expand_as(x) for name, x in shared.items())
    return Inputs(q, k, v, dout)


KERNEL_TENSORS = ("out", "lse", "dq", "dk", "dv")


def kernel_answer(case: Case, inputs: Inputs, profile: Profile) -> dict[str, Expected]:
    """Expected ``out``, ``lse`` (``[tokens_q, heads]``), ``dq``, ``dk`` and ``dv`` of a kernel case.

    Args:
        case: a kernel case.
        inputs: its tensors.
        profile: the roundings of the backend under test.
    """
    group = case.heads // case.kv_heads
    q, k, v, dout = (x.double().transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    values = {"out": torch.zeros_like(q), "lse": q.new_full(q.shape[:2], -torch.inf), "dq": torch.zeros_like(q)}
    values |= {"dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    variances = {name: torch.zeros_like(value) for name, value in values.items()}
    degrees = {name: torch.ones_like(values[name][..., 0]) for name in KERNEL_TENSORS if name != "lse"}
    for segment in call_segments(case):
        rows, keys = slice(*segment.queries), slice(*segment.keys)
        qd, doutd = q[:, rows], dout[:, rows]
        kd, vd = (attention.expand_heads(k[:, keys], group), attention.expand_heads(v[:, keys], group))
        mask = attention.allowed_keys(segment.queries.length, segment.keys.length, case.effective_window, q.device)
        result = attention.forward(qd, kd, vd, mask, case.softmax_scale, case.softcap)
        grads = attention.backward(qd, kd, vd, doutd, case.softmax_scale, result)
        spread = budget.attention_variances(
            qd,
            kd,
            vd,
            doutd,
            result,
            scale=case.softmax_scale,
            softcap=case.softcap,
            group=group,
            dtype=case.dtype,
            profile=profile,
        )
        document = {
            "out": result.out,
            "lse": result.lse,
            "dq": grads.dq,
            "dk": attention.sum_groups(grads.dk, group),
            "dv": attention.sum_groups(grads.dv, group),
        }
        for name, value in document.items():
            place = keys if name in ("dk", "dv") else rows
            values[name][:, place] = value
            variances[name][:, place] = getattr(spread, name)
            if name in degrees:
                degrees[name][:, place] = spread.degrees[name]
    return {
        name: Expected(
            values[name].transpose(0, 1).contiguous(),
            variances[name].transpose(0, 1).contiguous(),
            degrees[name].transpose(0, 1) if name in degrees else None,
        )
        for name in KERNEL_TENSORS
    }
