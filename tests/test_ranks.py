"""Ranks: who owns what, what a rank's layer computes, teams of processes and their recovery, what the checks see."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from commandline import Run, sentence
from devices import needs_cuda
from hunts import finding_of, first_failure, job_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_calls import at_odds, gathers, unwaited

from attn_fuzz.backends.collectives import Collectives, Done, Handle
from attn_fuzz.backends.faults.fault import RankFault, TensorFault, faults
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.backends.rank_layer import RankLayer, preprocess_rank
from attn_fuzz.backends.registry import load
from attn_fuzz.campaign.plan import CampaignOptions, default_workers, plan
from attn_fuzz.cases.repair import fitted
from attn_fuzz.cases.smaller import fewer_ranks
from attn_fuzz.evaluation.seeded_faults import find_fault, is_minimal
from attn_fuzz.execution.process import share_of_processors
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.strategies import cases
from attn_fuzz.oracle.checks.ranks import attended
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.ranks.client import HostError
from attn_fuzz.ranks.pickling import packed, unpacked
from attn_fuzz.ranks.progress import KEPT, Progress
from attn_fuzz.ranks.rank_group import RankFailed, RankGroups, RanksHung, rank_groups, seats
from attn_fuzz.reduction.minimise import minimise
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.layer import layer_inputs
from attn_fuzz.reference.layout import Span, active_extent, micro_sequences, rank_slice, rank_slices, segments
from attn_fuzz.reference.memory import same_bits
from results.render import rank_tables as rank_results
from results.render.rank_rate import processor_seconds
from results.render.tables import load as load_results

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ACROSS = Case(lengths=(4, 1, 11), padding=2, cuts=(6, 12), heads=4, kv_heads=2, capacity=3, rotary="default")
"""Documents over rank borders and cuts, dead rows, padding on the last rank, GQA, spare rows; 2, 3 or 6 ranks."""

FAULTS_OF_RANKS = ROOT / "results" / "faults_ranks.json"
RANK_FAULTS = [name for name, fault in faults().items() if issubclass(fault, (RankFault, TensorFault))]


@st.composite
def spread(draw: st.DrawFn) -> Case:
    """A causal layout on 1 to 8 ranks."""
    ranks = draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    padding, cuts = fitted(ranks, lengths, draw(st.integers(0, 5)), draw(st.lists(st.integers(0, 40), max_size=4)))
    if sum(lengths) + padding == 0:
        padding = 1
    return Case(lengths=tuple(lengths), padding=padding, cuts=cuts, ranks=ranks)


bounded = settings(deadline=None, max_examples=40)


# Layout and metadata.


@bounded
@given(spread())
def test_every_token_is_owned_by_exactly_one_rank(case: Case) -> None:
    owners = torch.stack([attended(case, rank)[1] for rank in range(case.ranks)])
    assert (owners.sum(0) == 1).all()
    slices = rank_slices(case)
    assert [slices[0].begin, slices[-1].end] == [0, case.tokens]
    assert all(one.end == next_one.begin for one, next_one in zip(slices, slices[1:], strict=False))


@bounded
@given(spread())
def test_ranks_together_attend_to_what_one_rank_does(case: Case) -> None:
    """Each pair of a query and a key belongs to one rank: that of the query."""

    def pairs(parts: list[Span]) -> list[tuple[int, int]]:
        return [
            (query, key)
            for part in parts
            for segment in segments(case.packed_lengths, part)
            for query in range(*segment.queries)
            for key in range(segment.keys.begin, query + 1)  # causal
        ]

    split = pairs(list(rank_slices(case)))
    assert len(split) == len(set(split))
    assert set(split) == set(pairs(list(micro_sequences(case))))


@bounded
@given(spread())
def test_metadata_of_ranks_agrees_with_the_reference_layout(case: Case) -> None:
    for part in micro_sequences(case):
        for rank in range(case.ranks):
            made = preprocess_rank(case.packed_lengths, *part, rank, case.ranks, causal=True, device=CPU)
            own = rank_slice(part, rank, case.ranks)
            active = segments(case.packed_lengths, own)
            assert (made.begin, made.end) == own
            assert (made.shared_begin, made.shared_end) == part
            assert made.past_length == own.begin
            assert (made.first_document_begin, made.end) == active_extent(case.packed_lengths, own)
            assert made.varlen.lengths_q == tuple(segment.queries.length for segment in active)
            assert made.varlen.lengths_k == tuple(segment.keys.length for segment in active)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 3), (2, 2), (-1, 2)])
def test_unequal_parts_are_errors(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"no equal part for rank {rank} of {ranks}"):
        preprocess_rank([4, 4], 0, 8, rank, ranks, causal=True, device=CPU)


@bounded
@given(st.integers(1, 8), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 9), st.data())
def test_fitted_layouts_fit(ranks: int, lengths: list[int], padding: int, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=4))
    fit, moved = fitted(ranks, lengths, padding, cuts)
    assert abs(fit - padding) < ranks or sum(lengths) + padding == 0
    if sum(lengths) + fit:
        case = Case(lengths=tuple(lengths), padding=fit, cuts=moved, ranks=ranks)
        assert fitted(ranks, lengths, fit, moved) == (case.padding, case.cuts)


@pytest.mark.slow
def test_drawn_cases_meet_every_kind_of_border() -> None:
    domain = Domain.of(load("loop").kernel.capabilities, "cpu", ranks=(2, 3))
    seen: set[str] = set()

    @settings(max_examples=300, database=None, deadline=None, derandomize=True)
    @given(cases("layer", domain))
    def look(case: Case) -> None:
        assert case.ranks in (2, 3)
        begins = {0}
        for length in case.packed_lengths:
            begins.add(max(begins) + length)
        slices = rank_slices(case)
        seen.add("straddling" if any(own.begin not in begins for own in slices) else "on borders")
        seen.update("no beginning" for own in slices if not begins & set(range(*own)))
        seen.update("padding alone" for own in slices if case.padding and own.begin >= sum(case.lengths))
        seen.update("cut" for _ in case.cuts)
        seen.add("causal" if case.causal else "non-causal")
        assert load("loop").refusal(case, "cpu") is None

    look()
    assert seen == {"straddling", "on borders", "no beginning", "padding alone", "cut", "causal", "non-causal"}


# One rank's layer.


class Alone(Collectives):
    """One rank, which has everything already."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def gather(self, own: torch.Tensor, whole: torch.Tensor) -> Handle:
        whole.copy_(own)
        return Done()

    def reduce_scatter(self, whole: torch.Tensor, own: torch.Tensor) -> Handle:
        own.copy_(whole)
        return Done()

    def block(self, size: int) -> Collectives:
        return self


