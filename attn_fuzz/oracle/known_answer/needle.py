"""Needle: every row points at one key, whose value comes out to the last bit.

Keys are distinct sign vectors and ``q_i = c k_j`` with a logit gap of at least 30 between key j and all others, so that
``out_i`` is ``v_j``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from attn_fuzz.oracle.known_answer.compared import Compared, Results
from attn_fuzz.oracle.known_answer.needle_gain import needle_code, needle_gain
from attn_fuzz.oracle.known_answer.row_index import RowIndex
from attn_fuzz.oracle.known_answer.signs import drawn, signs
from attn_fuzz.oracle.known_answer.slack import needle_slack
from attn_fuzz.oracle.symptoms import Symptom, WrongKeys
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.values import DTYPES


@dataclasses.dataclass(frozen=True)
class Needle:
    """The needles of a kernel case, on a device."""

    symptoms: ClassVar[Mapping[str, type[Symptom]]] = {"out": WrongKeys}
    backward: ClassVar[bool] = False

    case: Case
    slack: float
    """How far a row may be from its value, relative to it (``needle_slack``): in half precision usually not a bit."""
    inputs: Inputs
    places: RowIndex
    picked: torch.Tensor
    """int64 ``[tokens_q, heads]``: the rows of V that come out; -1 for none."""

    @classmethod
    def of(cls, case: Case, device: torch.device, profile: Profile) -> Needle | None:
        """Its inputs, or None where keys cannot be told apart.

        Args:
            case: a kernel case.
            device: where they are made.
            profile: how the backend computes.
        """
        slack = needle_slack(case, profile)
        if not math.isfinite(slack) or (gain := needle_gain(case)) is None:
            return None
        places, dtype = RowIndex(case, device), DTYPES[case.dtype]
        keys, values = _coded_keys(case, places), _values(case, device).to(dtype)
        picked = _picked(case, places)
        queries = gain * keys[picked.clamp_min(0), _kv_heads(case, device)]
        queries = torch.where((picked >= 0)[..., None], queries, 0.0)
        dout = queries.new_zeros(*queries.shape[:2], case.value_dim)
        inputs = Inputs(*(x.to(dtype) for x in (queries, keys, values, dout)))
        return cls(case, slack, inputs, places, picked)

    def judge(self, results: Results) -> Iterator[Compared]:
        """Out."""
        got, heads = results["out"].double(), _kv_heads(self.case, self.picked.device)
        expected = self.inputs.v[self.picked.clamp_min(0), heads].double()
        lost = ~((got - expected).abs() <= self.slack * expected.abs()) & (self.picked >= 0)[..., None]
        yield Compared("out", self.places.owner, self.places.position, got, expected, lost)

    def key_of(self, value: torch.Tensor, head: int) -> int | None:
        """The row of V that a row of the output is, if any.

        Args:
            value: ``[value_dim]``.
            head: of the output.
        """
        values = self.inputs.v[:, head // (self.case.heads // self.case.kv_heads)].double()
        found = ((values - value).abs() < 2.0**-12).all(-1).nonzero()[:, 0].tolist()
        return found[0] if found else None


def _kv_heads(case: Case, device: torch.device) -> torch.Tensor:
    """int64 ``[heads]``: the K/V head that each head reads."""
    return torch.arange(case.heads, device=device) // (case.heads // case.kv_heads)


def _coded_keys(case: Case, places: RowIndex) -> torch.Tensor:
    """Signs, the first of which are each key's number in its document."""
    keys, coded = signs(case, "needle keys", case.kv_heads, places.device, keys=True), needle_code(case)
    code = 1.0 - 2.0 * ((places.key_position[:, None] >> torch.arange(coded, device=places.device)) & 1)
    keys[:, :, :coded] = code[:, None]
    return keys


def _values(case: Case, device: torch.device) -> torch.Tensor:
    """Signs with magnitudes in [1, 2)."""
    sizes = 1 + drawn(case, "needle", case.kv_heads, device, keys=True, values=True).abs().clamp_max(7) / 8
    return signs(case, "needle values", case.kv_heads, device, keys=True, values=True) * sizes


def _picked(case: Case, places: RowIndex) -> torch.Tensor:
    """The first, the last, the last but one or some key that a row sees, in turn."""
    begin, end = places.seen
    count = (end - begin)[:, None].clamp_min(1)
    head = torch.arange(case.heads, device=places.device)
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
    return torch.where((end > begin)[:, None], (places.key_begins[places.owner] + begin)[:, None] + choice, -1)
