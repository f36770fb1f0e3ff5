"""The answer to a kernel case: every result with its budget, token-major, each document computed on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from attn_fuzz.reference import attention
from attn_fuzz.reference.budget import attention_variances
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.layout import Segment, call_segments
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.sums import sums_of
from attn_fuzz.reference.terms import Document
from attn_fuzz.reference.transfer import transferred
from attn_fuzz.reference.values import draw


@dataclasses.dataclass(frozen=True)
class Expected:
    """One result tensor: what it should be and how far correct arithmetic strays."""

    value: torch.Tensor
    """float64."""
    variance: torch.Tensor
    """float64, same shape; 0 demands equality."""
    degrees: torch.Tensor | None = None
    """Independent errors of each row, ``value.shape[:-1]`` (budget.py); None where they were not counted."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors of a kernel case, in its dtype, contiguous."""

    q: torch.Tensor
    """``[tokens_q, heads, head_dim]``"""
    k: torch.Tensor
    """``[tokens_k, kv_heads, head_dim]``"""
    v: torch.Tensor
    """``[tokens_k, kv_heads, value_dim]``"""
    dout: torch.Tensor
    """``[tokens_q, heads, value_dim]``, as the output"""
    dlse: torch.Tensor | None = None
    """``[tokens_q, heads]`` float32, the LSE's gradient, of numbers that the case's dtype holds; None: it has none"""

    @property
    def named(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x for name, x in fields.items() if x is not None}


SHARED_DIMENSIONS: Final = {"k": 1, "v": 1, "dout": 0}
"""With memory ``broadcast`` K/V repeat over heads, and the output gradient over rows, as that of a sum does."""


def kernel_inputs(case: Case, device: torch.device | str) -> Inputs:
    """The tensors of a kernel case."""
    q = draw(case, "q", case.heads, case.head_dim, device)
    k = draw(case, "k", case.kv_heads, case.head_dim, device, keys=True)
    v = draw(case, "v", case.kv_heads, case.value_dim, device, keys=True)
    dout = draw(case, "dout", case.heads, case.value_dim, device)
    if case.memory == "broadcast":
        shared = {"k": k, "v": v, "dout": dout}
        k, v, dout = (x.narrow(SHARED_DIMENSIONS[name], 0, 1).expand_as(x) for name, x in shared.items())
    dlse = draw(case, "dlse", case.heads, 1, device)[..., 0].float() if case.lse_gradient else None
    return Inputs(q, k, v, dout, dlse)


KERNEL_TENSORS = ("out", "lse", "dq", "dk", "dv")


def alike(segments: Sequence[Segment], scores: int) -> Iterator[list[Segment]]:
    """Documents of the same numbers of queries and keys, to be computed side by side.

    Args:
        segments: of all documents.
        scores: how many (query, key) pairs a group may have, unless a single document has more.
    """
    by_size: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        by_size.setdefault((segment.queries.length, segment.keys.length), []).append(segment)
    for (queries, keys), group in by_size.items():
        count = max(1, scores // max(1, queries * keys))
        for begin in range(0, len(group), count):
            yield group[begin : begin + count]


_PAIRS: Final = 1 << 20
"""(query, key) pairs computed side by side: float64 tensors of that size, times heads, are what is kept at a time."""


def kernel_answer(case: Case, inputs: Inputs, profile: Profile, pairs: int = _PAIRS) -> dict[str, Expected]:
    """Expected ``out``, ``lse`` (``[tokens_q, heads]``), ``dq``, ``dk`` and ``dv`` of a kernel case.

    Every document is computed on its own; those of one size lie side by side in a leading dimension.

    Args:
        case: a kernel case.
        inputs: its tensors.
        profile: the roundings of the backend under test.
        pairs: (query, key) pairs computed side by side; 0 for one document at a time.
    """
    group = case.heads // case.kv_heads
    sums = sums_of(max(case.packed_lengths), max(case.packed_key_lengths), profile, group)
    how = Computation.of(case, profile)
    q, k, v, dout = (x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    values = {"out": torch.zeros_like(dout), "lse": q.new_full(q.shape[:2], -torch.inf), "dq": torch.zeros_like(q)}
    values |= {"dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    variances = {name: torch.zeros_like(value) for name, value in values.items()}
    degrees = {name: torch.ones_like(values[name][..., 0]) for name in KERNEL_TENSORS if name != "lse"}
    for documents in alike(call_segments(case), pairs // case.heads):
        queries, seen = documents[0].queries.length, documents[0].keys.length
        rows, keys = (
            transferred([span.begin for span in spans], q.device)[:, None] + torch.arange(length, device=q.device)
            for spans, length in (([d.queries for d in documents], queries), ([d.keys for d in documents], seen))
        )
        qd, kd, vd, doutd = (x[place].transpose(1, 2) for x, place in ((q, rows), (k, keys), (v, keys), (dout, rows)))
        kd, vd = attention.expand_heads(kd, group), attention.expand_heads(vd, group)
        dlse = None if inputs.dlse is None else inputs.dlse[rows].double().transpose(1, 2)
        mask = attention.allowed_keys(queries, seen, case.effective_window, q.device)
        result = attention.forward(qd, kd, vd, mask, case.softmax_scale, case.softcap)
        grads = attention.backward(qd, kd, vd, doutd, case.softmax_scale, result, dlse)
        spread = attention_variances(Document(qd, kd, vd, doutd, dlse), result, how, group=group, sums=sums)
        found = {
            "out": result.out,
            "lse": result.lse,
            "dq": grads.dq,
            "dk": attention.sum_groups(grads.dk, group),
            "dv": attention.sum_groups(grads.dv, group),
        }
        for name, value in found.items():
            place = keys if name in ("dk", "dv") else rows
            values[name][place] = value.transpose(1, 2)
            variances[name][place] = getattr(spread, name).transpose(1, 2)
            if name in degrees:
                degrees[name][place] = spread.degrees[name].transpose(1, 2)
    return {name: Expected(values[name], variances[name], degrees.get(name)) for name in KERNEL_TENSORS}
