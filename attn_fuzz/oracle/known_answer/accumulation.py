"""Exact accumulation: layer inputs whose gradients are sums of whole numbers over micro-sequences and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch

from attn_fuzz.reference.attention import allowed_keys
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.layout import Span, rank_slices, segments
from attn_fuzz.reference.values import DTYPES, draw
from attn_fuzz.reference.weights import layer_weights


@dataclasses.dataclass(frozen=True)
class AccumulationProbe:
    """A layer case whose dV and whose output projection's gradient are sums of whole numbers, per micro-sequence."""

    case: Case
    inputs: LayerInputs
    exact: dict[str, torch.Tensor]
    """float64: ``dv [tokens, kv_heads, head_dim]``, and ``d_dense [hidden, heads * head_dim]`` where it is whole; of
    several calls ``[calls, hidden, heads * head_dim]``, NaN where it is not."""


_WHOLE: Final = {"bf16": 129, "fp16": 1025}
"""Just above half of what the dtype counts to: one addend is exact in it, the sum of an odd and an even one is not."""

_LARGEST: Final = 60000
"""Of an output gradient, within fp16's range."""

_KEY_CHANNELS: Final = 16
"""Channels of the input that keys are made of."""


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


class _Gradients:
    """Output gradients of single rows, and the whole numbers that they add up to, over micro-sequences and ranks."""

    def __init__(self, case: Case) -> None:
        self.case, self.whole, self.channels = case, _WHOLE[case.dtype], _channels(case)
        self.dout = torch.zeros(case.tokens, case.heads, case.head_dim)
        self.dv = torch.zeros(case.tokens, case.kv_heads, case.head_dim, dtype=torch.float64)
        self.dense = torch.zeros(case.head_dim, dtype=torch.float64)
        """By channel: what the output projection's gradient adds up to."""
        self.dense_exact = case.all_ranks == 1
        self.added = torch.zeros(case.tokens, dtype=torch.int64)
        """How often each key's dV is added to, and each channel of the output projection's gradient."""
        self.dense_added = torch.zeros(case.head_dim, dtype=torch.int64)
        for number, part in enumerate(rank_slices(case)):
            self._add(part, self.whole + number % 2)

    @property
    def telling(self) -> bool:
        """Whether anything is added to more than once."""
        return bool((self.added > 1).any() or (self.dense_exact and (self.dense_added > 1).any()))

    def _add(self, part: Span, weight: int) -> None:
        """A row of each document in a rank's share of a micro-sequence, where one has a fitting number of keys."""
        case, summed = self.case, [0] * self.case.head_dim
        for segment in segments(case.packed_lengths, part):
            seen = allowed_keys(segment.queries.length, segment.keys.length, case.effective_window)
            counts = seen.sum(1)
            powers = (counts > 0) & (counts & (counts - 1) == 0) & (counts * (self.whole + 1) <= _LARGEST)
            if not powers.any():
                continue
            row, channel = int(powers.nonzero()[-1, 0]), self.channels[segment.document]
            keys, count = torch.arange(*segment.keys)[seen[row]], int(counts[row])
            self.dout[segment.queries.begin + row, :: case.heads // case.kv_heads, channel] = weight * count
            self.dv[keys, :, channel] += weight
            self.added[keys] += 1
            summed[channel] += count
        self.dense_exact &= all(n & (n - 1) == 0 and weight * n <= _LARGEST for n in summed)
        self.dense += weight * torch.tensor(summed)
        self.dense_added += torch.tensor(summed) > 0

    def of_dense(self, values: torch.Tensor) -> torch.Tensor:
        """The output projection's gradient, float64 ``[hidden, heads * head_dim]``; ``values`` are one token's."""
        case, group = self.case, self.case.heads // self.case.kv_heads
        context = values.double().view(case.kv_heads, -1).repeat_interleave(group, 0).flatten()
        moved = torch.zeros(case.heads, case.head_dim, dtype=torch.float64)
        moved[::group] = self.dense
        return moved.flatten()[:, None] * context


def _weights(probe: Case) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(no queries, the identity behind, values that are signs and the same in all tokens, those values)."""
    width, rows, dtype = probe.hidden, probe.kv_heads * probe.head_dim, DTYPES[probe.dtype]
    # No score depends on the keys: a few channels of the input are enough to make them of, and to draw.
    drawn = layer_weights(probe.replace(hidden=min(width, _KEY_CHANNELS)), "cpu")
    values = torch.where(drawn["key_value"][rows:, 0] < 0, -1.0, 1.0)
    key_value = torch.zeros(2 * rows, width, dtype=dtype)
    key_value[:rows, : drawn["key_value"].shape[1]] = drawn["key_value"][:rows]
    key_value[rows:, 0] = values.to(dtype)
    query, dense = torch.zeros(width, width, dtype=dtype), torch.eye(width, dtype=dtype)
    return {**drawn, "query": query, "key_value": key_value, "dense": dense}, values


def accumulation_probe(case: Case, calls: Sequence[Case] = ()) -> AccumulationProbe | None:
    """The exact accumulation probe of a layer case, or None where no two micro-sequences or ranks add to the same.

    Query weights are 0, so every key weighs 1/n, and the output projection is the identity. In every rank's
    share of every micro-sequence each document has at most one row with an output gradient, ``w n`` with n a power of
    two: 1/n and ``w n`` are exact in the dtype, and so is ``w``, which is added to dV of that row's keys. w alternates
    between two neighbours, whose sum the dtype cannot hold.

    All values are +-1, the same in all tokens, and so is the context of those rows. Documents take turns in the channel
    that their gradient is in: a micro-sequence adds +-w n to a row of the output projection's gradient, or w times the
    sum of several n where there are more documents than channels.

    Args:
        case: of layer level.
        calls: the sequences that it consists of, where it is a batch of several.
    """
    if case.dtype not in _WHOLE or len(rank_slices(case)) < 2:
        return None
    every = [_Gradients(call) for call in calls or (case,)]
    if not any(gradients.telling for gradients in every):
        return None
    width = case.heads * case.head_dim
    probe = case.replace(
        hidden=width, query_norm="none", value_norm="none", shared_key_value=False, weights="gaussian", softcap=0.0
    )
    x = draw(probe, "x", 1, width, "cpu")[:, 0]
    x[:, 0] = 1.0
    weights, values = _weights(probe)
    exact = {"dv": torch.cat([gradients.dv for gradients in every])}
    dense = [
        gradients.of_dense(values).masked_fill(torch.tensor(not gradients.dense_exact), torch.nan)
        for gradients in every
    ]
    if calls:
        exact["d_dense"] = torch.stack(dense)
    elif every[0].dense_exact:
        exact["d_dense"] = dense[0]
    dout = torch.cat([gradients.dout for gradients in every]).flatten(1)
    return AccumulationProbe(probe, LayerInputs(x, dout.to(x.dtype), weights), exact)
