"""Sums beside large numbers (attn_fuzz/oracle/known_answer/swamping.py) for thousands of documents in one call."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.batch.row_index import RowIndex
from attn_fuzz.oracle.known_answer.swamping import (
    FEWEST_KEYS,
    LARGE,
    MOST_LARGE,
    MOSTLY,
    REFERENCE_CHANNEL,
    Sized,
    swamped,
    swamps,
)
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.values import DTYPES, draw


@dataclasses.dataclass(frozen=True)
class SwampingProbe:
    """``swamping.swamping_probe`` of a call of many documents, on a device."""

    inputs: Inputs
    places: RowIndex
    judged: torch.Tensor
    """bool ``[documents]``: those whose last row is."""
    large: torch.Tensor
    """int64 ``[documents]``: how many keys are large, of either sign."""
    gradient: torch.Tensor
    """float64 ``[documents]``: the output gradient of the last row's channel 0."""


def swamping_inputs(case: Case, device: torch.device) -> SwampingProbe | None:
    """The probe of a kernel case, the same numbers as ``swamping_probe`` gives; None where that gives none."""
    left = case.effective_window[0]
    sizes = zip(case.packed_lengths, case.packed_key_lengths, strict=True)
    held = [bool(queries) and keys >= FEWEST_KEYS and not 0 <= left < keys - 1 for queries, keys in sizes]
    if not swamps(case) or not any(held):
        return None
    places, plain = RowIndex(case, device), case.replace(values="gaussian", dtype="fp32")
    judged = torch.tensor(held).to(device)
    counts = places.key_lengths
    large = (counts // 4).clamp_max(MOST_LARGE) // 2 * 2
    # The binary logarithm, rounded down, of numbers below 2^24.
    exponent = torch.frexp(counts.clamp_min(1).float()).exponent.clamp_max(16)
    gradient = torch.bitwise_left_shift(torch.ones_like(counts), exponent.long()).double() / 16
    k, v = (
        torch.where(draw(plain, name, case.kv_heads, case.head_dim, device, keys=True) < MOSTLY, 1.0, -1.0)
        for name in ("swamped keys", "swamped values")
    )
    owner, position = places.key_owner, places.key_position
    here, ours = judged[owner], torch.arange(case.head_dim, device=device) == REFERENCE_CHANNEL
    first = here & (position < large[owner])
    last = here & (position >= counts[owner] - large[owner])
    for x in (k, v):
        x.masked_fill_(here[:, None, None] & ours, 0.0)
        x.masked_fill_(first[:, None, None], LARGE[case.dtype])
        x.masked_fill_(last[:, None, None], -LARGE[case.dtype])
    signs = torch.where(here, _balanced(position, counts[owner]), 1.0)
    k *= signs[:, None, None]
    v[:, :, 0] = torch.where(here[:, None], signs[:, None], v[:, :, 0])
    dout = torch.zeros(sum(case.packed_lengths), case.heads, case.head_dim, device=device)
    end = (places.lengths - 1)[places.owner] == places.position
    there = judged[places.owner] & end
    dout[:, :, 0] = torch.where(there, gradient[places.owner].float(), 0.0)[:, None]
    tensors = (x.to(DTYPES[case.dtype]) for x in (torch.zeros_like(dout), k, v, dout))
    return SwampingProbe(Inputs(*tensors), places, judged, large, gradient)


def _balanced(position: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """``swamping._balanced`` of each document, at each of its keys."""
    half = count // 2
    middle = (count % 2 == 1) & (position == half)
    # Behind the middle of an odd number the signs go on from where they were.
    place = position - ((count % 2 == 1) & (position > half)).long()
    return torch.where(middle, 0.0, 1.0 - 2.0 * (place % 2))


def swamped_sums(
    case: Case, probe: SwampingProbe, results: dict[str, torch.Tensor], error: float
) -> dict[str, torch.Tensor]:
    """Documents whose last row lacks a part of its sum, in ``out`` and in ``dq``: bool ``[documents]`` each.

    ``error`` is the largest of a weight, as ``swamping.swamped`` has it.
    """
    places, count = probe.places, probe.places.key_lengths.clamp_min(1).double()
    group = case.heads // case.kv_heads
    k, v = probe.inputs.k.double(), probe.inputs.v.double()

    def summed(x: torch.Tensor) -> torch.Tensor:
        # Whole numbers: exact in whatever order.
        sums = torch.zeros(len(count), *x.shape[1:], dtype=torch.float64, device=x.device)
        return sums.index_add_(0, places.key_owner, x).repeat_interleave(group, 1)

    units = {"out": 1 / count, "dq": case.softmax_scale * probe.gradient / count}
    sums = {"out": summed(v), "dq": summed(v[..., :1] * k)}
    row = (places.begins + places.lengths - 1).clamp_min(0)
    counts, large = count[:, None, None], probe.large[:, None, None]
    found = {}
    for name, unit in units.items():
        got, units_of = results[name][row].double(), unit[:, None, None]
        wrong = swamped(case, name, Sized(counts, large, units_of), error, got, units_of * sums[name])
        found[name] = wrong.flatten(1).any(1) & probe.judged
    return found