def test_one_rank_alone_has_the_bits_of_the_buffered_layer() -> None:
    inputs, kernel = layer_inputs(ACROSS, CPU), load("loop").kernel
    layers = (BufferedLayer(inputs.weights, ACROSS, kernel), RankLayer(inputs.weights, ACROSS, kernel, Alone()))
    for part in micro_sequences(ACROSS):
        first, second = (layer.forward(inputs.x[slice(*part)], *part) for layer in layers)
        assert same_bits(first, second)
    for part in reversed(micro_sequences(ACROSS)):
        first, second = (layer.backward(inputs.dout[slice(*part)]) for layer in layers)
        assert same_bits(first, second)
    for first, second in zip(*(layer.parameter_gradients().values() for layer in layers), strict=True):
        assert same_bits(first, second)


class _Waiting(Handle):
    def __init__(self, log: list[str], what: str) -> None:
        self._log, self._what = log, what

    def wait(self) -> None:
        self._log.append(f"wait {self._what}")


class _Noting(Collectives):
    """Rank 1 of 2, whose neighbour sends ones; notes who gathers where and who waits when."""

    def __init__(self) -> None:
        super().__init__(1, 2)
        self.log: list[str] = []
        self.targets: list[torch.Tensor] = []

    def gather(self, own: torch.Tensor, whole: torch.Tensor) -> Handle:
        self.log.append("gather")
        self.targets.append(whole)
        whole[: len(own)] = 1
        whole[len(own) :] = own
        return _Waiting(self.log, "gather")

    def reduce_scatter(self, whole: torch.Tensor, own: torch.Tensor) -> Handle:
        assert whole.dtype == own.dtype == torch.float32
        own.copy_(whole[len(own) :])
        return Done()

    def block(self, size: int) -> Collectives:
        return self


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_keys_are_gathered_straight_into_the_buffer_and_waited_for(dtype: str) -> None:
    case = Case(lengths=(4, 4), dtype=dtype)
    inputs, collectives = layer_inputs(case, CPU), _Noting()
    layer = RankLayer(inputs.weights, case, load("loop").kernel, collectives)
    layer.forward(inputs.x[4:8], 0, 8)
    assert collectives.log == ["gather", "gather", "wait gather", "wait gather"]
    for target, buffer in zip(collectives.targets, (layer.buffer.k, layer.buffer.v), strict=True):
        assert target.data_ptr() == buffer.data_ptr()
    layer.backward(inputs.dout[4:8])


