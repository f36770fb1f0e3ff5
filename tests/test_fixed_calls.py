"""Calls for what compiles for shapes: few layouts, long documents and gradients of the LSE among them."""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from random import Random

import pytest
import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Configuration
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judge import judge
from attn_fuzz.campaign.configuration_pool import Step
from attn_fuzz.campaign.warm_up import warm_up_cases
from attn_fuzz.coverage.aims import Aims
from attn_fuzz.coverage.allowed import Space
from attn_fuzz.generation.calls import draw_batch
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.drawing import few_cases
from attn_fuzz.generation.layouts import FEW_KEYS, LONG_ROWS
from attn_fuzz.generation.length_sweeps import Sweep
from attn_fuzz.reference.case import Case

CPU = torch.device("cpu")
LAYOUTS = 12
SHAPES = Capabilities(layouts=LAYOUTS, compiles=True, capacity=False)
LONG = {"long_rows": (True,)}


def domain_of(stated: Capabilities, device: str = "cuda", **aim: tuple[bool, ...]) -> Domain:
    return dataclasses.replace(Domain.of(stated, device), aim=aim)


def backend_of(domain: Domain) -> Backend:
    kernel = type("Shapes", (LoopKernel,), {"capabilities": domain.capabilities})()
    return Backend("shapes", kernel, levels=("kernel",))


def drawn(domain: Domain) -> list[Case]:
    """Calls of a few batches."""
    backend = backend_of(domain)
    batches = (draw_batch(Random(seed), Sweep((16, 32), seed), backend, domain, 30) for seed in range(12))
    return [batch.call(index) for batch in batches if batch is not None for index in range(len(batch.ends))]


def long_of(calls: list[Case]) -> set[tuple[int, int]]:
    """(queries, keys) of documents of thousands of queries."""
    pairs = (zip(call.packed_lengths, call.packed_key_lengths, strict=True) for call in calls)
    return {pair for documents in pairs for pair in documents if pair[0] >= min(LONG_ROWS)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_some_layouts_have_a_document_of_thousands_of_rows(device: str) -> None:
    some = drawn(domain_of(SHAPES, device))
    # Two of twelve layouts, of which wide heads are too slow.
    assert 0.03 < sum(bool(long_of([call])) for call in some) / len(some) < 0.25
    assert {rows for rows, _ in long_of(some)} <= set(LONG_ROWS)
    assert all(1 <= keys <= FEW_KEYS for _, keys in long_of(some))
    # Always the same of a layout.
    assert len({rows for rows, _ in long_of(some)}) <= 2


def test_all_have_one_where_it_is_aimed_at_and_none_where_it_is_not_wanted() -> None:
    calls = drawn(domain_of(SHAPES, **LONG))
    assert all(long_of([call]) for call in calls)
    assert len({rows for rows, _ in long_of(calls)}) > 2
    assert not long_of(drawn(domain_of(SHAPES, long_rows=(False,))))


@pytest.mark.parametrize(
    "refused",
    [{"noncausal": False, "queries_without_keys": False}, {"noncausal": False, "causal_needs_equal_lengths": True}],
)
def test_what_takes_no_document_of_few_keys_has_none(refused: dict[str, bool]) -> None:
    stated = dataclasses.replace(SHAPES, **refused)  # type: ignore[arg-type]
    assert not long_of(drawn(domain_of(stated)))


def test_the_case_mode_draws_them_too() -> None:
    found = set[tuple[int, int]]()
    aimed = domain_of(SHAPES, **LONG)
    few_cases("kernel", aimed, 1, lambda case: found.update(long_of([case])), 20)
    assert found


class LastRowOfMany(LoopKernel):
    """Of a document of 2,048 queries and more the last row is half as large again."""

    capabilities = SHAPES

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        ends = [end for end, rows in zip(accumulate(metadata.lengths_q), metadata.lengths_q) if rows >= 2048]
        factor = torch.ones(len(q), 1, 1).index_fill(0, torch.tensor([end - 1 for end in ends], dtype=torch.long), 1.5)
        return attended._replace(out=attended.out * factor.to(q.dtype))


def test_a_fault_from_thousands_of_rows_on_is_seen_without_a_hint() -> None:
    domain = domain_of(SHAPES, "cpu")
    right, wrong = backend_of(domain), Backend("last row", LastRowOfMany(), levels=("kernel",))
    for seed in range(8):
        batch = draw_batch(Random(seed), Sweep((16, 32), seed), right, domain, 30)
        assert batch is not None
        long = {index for index, call in enumerate(batch.calls) if max(call.packed_lengths) >= 2048}
        assert set(judge(batch, wrong, CPU).failing()) == long
        if long:
            assert not judge(batch, right, CPU).failing()
            return
    raise AssertionError("no batch of eight has such a document")


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_compiled_ahead_is_what_is_drawn(wanted: bool) -> None:
    chosen = Configuration("bf16", 16, 2, 2, False)
    stated = dataclasses.replace(SHAPES, configurations=(chosen,))
    domain = domain_of(stated, long_rows=(wanted,))
    ahead = {call.lengths for number in range(LAYOUTS) for call in warmed_up(Step(chosen, number + 1), domain)}
    assert {tuple(sorted(lengths)) for lengths in ahead} >= {tuple(sorted(call.lengths)) for call in drawn(domain)}
    assert all((max(lengths) >= min(LONG_ROWS)) is wanted for lengths in ahead)


def warmed_up(step: Step, domain: Domain) -> list[Case]:
    return [*warm_up_cases(step, backend_of(domain), domain)]


def test_they_can_be_aimed_at() -> None:
    long = ("queries", "256-")
    assert Aims(Space(SHAPES, "cuda", ("kernel",), ("kernel",)), (long,), ("kernel",)).why_not(("batch",)) is None


def test_an_lse_has_a_gradient_where_one_is_taken() -> None:
    stated = dataclasses.replace(SHAPES, lse_gradient=True)
    assert {call.lse_gradient for call in drawn(domain_of(stated))} == {False, True}
    assert {call.lse_gradient for call in drawn(domain_of(stated, lse_gradient=(True,)))} == {True}
    assert {call.lse_gradient for call in drawn(domain_of(SHAPES))} == {False}
