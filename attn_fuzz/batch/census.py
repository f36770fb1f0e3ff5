"""Census and support (oracle/known_answer/inputs.py) for thousands of documents in one call, without a reference.

Which keys each row sees is a run whose ends follow from the lengths, sums over a run are differences of prefix sums,
and all of it is whole numbers: one wrong key in one of a hundred thousand documents shows, exactly.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch

from attn_fuzz.batch.row_index import RowIndex
from attn_fuzz.batch.verdicts import of_documents
from attn_fuzz.oracle.checks.exact import census_sees
from attn_fuzz.oracle.known_answer.inputs import signs, uniform_probe
from attn_fuzz.oracle.known_answer.slack import support_slack
from attn_fuzz.oracle.symptoms import Symptom, WrongKeys, WrongKeysBackward, WrongLse
from attn_fuzz.reference.answer import KERNEL_TENSORS, Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.values import DTYPES

SYMPTOMS: Final[dict[str, type[Symptom]]] = {
    "out": WrongKeys,
    "lse": WrongLse,
    "dq": WrongKeysBackward,
    "dk": WrongKeysBackward,
    "dv": WrongKeysBackward,
}
"""What a result that fails the probe is called."""


@dataclasses.dataclass(frozen=True)
class KeysProbe:
    """``probes.uniform_probe`` of a call of many documents, on a device."""

    inputs: Inputs
    places: RowIndex
    row: torch.Tensor
    """int64 ``[documents]``: the row within each document whose output gradient is hot; 0 where it has no queries."""
    head: torch.Tensor
    channel: torch.Tensor
    shift: float
    """The product q k of every query and key, before the scale."""


def keys_probe(case: Case, device: torch.device, *, fp16: bool = False) -> KeysProbe:
    """The census and support probe of a kernel case, the same numbers as ``uniform_probe`` gives."""
    dtype, heads, dim = DTYPES[case.dtype], case.heads, case.head_dim
    v, k = (signs(case, name, case.kv_heads, device, keys=True) for name in ("census", "probe keys"))
    places = RowIndex(case, device)
    # Opposite neighbours: no run of keys can drift.
    v = places.paired(v, keys=True)
    every = torch.arange(len(case.packed_lengths), device=device)
    last = (places.lengths - 1).clamp_min(0)
    choices = torch.stack([torch.zeros_like(last), last, places.pick(every, 1, last + 1)])
    row = choices.gather(0, places.pick(every, 2, 3)[None])[0]
    head, channel = places.pick(every, 3, heads), places.pick(every, 4, dim)
    queries = sum(case.packed_lengths)
    # One row more, for documents without queries: to leave them out, the host would have to know which they are.
    dout = torch.zeros(queries + 1, heads, dim, device=device)
    dout[torch.where(places.lengths > 0, places.begins + row, queries), head, channel] = 1.0
    dout = dout[:queries]
    # Seed and options decide it, not the documents.
    shift = uniform_probe(case.replace(lengths=(1,), key_lengths=(1,), document_ids=None), fp16=fp16).shift
    q = torch.zeros_like(dout)
    q[..., 0] = shift
    k[..., 0] = 1.0
    return KeysProbe(Inputs(*(x.to(dtype) for x in (q, k, v, dout))), places, row, head, channel, shift)


def wrong_documents(
    case: Case, probe: KeysProbe, results: dict[str, torch.Tensor], profile: Profile | None = None
) -> torch.Tensor:
    """Which documents' results are not what the probe says: bool ``[documents, 5]``, as ``KERNEL_TENSORS``.

    Args:
        case: a kernel case.
        probe: its inputs.
        results: of a run on them, complete.
        profile: how the backend computes; None for nothing out of the ordinary.
    """
    wrong = _Wrong(case, probe, results, profile or Profile())
    by_row = {"out": wrong.out(), "lse": wrong.lse(), "dq": wrong.dq(), **dict(zip(("dk", "dv"), wrong.keys()))}
    return torch.stack([of_documents(case, name, by_row[name]) for name in KERNEL_TENSORS], 1)


class _Wrong:
    """Wrong rows of each result, bool ``[tokens]``."""

    def __init__(self, case: Case, probe: KeysProbe, results: dict[str, torch.Tensor], profile: Profile) -> None:
        self.case, self.probe, self.results, self.places = case, probe, results, probe.places
        self.profile = profile
        self.begin, self.end = self.places.seen
        self.counts = self.end - self.begin
        self.score = probe.shift * case.softmax_scale
        self.group = case.heads // case.kv_heads

    def out(self) -> torch.Tensor:
        v = self.probe.inputs.v.double()
        # Along memory: over the rows as they lie, a GPU has one thread for each channel.
        running = v.flatten(1).T.contiguous().cumsum(1).T.unflatten(1, v.shape[1:])
        sums = torch.cat([running.new_zeros(1, *v.shape[1:]), running])
        first = self.places.key_begins[self.places.owner]
        # A run that is empty may lie behind the document.
        end = torch.where(self.counts > 0, self.end, 0)
        begin = torch.where(self.counts > 0, self.begin, 0)
        wanted = (sums[first + end] - sums[first + begin]).repeat_interleave(self.group, 1)
        return census_sees(self.results["out"].double(), self.counts, wanted).flatten(1).any(1)

    def lse(self) -> torch.Tensor:
        if (lse := self.results.get("lse")) is None:
            return torch.zeros_like(self.counts, dtype=torch.bool)
        score = self.score
        if self.case.softcap:
            score = self.case.softcap * math.tanh(score / self.case.softcap)
        wanted = (self.counts.double().log() + score)[:, None]
        # The slack of the pure check (attn_fuzz/oracle/checks/exact.py).
        slack = 1e-3 + 2.0**-10 * abs(score) * bool(self.case.softcap) + 2.0**-20 * abs(score)
        got = lse.double()
        return (~((got - wanted).abs() <= slack) & (got != wanted)).any(1)

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of dk and of dv."""
        dk, dv = self.results["dk"], self.results["dv"].double()
        owner, position = self.places.key_owner, self.places.key_position
        every_document = torch.arange(len(self.probe.row), device=dv.device)
        begin, end = self.places.seen_by(self.probe.row, every_document)
        hot = (position >= begin[owner]) & (position < end[owner]) & (self.places.lengths > 0)[owner]
        weight = torch.where(hot, 1.0 / (end - begin).clamp_min(1)[owner].double(), 0.0)
        wanted = torch.zeros_like(dv)
        every = torch.arange(len(owner), device=dv.device)
        wanted[every, self.probe.head[owner] // self.group, self.probe.channel[owner]] = weight
        slack = support_slack(self.case, self.profile, self.score)
        wrong = torch.where(wanted == 0, dv != 0, ~((dv - wanted).abs() <= slack * wanted))
        if self.score:
            # The channel that makes the score has a gradient, on the keys of the hot rows.
            dk = dk.clone()
            dk[..., 0] = torch.where((wanted != 0).any(-1), 0.0, dk[..., 0])
        return (dk != 0).flatten(1).any(1), wrong.flatten(1).any(1)

    def dq(self) -> torch.Tensor:
        owner = self.places.owner
        hot = (self.places.position == self.probe.row[owner])[:, None]
        hot = hot & (torch.arange(self.case.heads, device=hot.device) == self.probe.head[owner][:, None])
        return ((self.results["dq"] != 0).any(-1) & ~hot).any(1)