def test_keys_and_values_side_by_side_are_gathered_at_once() -> None:
    case = Case(lengths=(4, 4), heads=2, kv_heads=2, memory="fused")
    inputs, collectives = layer_inputs(case, CPU), _Noting()
    layer = RankLayer(inputs.weights, case, load("loop").kernel, collectives)
    layer.forward(inputs.x[4:8], 0, 8)
    assert collectives.log == ["gather", "wait gather"]
    (target,) = collectives.targets
    assert target.data_ptr() == layer.buffer.k.data_ptr()
    assert torch.equal(target, torch.cat((layer.buffer.k, layer.buffer.v), 1))
    layer.backward(inputs.dout[4:8])


def test_processors_are_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7, 8}, raising=False)
    assert [share_of_processors(place, 2) for place in range(2)] == [{2, 3}, {5, 7, 8}]
    assert [share_of_processors(place, 6) for place in (0, 5)] == [None, {8}]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert share_of_processors(0, 2) is None


# Teams of processes.


def test_tensors_travel_to_the_bit() -> None:
    tensors = [
        torch.tensor([[1.0, torch.nan], [-0.0, 3e-41]]),
        torch.arange(6, dtype=torch.bfloat16)[::2],
        torch.empty(0, 3, dtype=torch.float16),
        torch.tensor(3, dtype=torch.int64),
    ]
    for sent, got in zip(tensors, unpacked(packed(tensors)), strict=True):
        assert same_bits(sent, got)


