"""The needle (oracle/known_answer/inputs.py) for thousands of documents in one call: every row points at one key."""

from __future__ import annotations

import torch

from attn_fuzz.batch.row_index import RowIndex
from attn_fuzz.oracle.known_answer.inputs import NeedleProbe, needle_code, needle_gain, needle_sizes, signs
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.values import DTYPES


def needle_inputs(case: Case, device: torch.device) -> NeedleProbe | None:
    """The needle probe of a kernel case, the same numbers as ``needle_probe`` gives; None where that gives none."""
    if (gain := needle_gain(case)) is None:
        return None
    places, dtype, coded = RowIndex(case, device), DTYPES[case.dtype], needle_code(case)
    keys, v = (signs(case, name, case.kv_heads, device, keys=True) for name in ("needle keys", "needle values"))
    code = 1.0 - 2.0 * ((places.key_position[:, None] >> torch.arange(coded, device=device)) & 1)
    keys[:, :, :coded] = code[:, None]
    v = (v * needle_sizes(case, device)).to(dtype)
    begin, end = places.seen
    count = (end - begin)[:, None].clamp_min(1)
    head = torch.arange(case.heads, device=device)
    row, document = places.position[:, None], places.owner[:, None]
    choices = torch.stack(
        [
            torch.zeros_like(row + head),
            (count - 1).expand(-1, case.heads),
            (count - 2).clamp_min(0).expand(-1, case.heads),
            places.pick(document, row * 31 + head, count),
        ]
    )
    choice = choices.gather(0, places.pick(document, 11 + row * 7 + head, 4)[None])[0]
    there = (end > begin)[:, None]
    picked = torch.where(there, (places.key_begins[places.owner] + begin)[:, None] + choice, -1)
    queries = gain * keys[picked.clamp_min(0), head // (case.heads // case.kv_heads)]
    queries = torch.where(there[..., None], queries, 0.0)
    return NeedleProbe(Inputs(*(x.to(dtype) for x in (queries, keys, v, torch.zeros_like(queries)))), picked)
