"""Ranks: what every rank has is the same on each, and a rank's gradients lie where its own queries attended."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_fuzz.backends.output import first_mismatch
from attn_fuzz.oracle.symptoms import DeadRowsNotZero, Element, Place, RanksDiffer, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import micro_sequences, rank_slice, segments
from attn_fuzz.reference.memory import bits


def replicas_equal(trial: Trial) -> Iterator[Symptom]:
    """The K/V buffer, gathered from all ranks, has the same bits on each of them."""
    for observation in trial.observations:
        for name in ("k", "v"):
            buffers = [buffers[name] for buffers in observation.by_rank if name in buffers]
            for rank, other in enumerate(buffers[1:], 1):
                if differs_in := first_mismatch(other, buffers[0]):
                    what, there, here = differs_in
                    yield RanksDiffer("replicas", name, f"its {what} is {there} on rank {rank}, and {here} on rank 0")
                    continue
                differs = (bits(other) != bits(buffers[0])).flatten(1).any(1)
                if rows := differs.nonzero()[:, 0].tolist():
                    document, row = trial.document_of(name, rows[0])
                    where = tuple(int(i) for i in (bits(other) != bits(buffers[0]))[rows[0]].nonzero()[0])
                    here, there = (x[rows[0]][where].item() for x in (buffers[0], other))
                    yield RanksDiffer(
                        "replicas",
                        name,
                        f"document {document}, row {row} of the buffer is another on rank {rank} than on rank 0 "
                        f"({len(rows)} such rows)",
                        element=Element(Place(document, row), there, here),
                    )


def attended(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which K/V rows a rank's queries attend to, and which rows it owns, bool ``[tokens]`` each."""
    seen, owned = torch.zeros(2, case.tokens, dtype=torch.bool)
    left = case.effective_window[0]
    for part in micro_sequences(case):
        owned[slice(*rank_slice(part, rank, case.all_ranks))] = True
        # Tensor-parallel neighbours share the queries of one slice.
        for segment in segments(case.packed_lengths, rank_slice(part, rank // case.tensor_ranks, case.ranks)):
            if segment.queries.length:
                # The last query stands on the last key, and its neighbours next to it: there are no gaps.
                first = segment.queries.begin - left if left >= 0 else 0
                seen[max(segment.keys.begin, first) : segment.keys.end] = True
    return seen, owned


def alive_rows(got: torch.Tensor, seen: torch.Tensor, owned: torch.Tensor) -> torch.Tensor:
    """bool ``[tokens]``: rows of a rank's gradient ``[tokens, kv_heads, head_dim]`` that hold something, though none of
    its queries attended to them and it does not own them."""
    return (got != 0).flatten(1).any(1) & ~seen & ~owned


def dead_rows_zero_by_rank(trial: Trial) -> Iterator[Symptom]:
    """Rows that none of a rank's queries attended to are 0 in its gradient buffer, but for those it owns.

    Its own rows hold the sum over all ranks, which the checks of whole results judge.
    """
    case = trial.case
    if case.all_ranks == 1:
        return
    parts = [attended(case, rank) for rank in range(case.all_ranks)]
    for observation in trial.observations:
        for rank, (buffers, (seen, owned)) in enumerate(zip(observation.by_rank, parts, strict=False)):
            for name in ("dk", "dv"):
                if (got := buffers.get(name)) is None or len(got) != case.tokens:
                    continue
                alive = alive_rows(got, seen, owned)
                if rows := alive.nonzero()[:, 0].tolist():
                    document, row = trial.document_of(name, rows[0])
                    value = got[rows[0]].flatten()
                    held = value[value != 0][0].item()
                    yield DeadRowsNotZero(
                        "dead_rows_by_rank",
                        name,
                        f"document {document}, row {row} is attended to by no query of rank {rank}, whose gradient "
                        f"buffer holds {held:.6g} there ({len(rows)} such rows)",
                        element=Element(Place(document, row), held, 0.0),
                    )