def test_few_gpus_are_shared_and_enough_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    for gpus, ranks, transport, devices in [
        (1, 2, "gloo", ["cuda:0", "cuda:0"]),
        (3, 2, "nccl", ["cuda:2", "cuda:0"]),
        (3, 4, "gloo", ["cuda:2"] * 4),
    ]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        taken = seats(torch.device("cuda", gpus - 1), ranks, Path("team"))
        assert {seat.transport for seat in taken} == {transport}
        assert [seat.device for seat in taken] == devices
    assert {(seat.transport, seat.device) for seat in seats(CPU, 2, Path("team"))} == {("gloo", "cpu")}


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is certain is not waited for: in a test nothing depends on what the other ranks would have said."""
    monkeypatch.setattr("attn_fuzz.ranks.rank_group.SETTLED", 0.1)
    monkeypatch.setattr("attn_fuzz.ranks.rank_group.GRACE", 0.1)


def clean(case: Case) -> None:
    assert [str(symptom) for symptom in examine(case, load("loop"), "cpu").symptoms] == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_correct_ranks_are_clean(dtype: str, ranks: int) -> None:
    clean(ACROSS.replace(dtype=dtype, ranks=ranks))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tensor_ranks"), [(1, 2), (3, 2), (1, 3)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_correct_tensor_parallel_ranks_are_clean(dtype: str, ranks: int, tensor_ranks: int) -> None:
    case = ACROSS.replace(heads=6, kv_heads=1, query_norm="rms", value_norm="rms", shared_key_value=True)
    clean(case.replace(dtype=dtype, ranks=ranks, tensor_ranks=tensor_ranks))


@pytest.mark.slow
def test_tensor_parallel_budgets_are_near_those_of_one_rank() -> None:
    """The same values; two halves stored and added have about the variance of one sum stored, if a little more."""
    case = Case(lengths=(12,), heads=4, head_dim=8, dtype="bf16")
    alone, shared = (
        Trial(each, load("loop"), CPU).careful_answer for each in (case, case.replace(ranks=1, tensor_ranks=2))
    )
    for name in ("out", "dx", "dk"):
        torch.testing.assert_close(alone[name].value, shared[name].value)
        ratio = (shared[name].variance.mean() / alone[name].variance.mean()).item()
        assert 0.8 < ratio < 2, name


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
def test_tensor_parallelism_needs_one_key_head_and_equal_shares(heads: int, kv_heads: int) -> None:
    with pytest.raises(CaseError, match="2 tensor_ranks need one K/V head"):
        Case(lengths=(4,), heads=heads, kv_heads=kv_heads, tensor_ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["fused", "head_major", "sliced", "strided", "misaligned"])
def test_buffers_of_any_layout_are_gathered(memory: str) -> None:
    clean(ACROSS.replace(memory=memory, ranks=2, key_norm="rms", shared_key_value=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["backup", "sdpa_dense", "sdpa_nested"])
def test_other_kernels_run_on_ranks(backend: str) -> None:
    case = Case(lengths=(3, 5), cuts=(4,), ranks=2)
    assert examine(case, load(backend), "cpu").symptoms == ()


@pytest.mark.slow
def test_ranks_are_processes_of_their_own() -> None:
    one, other = rank_groups().call(2, CPU, os.getpid, ())
    assert len({one, other, os.getpid()}) == 3
    assert [one, other] == rank_groups().call(2, CPU, os.getpid, ())


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_the_team_replaced() -> None:
    before = rank_groups().call(2, CPU, os.getpid, ())
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(RankFailed, match="rank 1 of 2 died with exit code -9"):
        rank_groups().call(2, CPU, os.getpid, ())
    after = rank_groups().call(2, CPU, os.getpid, ())
    assert not set(before) & set(after)
    clean(ACROSS.replace(ranks=2))


@pytest.mark.slow
def test_ranks_that_end_within_a_call_are_named() -> None:
    with pytest.raises(RankFailed, match="rank 0 of 2 died with exit code 3"):
        rank_groups().call(2, CPU, os._exit, (3,))


@pytest.mark.slow
def test_ranks_that_block_are_given_up_and_replaced() -> None:
    before = rank_groups().call(2, CPU, os.getpid, ())
    with pytest.raises(RanksHung, match=r"of 2 ranks, 0, 1 did not answer within 0\.05 seconds"):
        rank_groups().call(2, CPU, signal.pause, (), seconds=0.05)
    assert not set(before) & set(rank_groups().call(2, CPU, os.getpid, ()))
    clean(ACROSS.replace(ranks=2))


@pytest.mark.slow
def test_a_rank_that_waits_for_one_that_came_back_is_given_up_at_once() -> None:
    before = rank_groups().call(2, CPU, gathers, ((2, 2),))
    with pytest.raises(RanksHung, match="of 2 ranks, 1 came back without taking part in the last 1 collective calls"):
        # Patience would outlast the test; nothing here depends on how long it takes.
        rank_groups().call(2, CPU, gathers, ((3, 2),), seconds=100_000.0)
    assert not set(before) & set(rank_groups().call(2, CPU, gathers, ((4, 4),)))


@pytest.mark.slow
def test_ranks_that_come_back_out_of_step_are_replaced() -> None:
    """A collective that no rank waited for would be met by the next case."""
    before = rank_groups().call(2, CPU, os.getpid, ())
    with pytest.raises(RanksHung, match="0 came back without taking part in the last 2 collective calls of 1"):
        rank_groups().call(2, CPU, unwaited, (2,))
    assert not set(before) & set(rank_groups().call(2, CPU, gathers, ((1, 1),)))


@pytest.mark.slow
def test_ranks_that_meet_in_different_collectives_are_given_up_at_once() -> None:
    """Neither comes back, so that no count would ever say it."""
    before = rank_groups().call(2, CPU, os.getpid, ())
    with pytest.raises(RanksHung, match="0 and 1 met in different collective calls"):
        rank_groups().call(2, CPU, at_odds, (), seconds=100_000.0)
    assert not set(before) & set(rank_groups().call(2, CPU, gathers, ((20, 20),)))


@pytest.mark.parametrize(
    ("first", "second", "odds"),
    [
        ("gr", "gr", None),
        ("", "r", None),
        ("g", "gr", None),
        ("r", "ggg", (0, 1)),
        ("gggr", "ggg", None),
        ("gggrg", "gggg", (0, 1)),
        # What is longer ago than a word tells is forgotten.
        ("r" + "g" * KEPT, "g" * (KEPT + 1), None),
        ("r" + "g" * (KEPT - 1), "g" * KEPT, (0, 1)),
        ("r", "g" * (KEPT + 1), None),
    ],
)
def test_kinds_of_collectives_are_compared_where_both_are(
    first: str, second: str, odds: tuple[int, int] | None, tmp_path: Path
) -> None:
    progress = Progress(tmp_path / "progress", 2)
    for rank, kinds in enumerate((first, second)):
        for kind in kinds:
            progress.begin(rank, reduces=kind == "r")
    assert progress.at_odds() == odds
    assert progress.counts() == [len(first), len(second)]


@pytest.mark.slow
def test_when_their_host_dies_ranks_end_and_others_take_their_place() -> None:
    mine = RankGroups()
    before = [*mine.call(2, CPU, os.getpid, ()), *mine.call(3, CPU, os.getpid, ())]
    os.kill(mine.call(2, CPU, os.getppid, ())[0], signal.SIGKILL)
    with pytest.raises(HostError, match="is gone"):
        mine.call(2, CPU, signal.pause, ())
    for ranks in (2, 3):
        assert not set(before) & set(mine.call(ranks, CPU, os.getpid, ()))
    mine.close()


@pytest.mark.slow
def test_teams_whose_host_has_died_can_be_closed() -> None:
    mine = RankGroups()
    os.kill(mine.call(2, CPU, os.getppid, ())[0], signal.SIGKILL)
    mine.close()


@pytest.mark.slow
def test_what_a_rank_raises_comes_back() -> None:
    with pytest.raises(RankFailed, match="rank 0 of 2 raised ValueError: invalid literal"):
        rank_groups().call(2, CPU, int, ("x",))


@pytest.mark.slow
def test_closing_ends_every_process() -> None:
    mine = RankGroups()
    pids = mine.call(3, CPU, os.getpid, ())
    mine.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_hangs_and_deaths_have_their_symptoms(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, symptom in ((RanksHung("0 did not answer"), "Hung"), (RankFailed("rank 1 died"), "Crashed")):

        def fall(*arguments: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("attn_fuzz.oracle.trial.run_ranks", fall)
        verdict = examine(ACROSS.replace(ranks=2), load("loop"), "cpu")
        assert [type(found).__name__ for found in verdict.symptoms] == [symptom]


def test_a_users_layer_and_the_legacy_one_take_no_ranks() -> None:
    case = Case(lengths=(4,), ranks=2)
    for name in ("legacy:loop", "layer:examples/my_layer.py:Layer", "fault:H4"):
        assert load(name).refusal(case, "cpu") == "more than one rank"
    assert load("fault:R01").refusal(Case(lengths=(4,), heads=2, tensor_ranks=2), "cpu") == "tensor parallelism"


@pytest.mark.slow
def test_noncausal_documents_are_not_spread() -> None:
    case = Case(lengths=(4, 4), causal=False, ranks=2)
    assert load("loop").refusal(case, "cpu") is None
    assert load("loop").refusal(case.replace(lengths=(3, 5)), "cpu") == "non-causal documents spread over ranks"
    clean(case)


# Checks and faults.


@pytest.mark.slow
def test_one_ranks_buffers_are_looked_at() -> None:
    """A change on rank 1 alone, in rows whose values come from rank 0, is seen by the checks of ranks and no other."""
    case = ACROSS.replace(ranks=2)
    trial = Trial(case, load("loop"), CPU)
    seen, owned = attended(case, 0)
    row = int((~seen & ~owned).nonzero()[0])
    for observation in trial.observations:
        observation.by_rank[1]["k"][0] += 1
        observation.by_rank[0]["dv"][row] = 1e-30
    from attn_fuzz.oracle.checks import CHECKS

    found = {symptom.check: symptom for check in CHECKS for symptom in check(trial)}
    assert set(found) == {"replicas", "dead_rows_by_rank"}
    assert "on rank 1 than on rank 0" in found["replicas"].message
    assert "no query of rank 0" in found["dead_rows_by_rank"].message


def test_shrinking_tries_every_lower_number_of_ranks() -> None:
    tried = [case.ranks for case in fewer_ranks(ACROSS.replace(ranks=6)) if case is not None]
    assert list(dict.fromkeys(tried)) == [1, 2, 3, 4, 5]
    smallest = minimise(ACROSS.replace(ranks=6), lambda case: case.ranks >= 3)
    assert (smallest.ranks, smallest.tokens, smallest.cuts) == (3, 3, ())


def test_shrinking_takes_tokens_away_where_padding_would_hide_what_shows() -> None:
    smallest = minimise(Case(lengths=(3,), ranks=3), lambda case: case.ranks > 1 and not case.padding)
    assert (smallest.ranks, smallest.tokens) == (2, 2)


EXPECTED = {
    "R01": "budget",
    "R02": "dead_rows",
    # Rows of another rank are wrong keys, and as often as not another document's.
    "R03": "budget isolation",
    "R04-gather": "unwritten",
    "R04-reduce": "unwritten",
    "R05": "budget",
    "R06": "budget",
    "R07": "unwritten",
    # Sums that should be exact; which of the two is asked first is chance.
    "R08": "exact_accumulation additivity",
    "R09": "budget",
    "R10": "replicas",
    "R11": "dead_rows_by_rank",
    "R12": "budget",
    # Where there is rotary, positions of the longer document run out of the table, and the call raises.
    "R13": "dead_rows runs",
    "R14": "budget",
    "R15": "buffer_intact",
    "R16": "budget",
    "R17": "budget",
    "R18": "runs",
    "R19": "budget",
    "T01": "budget",
    "T02": "budget",
    "T03": "budget",
    "T04": "budget",
}


SMALLEST = {row["id"]: Case.from_dict(row["case"]) for row in json.loads(FAULTS_OF_RANKS.read_text())["faults"]}
"""What each was shrunk to when the committed table was made."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", RANK_FAULTS)
def test_drawn_cases_show_a_rank_fault(fault: str) -> None:
    """Hunted without hints on as many ranks as it may take; the first case that fails is enough."""
    found = first_failure(job_of(fault, seed=4, cases=200))
    assert set(EXPECTED[fault].split()) & set(found.checks)


