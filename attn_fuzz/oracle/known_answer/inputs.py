"""Kernel inputs whose results are known exactly: which keys took part, without a tolerance.

``uniform``: q = 0, or the same score for all keys, so that every allowed key of a row weighs exactly 1/n. V holds
signs, in opposite pairs along the keys, so that the sum over any run of keys is an integer of magnitude at most 2 and
``round(out * n)`` is that integer.
The output gradient is one-hot: one row, head and channel per document. Then dV is 1/n on the keys of that row and 0
elsewhere, dK is 0 (in all channels but the one that makes the score), and dQ is 0 in all other rows.

``every row``: q = 0, and an output gradient in all rows, scaled so that each row puts about +-1 into dV of its keys.

``needle``: keys are distinct sign vectors and ``q_i = c k_j`` with a logit gap of at least 30 between key j and all
others, so that ``out_i`` is ``v_j`` to the last bit.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.attention import allowed_keys
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.layout import Segment, call_segments, rank_slices, segments
from attn_fuzz.reference.values import DTYPES, draw
from attn_fuzz.reference.weights import layer_weights

LOGIT_GAP = 30.0
CODE_CHANNELS = 16


def drawn(case: Case, name: str, heads: int, device: torch.device | str = "cpu", *, keys: bool) -> torch.Tensor:
    """Normal numbers ``[tokens, heads, head_dim]`` in float32, a document's own, whatever the case's mode."""
    plain = case.replace(values="gaussian", dtype="fp32")
    return draw(plain, name, heads, case.head_dim, device, keys=keys)


def signs(case: Case, name: str, heads: int, device: torch.device | str = "cpu", *, keys: bool) -> torch.Tensor:
    """Random signs ``[tokens, heads, head_dim]``, a document's own."""
    return torch.where(drawn(case, name, heads, device, keys=keys) < 0, -1.0, 1.0)


def segment_mask(case: Case, segment: Segment) -> torch.Tensor:
    """Which key each query of a document sees."""
    return allowed_keys(segment.queries.length, segment.keys.length, case.effective_window)


@dataclasses.dataclass(frozen=True)
class Hot:
    """Where a document's output gradient is 1."""

    row: int
    """Within the document."""
    head: int
    channel: int


_SHIFTS = (0.0, -400.0, 60.0, -200000.0)
"""Scores far below zero, where a row maximum that starts at 0 underflows and a finite mask value wins."""


@dataclasses.dataclass(frozen=True)
class UniformProbe:
    """Inputs with q = 0, and the hot element of every document that has queries."""

    inputs: Inputs
    hot: dict[int, Hot]
    shift: float
    """The product q k of every query and key, before the scale: all scores are equal to it."""


def _pick(case: Case, document: int, salt: int, count: int) -> int:
    """A whole number below ``count`` that depends on the case's seed and the document only."""
    mixed = (case.seed * 1_000_003 + case.packed_ids[document] * 8191 + salt * 131) * 0x9E3779B1
    return ((mixed >> 7) & 0xFFFFFF) % count


def uniform_probe(case: Case, *, fp16: bool = False) -> UniformProbe:
    """The census and support probe of a kernel case; ``fp16``: a kernel keeps something in it, whatever the dtype."""
    dtype = DTYPES[case.dtype]
    values = signs(case, "census", case.kv_heads, keys=True)
    k = signs(case, "probe keys", case.kv_heads, keys=True)
    queries = sum(case.packed_lengths)
    dout = torch.zeros(queries, case.heads, case.head_dim)
    hot: dict[int, Hot] = {}
    for segment in call_segments(case):
        begin, end = segment.keys
        paired = (end - begin) // 2 * 2
        # Opposite neighbours: no run of keys can drift.
        values[begin + 1 : begin + paired : 2] = -values[begin : begin + paired : 2]
        if segment.queries.length:
            # The first, last and some row in between, in turn.
            last = segment.queries.length - 1
            row = (0, last, _pick(case, segment.document, 1, last + 1))[_pick(case, segment.document, 2, 3)]
            hot[segment.document] = Hot(
                row, _pick(case, segment.document, 3, case.heads), _pick(case, segment.document, 4, case.head_dim)
            )
            place = hot[segment.document]
            dout[segment.queries.begin + row, place.head, place.channel] = 1.0
    q = torch.zeros(queries, case.heads, case.head_dim)
    shift = _SHIFTS[case.seed % len(_SHIFTS)] / case.softmax_scale if case.softmax_scale > 0 else 0.0
    # A power of two: no rounding anywhere, whatever the kernel stores.
    shift = math.copysign(2.0 ** math.floor(math.log2(abs(shift))), shift) if shift else 0.0
    if fp16 or case.dtype == "fp16":
        # A kernel may keep the product, before or after the scale, in the dtype: neither may overflow.
        largest = 2.0 ** math.floor(math.log2(2.0**15 / max(case.softmax_scale, 1.0)))
        shift = max(min(shift, largest), -largest)
    q[..., 0] = shift
    k[..., 0] = 1.0
    return UniformProbe(Inputs(*(x.to(dtype) for x in (q, k, values, dout))), hot, shift)


