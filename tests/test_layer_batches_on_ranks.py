"""Batches of layer calls that ranks share: right ones are clean, and what a single rank shows has a column."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
from commandline import Run

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.output import MisshapenResult
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch import layer_ranks
from attn_fuzz.batch.judge import judge
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.batch.layer_columns import OF_RANK, REPLICAS
from attn_fuzz.batch.layer_questions import LAYER_QUESTIONS
from attn_fuzz.batch.layer_ranks import NOT_RUN
from attn_fuzz.campaign.plan import batched_levels
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.layer_calls import LayerHow
from attn_fuzz.execution.observation import Observation
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layer_calls import draw_layer_batch
from attn_fuzz.oracle.symptoms import Crashed, DeadRowsNotZero, MissingResult, RanksDiffer
from attn_fuzz.ranks.gather import RankCall, run_ranks
from attn_fuzz.ranks.rank_group import RankFailed, RanksHung
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import layer_inputs

CPU = torch.device("cpu")
WHOLE = Case(
    lengths=(4, 2, 10, 3, 3, 6, 2, 6),
    cuts=(4, 16, 22, 28),
    ranks=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    query_norm="rms",
    rotary="default",
    dtype="bf16",
)
BATCH = CallBatch(WHOLE, (3, 5, 8))
"""Three calls over two ranks."""


def drawn(seed: int, calls: int = 12, ranks: Sequence[int] = (2, 3), tensor_ranks: Sequence[int] = (1,)) -> CallBatch:
    backend = registry.load("loop")
    domain = Domain.of(backend.kernel.capabilities_on("cpu"), "cpu", (), ranks, tensor_ranks)
    batch = draw_layer_batch(Random(seed), backend, domain, calls, (9, 33, 9)[seed % 3])
    assert batch is not None
    return batch


def asked(backend: str, question: str, batch: CallBatch = BATCH) -> Judged:
    return judge(batch, registry.load(backend), CPU, Question("nan", question))


def accused(judged: Judged) -> set[str]:
    return {name for place, name in enumerate(judged.names) if (judged.z[:, place] > 10).any()}


# What is drawn.


def test_calls_are_such_as_ranks_can_share() -> None:
    batches = [drawn(seed, ranks=(1, 2, 4), tensor_ranks=(1, 2)) for seed in range(40)]
    calls = [call for batch in batches for call in batch.calls]
    for call in calls:
        # A case says itself what its ranks cannot share.
        assert Case.from_json(call.to_json()) == call
        assert registry.load("loop").refusal(call, "cpu") is None
    assert {call.ranks for call in calls} == {1, 2, 4}
    assert {call.tensor_ranks for call in calls} == {1, 2}
    assert {call.kv_heads for call in calls if call.tensor_ranks > 1} == {1}
    assert any(call.cuts and call.causal for call in calls if call.all_ranks > 1)
    assert any(not call.causal for call in calls if call.all_ranks > 1)
    # Padding behind, and none.
    assert {call.padding > 0 for call in calls if call.all_ranks > 1} == {True, False}


def test_what_is_drawn_for_one_rank_is_as_it_was() -> None:
    backend = registry.load("loop")
    domain = Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")
    random = Random(3)
    assert draw_layer_batch(random, backend, domain, 5, 9) == drawn(3, 5, ranks=(1,))


def test_documents_that_ranks_cannot_share_make_no_batch() -> None:
    case = WHOLE.replace(lengths=(3, 5, 4), cuts=())
    assert CallBatch.of(case, (1, 3)) is None
    assert CallBatch.of(case, (2, 3)) is not None


def test_layers_that_take_ranks_have_batches_on_them() -> None:
    assert batched_levels(registry.load("loop"), ("layer",), (2,)) == ["layer"]
    assert batched_levels(registry.load("loop"), ("layer",), (1,), (2,)) == ["layer"]
    assert batched_levels(registry.load("legacy:loop"), ("layer",)) == ["layer"]
    assert batched_levels(registry.load("legacy:loop"), ("layer",), (2,)) == []


# What is judged.


@pytest.mark.slow
@pytest.mark.parametrize("question", LAYER_QUESTIONS)
@pytest.mark.parametrize(("ranks", "tensor_ranks"), [((2, 3), (1,)), ((1, 2), (2,))])
def test_correct_ranks_are_left_alone(ranks: Sequence[int], tensor_ranks: Sequence[int], question: str) -> None:
    for seed in range(3):
        batch = drawn(seed, 6, ranks, tensor_ranks)
        judged = judge(batch, registry.load("loop"), CPU, Question("nan", question))
        assert not judged.failing(), (seed, judged.worst(), judged.broken)
        assert not judged.refused
        assert not judged.touched


@pytest.mark.slow
def test_a_call_gives_what_it_gives_by_itself() -> None:
    run = layer_ranks.CallsOnRanks(BATCH, layer_inputs(WHOLE, CPU), CPU, "nan")
    backend = registry.load("loop")
    found = layer_ranks.run_on_ranks(run, backend, BATCH.calls, "nan", LayerHow(watched=False))
    assert not found.broken
    for index, call in enumerate(BATCH.calls):
        (alone,) = run_ranks(backend, call, run.of_call(index), ("nan",), CPU)
        for name in ("out", "dx", "dk"):
            assert torch.equal(found.results[name][slice(*BATCH.tokens[index])], alone.results[name])
        assert torch.equal(found.results["d_query"][index], alone.results["d_query"])


FAULTS = {
    "R10": (REPLICAS, RanksDiffer),
    "R11": (OF_RANK, DeadRowsNotZero),
}
"""What single ranks show, and results as a whole do not."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_single_rank_shows_has_a_column(fault: str) -> None:
    column, symptom = FAULTS[fault]
    judged = asked(f"fault:{fault}", "", CallBatch(WHOLE.replace(lengths=(4, 2, 10, 3, 3, 6, 2, 5, 1)), (3, 5, 9)))
    assert column in accused(judged)
    assert judged.symptom(column) is symptom
    assert not accused(asked("loop", ""))