@pytest.mark.slow
@pytest.mark.parametrize("fault", RANK_FAULTS)
def test_a_rank_fault_shows_on_the_fewest_ranks(fault: str, short_waits: None) -> None:
    """In the smallest case, as the committed table has it: one with a token less would pass."""
    case = SMALLEST[fault]
    assert case.all_ranks == 2
    assert case.tokens <= 8
    clean(case)
    verdict = examine(case, load(f"fault:{fault}"), CPU)
    assert set(EXPECTED[fault].split()) & set(verdict.checks)
    assert is_minimal(finding_of(f"fault:{fault}", case, verdict))


TELLING = ("R01", "R11", "T01")
"""A wrong value, one that a single rank shows, and tensor parallelism; ``faults`` hunts and shrinks all of them."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", TELLING)
def test_a_rank_fault_is_shrunk_to_the_fewest_ranks(
    fault: str, short_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hypothesis need not shrink what is shrunk after it.
    monkeypatch.setattr("attn_fuzz.campaign.worker._SHRINK_SECONDS", 0.5)
    mark = find_fault(fault, seed=4)
    assert mark.finding is not None
    assert mark.minimal
    assert set(EXPECTED[fault].split()) & set(mark.finding.checks)
    assert mark.finding.case.all_ranks == 2
    assert mark.finding.case.tokens <= 8


def test_every_rank_fault_is_expected() -> None:
    assert set(EXPECTED) == set(RANK_FAULTS) == set(SMALLEST)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_campaign_over_ranks_runs_layers_only(attn_fuzz: Run) -> None:
    options = ("--ranks", "2", "--tensor-ranks", "1", "--cases", "5", "-b", "sdpa_dense", "--device", "cpu", "--json")
    done = attn_fuzz("run", *options, "--workers", "1")
    assert done.status == 0, done.err
    told = done.json["backends"]["sdpa_dense"]
    # Five in each mode.
    assert told["cases"] == 10
    assert {kind.split()[0] for kind in told["by_kind"]} == {"layer", "batch-layer"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--ranks", "100"], "make 100 ranks, each a process; 64 are the most"),
        (["--ranks", "13", "--tensor-ranks", "5"], "make 65 ranks"),
        (["--ranks", "2", "--level", "kernel"], "a kernel call has no ranks"),
    ],
)
def test_ranks_that_cannot_be_are_bad_usage(options: list[str], reason: str, attn_fuzz: Run) -> None:
    done = attn_fuzz("run", "-b", "loop", "--device", "cpu", "--cases", "1", *options)
    assert reason in sentence(done)


@pytest.mark.parametrize(("device", "ranks", "workers"), [("cpu", 1, 8), ("cpu", 2, 6), ("cpu", 8, 2), ("cuda", 8, 2)])
def test_workers_leave_room_for_their_ranks(
    device: str, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert default_workers(device, ranks) == workers


@pytest.mark.parametrize(("gpus", "cores", "workers"), [(1, 64, 16), (4, 64, 64), (4, 32, 32)])
def test_every_gpu_has_its_workers(gpus: int, cores: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert default_workers("cuda") == workers
    assert default_workers("cuda:0") == min(cores, 16)


@pytest.mark.parametrize(("ranks", "places"), [(1, [0, 1, 2, 3]), (2, [0, 2, 0, 2]), (4, [0] * 4), (8, [0] * 4)])
def test_teams_are_spread_over_the_gpus(ranks: int, places: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    options = CampaignOptions(device="cuda", workers=4, seconds=9.0, levels=("layer",), ranks=(1, ranks))
    made = plan(("loop",), options)
    assert [job.device for job in made] == [f"cuda:{place}" for place in places]


def test_the_table_of_clean_cases_is_that_of_the_committed_results() -> None:
    page, told = rank_results.PAGE.read_text(), load_results(rank_results.FOLDER)
    assert rank_results.with_ranks(page, told) == page, "run python -m results.render.rank_tables"
    assert all(row[7] == "0" for row in rank_results.rank_rows(told))


def test_a_page_without_a_place_for_the_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no section between"):
        rank_results.with_ranks("# Ranks", [])


def test_processor_time_is_that_of_all_processes_below(tmp_path: Path) -> None:
    second = os.sysconf("SC_CLK_TCK")
    for pid, parent, own, ended in [(7, 1, 50, 4), (8, 7, 1, 2), (9, 8, 3, 0), (10, 1, 99, 0)]:
        (tmp_path / str(pid)).mkdir()
        times = f"{own * second} 0 {ended * second} 0"
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b) S {parent} 0 0 0 0 0 0 0 0 0 {times} 20")
    assert processor_seconds(7, tmp_path) == 10
    assert processor_seconds(7, tmp_path / "7") is None


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ranks_on_gpus_are_clean(dtype: str, ranks: int) -> None:
    case = Case(lengths=(5, 1, 9), padding=1, cuts=(8,), heads=4, kv_heads=2, head_dim=64, dtype=dtype, ranks=ranks)
    assert [str(symptom) for symptom in examine(case, load("backup"), "cuda").symptoms] == []