def every_row_probe(case: Case) -> Inputs:
    """Inputs with q = 0 and an output gradient in every row, of about as large as the row has keys.

    Row i puts ``+-2^round(log2 n_i) / n_i``, a number near 1, into dV of each of its n_i keys and nothing elsewhere.
    Signs are opposite in neighbouring rows, so that roundings of P that all rows share cancel.
    """
    dtype = DTYPES[case.dtype]
    k, v = (signs(case, name, case.kv_heads, keys=True) for name in ("probe keys", "probe values"))
    dout = signs(case, "every row", case.heads, keys=False)
    for segment in call_segments(case):
        begin, end = segment.queries
        paired = (end - begin) // 2 * 2
        dout[begin + 1 : begin + paired : 2] = -dout[begin : begin + paired : 2]
        counts = segment_mask(case, segment).sum(1).clamp_min(1).double()
        dout[begin:end] *= (2.0 ** counts.log2().round()).float()[:, None, None]
    return Inputs(*(x.to(dtype) for x in (torch.zeros_like(dout), k, v, dout)))


@dataclasses.dataclass(frozen=True)
class NeedleProbe:
    """Inputs whose every row picks one key, and the rows of V that come out, ``[tokens_q, heads]``; -1 for none."""

    inputs: Inputs
    picked: torch.Tensor


def needle_gain(case: Case, *, fp16: bool = False) -> float | None:
    """What a needle's query is in units of its key, or None where keys cannot be told apart or scores are capped.

    Args:
        case: a kernel case.
        fp16: a kernel keeps something in it, whatever the dtype.
    """
    if case.softcap or not 0 < max(case.packed_key_lengths) <= 1 << needle_code(case) or case.softmax_scale <= 0:
        return None
    # One differing channel changes a score by 2 c scale.
    gain = 2.0 ** math.ceil(math.log2(LOGIT_GAP / (2 * case.softmax_scale)))
    # A kernel may keep unscaled products in the dtype.
    return None if (fp16 or case.dtype == "fp16") and gain * case.head_dim > 30000 else gain


def needle_code(case: Case) -> int:
    """How many channels hold a key's number in its document, as signs."""
    return min(case.head_dim, CODE_CHANNELS)


def needle_sizes(case: Case, device: torch.device | str = "cpu") -> torch.Tensor:
    """Magnitudes of V in [1, 2): what other keys add, e^-30 of it, is far below half a unit in the last place."""
    return 1 + drawn(case, "needle", case.kv_heads, device, keys=True).abs().clamp_max(7) / 8


def needle_probe(case: Case) -> NeedleProbe | None:
    """The needle probe of a kernel case, or None where there is none (``needle_gain``)."""
    if (gain := needle_gain(case)) is None:
        return None
    coded = needle_code(case)
    dtype = DTYPES[case.dtype]
    keys = signs(case, "needle keys", case.kv_heads, keys=True)
    v = signs(case, "needle values", case.kv_heads, keys=True)
    v = (v * needle_sizes(case)).to(dtype)
    queries = torch.zeros(sum(case.packed_lengths), case.heads, case.head_dim)
    picked = torch.full(queries.shape[:2], -1, dtype=torch.int64)
    group = case.heads // case.kv_heads
    for segment in call_segments(case):
        begin, end = segment.keys
        count = end - begin
        if not count:
            continue
        number = torch.arange(count)
        code = 1.0 - 2.0 * ((number[:, None] >> torch.arange(coded)) & 1)
        keys[begin:end, :, :coded] = code[:, None]
        mask = segment_mask(case, segment)
        for i in range(segment.queries.length):
            seen = mask[i].nonzero()[:, 0]
            if not len(seen):
                continue
            for head in range(case.heads):
                turn = _pick(case, segment.document, 11 + i * 7 + head, 4)
                choice = (
                    0,
                    len(seen) - 1,
                    max(len(seen) - 2, 0),
                    _pick(case, segment.document, i * 31 + head, len(seen)),
                )
                j = begin + int(seen[choice[turn]])
                row = segment.queries.begin + i
                picked[row, head] = j
                queries[row, head] = gain * keys[j, head // group]
    dout = torch.zeros_like(queries)
    return NeedleProbe(Inputs(queries.to(dtype), keys.to(dtype), v, dout.to(dtype)), picked)


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
            seen = segment_mask(case, segment)
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
