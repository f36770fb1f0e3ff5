"""Census and support: equal scores, so that every allowed key of a row weighs exactly 1/n, without a reference.

q = 0, or the same score for all keys. V holds signs, in opposite pairs along the keys, so that the sum over any run of
keys is an integer of magnitude at most 2 and ``round(out * n)`` is that integer (census). The output gradient is
one-hot: one row, head and channel per document. Then dV is 1/n on the keys of that row and 0 elsewhere, dK is 0 (in all
channels but the one that makes the score), and dQ is 0 in all other rows (support).

Which keys each row sees is a run whose ends follow from the lengths, sums over a run are differences of prefix sums,
and all of it is whole numbers: one wrong key in one of a hundred thousand documents shows, exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

import torch

from attn_fuzz.oracle.known_answer.compared import Compared, Results
from attn_fuzz.oracle.known_answer.row_index import RowIndex
from attn_fuzz.oracle.known_answer.signs import signs
from attn_fuzz.oracle.known_answer.slack import NEAR_WHOLE, in_fp16, lse_slack, support_slack
from attn_fuzz.oracle.symptoms import Symptom, WrongKeys, WrongKeysBackward, WrongLse
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.values import DTYPES

_SHIFTS: Final = (0.0, -400.0, 60.0, -200000.0)
"""Scores far below zero, where a row maximum that starts at 0 underflows and a finite mask value wins."""


def equal_product(case: Case, *, fp16: bool = False) -> float:
    """The product q k of every query and key of a case, before the scale.

    Args:
        case: a kernel case, whose seed and options decide it.
        fp16: a kernel keeps something in it, though the case's dtype be another.
    """
    shift = _SHIFTS[case.seed % len(_SHIFTS)] / case.softmax_scale if case.softmax_scale > 0 else 0.0
    # A power of two: exact in every format that a kernel may store.
    shift = math.copysign(2.0 ** math.floor(math.log2(abs(shift))), shift) if shift else 0.0
    if fp16 or case.dtype == "fp16":
        # A kernel may keep the product, before or after the scale, in the dtype: neither may overflow.
        most = 2.0 ** math.floor(math.log2(2.0**15 / max(case.softmax_scale, 1.0)))
        shift = max(min(shift, most), -most)
    return shift


def census_sees(out: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Which elements are not the mean of their row's values.

    Args:
        out: ``[rows, heads, d]`` float64.
        counts: ``[rows]``, keys of each row.
        sums: as ``out``: whole numbers, the sum of V over those keys.
    """
    return ~((out * counts.clamp_min(1)[:, None, None] - sums).abs() < NEAR_WHOLE)


