"""Exact accumulation: layer inputs whose gradients are sums of whole numbers over micro-sequences and ranks."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.reference.attention import allowed_keys
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.layout import rank_slices, segments
from attn_fuzz.reference.values import DTYPES, draw
from attn_fuzz.reference.weights import layer_weights


@dataclasses.dataclass(frozen=True)
class AccumulationProbe:
    """A layer case whose dV and whose output projection's gradient are sums of whole numbers, per micro-sequence."""

    case: Case
    inputs: LayerInputs
    exact: dict[str, torch.Tensor]
    """float64: ``dv [tokens, kv_heads, head_dim]``, and ``d_dense [hidden, heads * head_dim]`` where it is whole."""


_WHOLE = {"bf16": 129, "fp16": 1025}
"""Just above half of what the dtype counts to: one addend is exact in it, the sum of an odd and an even one is not."""


_KEY_CHANNELS = 16


def _channels(case: Case) -> dict[int, int]:
    """A channel for every document, another one than its neighbours in any micro-sequence have where there are enough.

    The lowest ones that are free, so that as many micro-sequences as possible have a gradient in the same.
    """
    channels: dict[int, int] = {}
    for part in rank_slices(case):
        active = [segment.document for segment in segments(case.packed_lengths, part)]
        taken = {channels[document] for document in active if document in channels}
        for document in active:
            if document not in channels:
                free = (channel for channel in range(case.head_dim) if channel not in taken)
                channels[document] = next(free, document % case.head_dim)
                taken.add(channels[document])
    return channels


def accumulation_probe(case: Case) -> AccumulationProbe | None:
    """The exact accumulation probe of a layer case, or None where no two micro-sequences or ranks add to the same.

    Query weights are 0, so every key weighs 1/n, and the output projection is the identity. In every rank's
    share of every micro-sequence each document has at most one row with an output gradient, ``w n`` with n a power of
    two: 1/n and ``w n`` are exact in the dtype, and so is ``w``, which is added to dV of that row's keys. w alternates
    between two neighbours, whose sum the dtype cannot hold.

    All values are +-1, the same in all tokens, and so is the context of those rows. Documents take turns in the channel
    that their gradient is in: a micro-sequence adds +-w n to a row of the output projection's gradient, or w times the
    sum of several n where there are more documents than channels.
    """
    if case.dtype not in _WHOLE or len(rank_slices(case)) < 2:
        return None
    width = case.heads * case.head_dim
    probe = case.replace(
        hidden=width, query_norm="none", value_norm="none", shared_key_value=False, weights="gaussian", softcap=0.0
    )
    dtype, whole = DTYPES[case.dtype], _WHOLE[case.dtype]
    group = case.heads // case.kv_heads
    dout = torch.zeros(case.tokens, case.heads, case.head_dim)
    dv = torch.zeros(case.tokens, case.kv_heads, case.head_dim, dtype=torch.float64)
    added, dense_added = torch.zeros(case.tokens, dtype=torch.int64), torch.zeros(case.head_dim, dtype=torch.int64)
    channels = _channels(case)
    ddense, dense_exact = torch.zeros(case.head_dim, dtype=torch.float64), case.all_ranks == 1
    for number, part in enumerate(rank_slices(case)):
        weight, summed = whole + number % 2, [0] * case.head_dim
        for segment in segments(case.packed_lengths, part):
            seen = allowed_keys(segment.queries.length, segment.keys.length, case.effective_window)
            counts = seen.sum(1)
            powers = (counts > 0) & (counts & (counts - 1) == 0) & (counts * (whole + 1) <= 60000)
            if not powers.any():
                continue
            row = int(powers.nonzero()[-1, 0])
            keys = torch.arange(*segment.keys)[seen[row]]
            channel = channels[segment.document]
            dout[segment.queries.begin + row, ::group, channel] = weight * int(counts[row])
            dv[keys, :, channel] += weight
            added[keys] += 1
            summed[channel] += int(counts[row])
        dense_exact &= all(n & (n - 1) == 0 and weight * n <= 60000 for n in summed)
        ddense += weight * torch.tensor(summed)
        dense_added += torch.tensor(summed) > 0
    if not (added > 1).any() and not (dense_exact and (dense_added > 1).any()):
        return None
    x = draw(probe, "x", 1, width, "cpu")[:, 0]
    x[:, 0] = 1.0
    # No score depends on the keys: a few channels of the input are enough to make them of, and to draw.
    drawn = layer_weights(probe.replace(hidden=min(width, _KEY_CHANNELS)), "cpu")
    rows = case.kv_heads * case.head_dim
    values = torch.where(drawn["key_value"][rows:, 0] < 0, -1.0, 1.0)
    key_value = torch.zeros(2 * rows, width, dtype=dtype)
    key_value[:rows, : drawn["key_value"].shape[1]] = drawn["key_value"][:rows]
    key_value[rows:, 0] = values.to(dtype)
    weights = {
        **drawn,
        "query": torch.zeros(width, width, dtype=dtype),
        "key_value": key_value,
        "dense": torch.eye(width, dtype=dtype),
    }
    exact = {"dv": dv}
    if dense_exact:
        context = values.double().view(case.kv_heads, -1).repeat_interleave(group, 0).flatten()
        moved = torch.zeros(case.heads, case.head_dim, dtype=torch.float64)
        moved[::group] = ddense
        exact["d_dense"] = moved.flatten()[:, None] * context
    return AccumulationProbe(probe, LayerInputs(x, dout.flatten(1).to(dtype), weights), exact)