@pytest.mark.slow
def test_one_rank_is_what_several_are_held_to() -> None:
    """``cut elsewhere`` runs the same calls on one rank, and by the budgets of several."""
    seen: list[int] = []
    loop = registry.load("loop")

    def layer(weights: dict[str, torch.Tensor], case: Case, kernel: object) -> object:
        seen.append(case.all_ranks)
        return loop.layer(weights, case, kernel)  # type: ignore[arg-type]

    judged = judge(BATCH, dataclasses.replace(loop, layer=layer), CPU, Question("nan", "cut elsewhere"))  # type: ignore[arg-type]
    assert not judged.failing()
    assert seen == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["R02", "R08", "T04"])
def test_faults_of_ranks_are_found_by_batches(fault: str) -> None:
    from attn_fuzz.evaluation.seeded_faults import find_fault

    mark = find_fault(fault, seed=1, mode="batch")
    assert mark.finding is not None
    assert mark.minimal


# What goes wrong.


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Exception]], list[int]]:
    """Has ranks raise in calls of so many tokens; gives how many calls each message asked for."""

    def fall(errors: dict[int, Exception]) -> list[int]:
        asked_for: list[int] = []

        def run_calls(
            backend: Backend, calls: Sequence[RankCall], poison: str, device: torch.device
        ) -> list[Observation]:
            asked_for.append(len(calls))
            for call in calls:
                if (error := errors.get(call.case.tokens)) is not None:
                    raise error
            return [Observation(poison, {}) for _ in calls]

        monkeypatch.setattr(layer_ranks, "run_calls", run_calls)
        return asked_for

    return fall


def test_calls_that_raise_are_told_by_their_number(falling: Callable[[dict[int, Exception]], list[int]]) -> None:
    asked_for = falling({6: MisshapenResult("on rank 1 of 2, the output's shape"), 14: UnsupportedCase("not this")})
    judged = asked("loop", "")
    # All at once, and then one after another.
    assert asked_for == [3, 1, 1, 1]
    assert judged.refused == {2: "not this"}
    assert judged.fallen(1) is MissingResult
    # The first gave no results at all.
    assert "missing" in judged.broken[0]


def test_where_ranks_hang_the_calls_behind_are_not_run(falling: Callable[[dict[int, Exception]], list[int]]) -> None:
    asked_for = falling({6: RanksHung("of 2 ranks, 1 wait for what never comes")})
    judged = asked("loop", "")
    assert asked_for == [3, 1, 1]
    assert judged.refused == {2: NOT_RUN}
    assert judged.fallen(1) is Crashed
    assert "RanksHung" in judged.broken[1]


def test_what_ranks_raise_after_other_calls_only_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, broken in ((RankFailed("rank 1 of 2 raised"), {2}), (RanksHung("of 2 ranks, 1 wait"), set[int]())):

        def together(
            backend: Backend,
            calls: Sequence[RankCall],
            poison: str,
            device: torch.device,
            error: Exception = error,
        ) -> list[Observation]:
            if len(calls) > 1:
                raise error
            return [Observation(poison, {}) for _ in calls]

        monkeypatch.setattr(layer_ranks, "run_calls", together)
        monkeypatch.setattr(layer_ranks, "collect", lambda *_: None)
        run = layer_ranks.CallsOnRanks(BATCH, layer_inputs(WHOLE, CPU), CPU, "nan")
        found = layer_ranks.run_on_ranks(run, registry.load("loop"), BATCH.calls, "nan", LayerHow(watched=False))
        assert set(found.broken) == broken


def test_a_lack_of_memory_is_nobodys(falling: Callable[[dict[int, Exception]], list[int]]) -> None:
    falling({6: torch.OutOfMemoryError("too little")})
    with pytest.raises(torch.OutOfMemoryError):
        asked("loop", "")


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_command_draws_ranks_in_batches(attn_fuzz: Run) -> None:
    words = ("run", "--mode", "batch", "-b", "loop", "--ranks", "2", "--level", "layer", "--device", "cpu")
    done = attn_fuzz(*words, "--cases", "12", "--json")
    assert done.status == 0, done.err
    assert '"cases": 12' in done.out