@dataclasses.dataclass(frozen=True)
class Census:
    """The census and support of a kernel case, on a device; to judge them waits for nothing."""

    symptoms: ClassVar[Mapping[str, type[Symptom]]] = {
        "out": WrongKeys,
        "lse": WrongLse,
        "dq": WrongKeysBackward,
        "dk": WrongKeysBackward,
        "dv": WrongKeysBackward,
    }
    backward: ClassVar[bool] = True

    case: Case
    profile: Profile
    inputs: Inputs
    places: RowIndex
    row: torch.Tensor
    """int64 ``[documents]``: the row within each document whose output gradient is hot; 0 where it has no queries."""
    head: torch.Tensor
    channel: torch.Tensor
    shift: float
    """The product q k of every query and key, before the scale."""

    @classmethod
    def of(cls, case: Case, device: torch.device, profile: Profile) -> Census:
        """Its inputs.

        Args:
            case: a kernel case.
            device: where they are made.
            profile: how the backend computes.
        """
        v = signs(case, "census", case.kv_heads, device, keys=True, values=True)
        k = signs(case, "probe keys", case.kv_heads, device, keys=True)
        places = RowIndex(case, device)
        # Opposite neighbours: no run of keys can drift.
        v = places.paired(v, keys=True)
        row, head, channel = _hot(case, places)
        dout = _one_hot(case, places, row, head, channel)
        shift = equal_product(case, fp16=in_fp16(case, profile))
        q = dout.new_zeros(len(dout), case.heads, case.head_dim)
        q[..., 0] = shift
        k[..., 0] = 1.0
        inputs = Inputs(*(x.to(DTYPES[case.dtype]) for x in (q, k, v, dout)))
        return cls(case, profile, inputs, places, row, head, channel, shift)

    def judge(self, results: Results) -> Iterator[Compared]:
        """Out, LSE where there is one, dV, dK and dQ."""
        yield self._out(results["out"])
        lse = results.get("lse")
        if lse is not None and lse.shape == results["out"].shape[:2]:
            yield self._lse(lse)
        yield (dv := self._dv(results["dv"]))
        yield self._dk(results["dk"], dv.expected)
        yield self._dq(results["dq"])

    @functools.cached_property
    def counts(self) -> torch.Tensor:
        """int64 ``[tokens_q]``: how many keys each row sees."""
        begin, end = self.places.seen
        return end - begin

    @property
    def score(self) -> float:
        """Of every query and key, before the softcap."""
        return self.shift * self.case.softmax_scale

    def _of_rows(self, name: str, got: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor) -> Compared:
        return Compared(name, self.places.owner, self.places.position, got, expected, wrong)

    def _of_keys(self, name: str, got: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor) -> Compared:
        return Compared(name, self.places.key_owner, self.places.key_position, got, expected, wrong)

    def _out(self, out: torch.Tensor) -> Compared:
        got, sums = out.double(), self._sums()
        wrong = census_sees(got, self.counts, sums)
        # In place: there may be a hundred thousand documents.
        return self._of_rows("out", got, sums.div_(self.counts.clamp_min(1)[:, None, None]), wrong)

    def _sums(self) -> torch.Tensor:
        """float64 ``[tokens_q, heads, d]``: the sum of V over the keys of each row, whole numbers."""
        v, (begin, end) = self.inputs.v.double(), self.places.seen
        # Along memory: over the rows as they lie, a GPU has one thread for each channel.
        running = v.flatten(1).T.contiguous().cumsum(1).T.unflatten(1, v.shape[1:])
        sums = torch.cat([running.new_zeros(1, *v.shape[1:]), running])
        first = self.places.key_begins[self.places.owner]
        # A run that is empty may lie behind the document.
        begin, end = (torch.where(self.counts > 0, place, 0) for place in (begin, end))
        group = self.case.heads // self.case.kv_heads
        return (sums[first + end] - sums[first + begin]).repeat_interleave(group, 1)

    def _lse(self, lse: torch.Tensor) -> Compared:
        """The LSE of n equal scores is that score plus log n; of none, -inf."""
        score = self.score
        if self.case.softcap:
            score = self.case.softcap * math.tanh(score / self.case.softcap)
        got = lse.double()
        expected = (self.counts.double().log() + score)[:, None].expand_as(got)
        wrong = ~((got - expected).abs() <= lse_slack(self.case, score)) & (got != expected)
        return self._of_rows("lse", got, expected, wrong)

    def _dv(self, dv: torch.Tensor) -> Compared:
        """Equal to a rounding or three, and to what float32 makes of exp(score - lse); exactly 0 without a weight."""
        got, expected = dv.double(), torch.zeros_like(dv, dtype=torch.float64)
        owner, position = self.places.key_owner, self.places.key_position
        begin, end = self.places.seen_by(self.row, torch.arange(len(self.row), device=dv.device))
        seen = (position >= begin[owner]) & (position < end[owner]) & (self.places.lengths > 0)[owner]
        weight = torch.where(seen, 1.0 / (end - begin).clamp_min(1)[owner].double(), 0.0)
        kv_head = self.head[owner] // (self.case.heads // self.case.kv_heads)
        expected[torch.arange(len(owner), device=dv.device), kv_head, self.channel[owner]] = weight
        slack = support_slack(self.case, self.profile, self.score)
        wrong = torch.where(expected == 0, got != 0, ~((got - expected).abs() <= slack * expected))
        return self._of_keys("dv", got, expected, wrong)

    def _dk(self, dk: torch.Tensor, expected_dv: torch.Tensor) -> Compared:
        if self.score:
            # The channel that makes the score has a gradient, on the keys of the hot rows.
            dk = dk.clone()
            dk[..., 0] = torch.where((expected_dv != 0).any(-1), 0.0, dk[..., 0])
        return self._of_keys("dk", dk, dk.new_zeros(()).expand_as(dk), dk != 0)

    def _dq(self, dq: torch.Tensor) -> Compared:
        """0 in all rows whose output has no gradient; the others' are not judged."""
        owner = self.places.owner
        hot = (self.places.position == self.row[owner])[:, None]
        hot = hot & (torch.arange(self.case.heads, device=dq.device) == self.head[owner][:, None])
        return self._of_rows("dq", dq, dq.new_zeros(()).expand_as(dq), (dq != 0) & ~hot[..., None])


def _hot(case: Case, places: RowIndex) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, head and channel of each document's output gradient: the first, last and some row in between, in turn."""
    every = torch.arange(len(case.packed_lengths), device=places.device)
    last = (places.lengths - 1).clamp_min(0)
    choices = torch.stack([torch.zeros_like(last), last, places.pick(every, 1, last + 1)])
    row = choices.gather(0, places.pick(every, 2, 3)[None])[0]
    return row, places.pick(every, 3, case.heads), places.pick(every, 4, case.value_dim)


def _one_hot(
    case: Case, places: RowIndex, row: torch.Tensor, head: torch.Tensor, channel: torch.Tensor
) -> torch.Tensor:
    queries = sum(case.packed_lengths)
    # One row more, for documents without queries: to leave them out, the host would have to know which they are.
    dout = torch.zeros(queries + 1, case.heads, case.value_dim, device=places.device)
    dout[torch.where(places.lengths > 0, places.begins + row, queries), head, channel] = 1.0
    return dout[:queries]
