"""The needle (attn_fuzz/probes.py) for thousands of documents in one call: every row points at one key."""

from __future__ import annotations

import torch

from attn_fuzz.checks.exact import SPLIT
from attn_fuzz.probes import NeedleProbe, needle_code, needle_gain
from attn_fuzz.wide.judge import of_documents
from attn_fuzz.wide.places import Places
from reference.answer import Inputs
from reference.case import Case
from reference.values import DTYPES, draw


def _signs(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, -1.0, 1.0)


def wide_needle(case: Case, device: torch.device) -> NeedleProbe | None:
    """The needle probe of a kernel case, the same numbers as ``needle_probe`` gives; None where that gives none."""
    if (gain := needle_gain(case)) is None:
        return None
    places, dtype, coded = Places(case, device), DTYPES[case.dtype], needle_code(case)
    plain = case.replace(values="gaussian", dtype="fp32")

    def drawn(name: str) -> torch.Tensor:
        return draw(plain, name, case.kv_heads, case.head_dim, device, keys=True)

    keys = _signs(drawn("needle keys"))
    code = 1.0 - 2.0 * ((places.key_position[:, None] >> torch.arange(coded, device=device)) & 1)
    keys[:, :, :coded] = code[:, None]
    v = (_signs(drawn("needle values")) * (1 + drawn("needle").abs().clamp_max(7) / 8)).to(dtype)
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


def lost_needles(case: Case, probe: NeedleProbe, out: torch.Tensor) -> torch.Tensor:
    """Documents with a row that is not the value of the key it points at: bool ``[documents]``."""
    head = torch.arange(case.heads, device=out.device) // (case.heads // case.kv_heads)
    expected = probe.inputs.v[probe.picked.clamp_min(0), head]
    # float32 kernels may multiply in split TF32; in half precision the value comes out to the last bit.
    slack = SPLIT * expected.abs() if case.dtype == "fp32" else 0.0
    wrong = ~((out - expected).abs() <= slack) & (probe.picked >= 0)[..., None]
    return of_documents(case, "out", wrong.flatten(1).any(1))
