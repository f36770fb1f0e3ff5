"""Known answers for all documents at once: the inputs and verdicts of a plain loop over documents, rows and heads."""

from __future__ import annotations

import math
from random import Random

import plain_known_answers as plain
import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import run_batch
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.length_sweeps import Sweep, draw_case
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.known_answer import KNOWN_ANSWERS
from attn_fuzz.oracle.known_answer.census import Census
from attn_fuzz.oracle.known_answer.common_factor import keys_weigh_otherwise
from attn_fuzz.oracle.known_answer.compared import Compared, KnownAnswer
from attn_fuzz.oracle.known_answer.every_row import EveryRow
from attn_fuzz.oracle.known_answer.needle import Needle
from attn_fuzz.oracle.known_answer.swamping import Swamping, swamped_documents
from attn_fuzz.oracle.symptoms import Element, Place
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import call_segments
from attn_fuzz.reference.profile import Profile

CPU = torch.device("cpu")
LOOP = registry.load("loop")
PROFILE = LOOP.kernel.profile


def drawn(seed: int) -> Case:
    """A call of a dozen documents, a few of them empty, of all options that the loop takes; small, for plain loops."""
    domain = Domain.of(LOOP.kernel.capabilities_on("cpu"), "cpu")
    case = draw_case(Random(seed), Sweep((5, 17), seed), LOOP, domain, 12)
    assert case is not None
    if case.heads > 4:
        case = case.replace(heads=4, kv_heads=2 if case.heads > case.kv_heads else 4)
    lengths = tuple(min(length, 40) for length in case.lengths)
    # Every other one has values of another head_dim than keys.
    values = {"head_dim_v": (None, 3, None, 20)[seed % 4]}
    return case.replace(lengths=lengths, head_dim=min(case.head_dim, 24), **values)


def long_documents(seed: int) -> Case:
    """A call with documents of more keys than the shortest that can be swamped, one of them odd."""
    return Case(
        level="kernel",
        lengths=(4, 3, 9, 2, 2, 0),
        key_lengths=(40, 3, 33, 0, 700, 64),
        heads=2,
        kv_heads=1 + seed % 2,
        head_dim=8,
        head_dim_v=(None, 12, 8, 5)[seed % 4],
        dtype=("bf16", "fp16")[seed % 2],
        seed=seed,
    )


def same(one: Inputs, other: Inputs) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("q", "k", "v", "dout"))


def right(case: Case, known: KnownAnswer) -> plain.Results:
    """Results of a correct kernel."""
    return run_batch(BatchTensors(CallBatch.of_one(case), known.inputs, CPU), LOOP, "nan").results


def spoilt(results: plain.Results, random: Random) -> plain.Results:
    """One element of some results moved, by anything from a last bit to NaN."""
    moved = {name: x.clone(memory_format=torch.contiguous_format) for name, x in results.items()}
    for name in random.sample(sorted(moved), 2):
        elements = moved[name].view(-1)
        if len(elements):
            elements[random.randrange(len(elements))] += random.choice((2.0**-10, 0.3, 1.0, -40.0, 1e4, math.nan))
    return moved


def accused(case: Case, known: KnownAnswer, results: plain.Results) -> plain.Wrong:
    """(result, document) of all that is wrong."""
    found = set()
    for compared in known.judge(results):
        wrong = compared.of_documents(len(case.packed_lengths))
        beyond = wrong if wrong.dtype == torch.bool else wrong > LIMIT
        found |= {(compared.tensor, document) for document in beyond.nonzero()[:, 0].tolist()}
    return found


SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 24))]


@pytest.mark.parametrize("seed", SEEDS)
def test_census_and_support_are_what_a_loop_makes_of_them(seed: int) -> None:
    case, random = drawn(seed), Random(seed)
    census = Census.of(case, CPU, PROFILE)
    assert same(census.inputs, plain.census_inputs(case, census.shift))
    for results in [clean := right(case, census), *(spoilt(clean, random) for _ in range(6))]:
        wrong = plain.census_wrong(case, census.inputs, results, census.shift)
        assert accused(case, census, results) == wrong
        assert (results is clean) <= (not wrong)


@pytest.mark.parametrize("seed", SEEDS)
def test_needles_are_what_a_loop_makes_of_them(seed: int) -> None:
    case, random = drawn(seed), Random(seed)
    needle, expected = Needle.of(case, CPU, PROFILE), plain.needle_inputs(case)
    assert (needle is None) == (expected is None)
    if needle is None or expected is None:
        return
    inputs, picked = expected
    assert same(needle.inputs, inputs)
    assert {
        (row, head): int(needle.picked[row, head]) for row, head in (needle.picked >= 0).nonzero().tolist()
    } == picked
    for results in [clean := right(case, needle), *(spoilt(clean, random) for _ in range(6))]:
        wrong = plain.needle_wrong(case, inputs, picked, results, needle.slack)
        assert accused(case, needle, results) == wrong
        assert (results is clean) <= (not wrong)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_in_every_row_are_what_a_loop_makes_of_them(seed: int) -> None:
    case, random = drawn(seed), Random(seed)
    known = EveryRow.of(case, CPU, PROFILE)
    assert same(known.inputs, plain.every_row_inputs(case))
    for results in [clean := right(case, known), *(spoilt(clean, random) for _ in range(3))]:
        wrong = plain.every_row_wrong(case, known.inputs, results, PROFILE)
        assert accused(case, known, results) == wrong
        assert (results is clean) <= (not wrong)


@pytest.mark.parametrize("seed", SEEDS)
def test_swamped_sums_are_what_a_loop_makes_of_them(seed: int) -> None:
    case, random = long_documents(seed), Random(seed)
    known = Swamping.of(case, CPU, PROFILE)
    assert known is not None
    assert same(known.inputs, plain.swamping_inputs(case))
    clean = right(case, known)
    last = [segment.queries.end - 1 for segment in plain.swamped_documents(case)]
    assert known.judged.nonzero()[:, 0].tolist() == [0, 2, 4]
    seen = set()
    for results in [clean, *(spoilt(clean, random) for _ in range(6))]:
        if results is not clean:
            # What is judged are a few rows of many.
            results["out"][random.choice(last), :, random.randrange(case.value_dim)] += random.choice(
                (1e-4, 0.5, math.nan)
            )
            results["dq"][random.choice(last), :, random.randrange(8)] *= random.choice((1.001, 1.5, 0.0))
        wrong = plain.swamping_wrong(case, known.inputs, results)
        assert accused(case, known, results) == wrong
        assert (results is clean) <= (not wrong)
        seen |= wrong
    assert {name for name, _ in seen} == {"out", "dq"}


def test_every_drawn_kind_of_document_is_among_the_cases() -> None:
    cases = [drawn(seed) for seed in range(24)]
    lengths = {(q > 0, k > 0, q > k) for case in cases for q, k in zip(case.packed_lengths, case.packed_key_lengths)}
    assert {(False, True, False), (True, True, True), (True, True, False)} <= lengths
    assert {case.heads > case.kv_heads for case in cases} == {True, False}
    assert {case.effective_window[0] >= 0 for case in cases} == {True, False}
    assert any(case.softcap for case in cases)
    assert {case.dtype for case in cases} == {"fp32", "bf16", "fp16"}


def test_documents_that_are_swamped_see_all_of_their_keys() -> None:
    for window in ((-1, -1), (39, -1), (38, -1), (700, 0)):
        case = long_documents(0).replace(window=window)
        listed = [index for index, held in enumerate(swamped_documents(case)) if held]
        assert listed == [segment.document for segment in plain.swamped_documents(case)]


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_the_first_that_is_wrong_is_named_with_what_was_there_and_what_should_be(name: str) -> None:
    case = long_documents(1).replace(key_lengths=(40, 3, 33, 0, 256, 64))
    known = KNOWN_ANSWERS[name](case, CPU, PROFILE)
    assert known is not None
    result = "dv" if name == "every row" else "out"
    results = right(case, known)
    segments = call_segments(case)
    for document in (4, 2):
        span = segments[document].keys if result == "dv" else segments[document].queries
        results[result][span.end - 1, 1, 5] += 50.0
    # In no order of documents: dV is judged some of them at a time.
    compared = Compared.joined([each for each in known.judge(results) if each.tensor == result][::-1])
    wrong = compared.first()
    assert wrong is not None
    span = segments[2].keys if result == "dv" else segments[2].queries
    assert wrong.element.place == Place(2, span.length - 1, 1, 5)
    assert wrong.element.got == results[result][span.end - 1, 1, 5].item()
    assert abs(wrong.element.got - wrong.element.expected) == pytest.approx(50, rel=0.05)


def test_nan_is_named_before_what_is_infinite() -> None:
    rows = torch.zeros(1, dtype=torch.int64)
    got = torch.tensor([[[0.5, -math.inf, math.nan, 3.0]]], dtype=torch.float64)
    wrong = Compared("out", rows, rows, got, torch.zeros_like(got), got != 0).first()
    assert wrong is not None
    assert wrong.element.nan
    assert wrong.element.place == Place(0, 0, 0, 2)
    assert Compared("out", rows, rows, got, got, got == 7).first() is None


def test_a_place_is_named_as_far_as_it_is_known() -> None:
    assert str(Place(1, 2, 3, 4)) == "document 1, row 2, head 3, channel 4"
    assert str(Place(None, 0, None, 4)) == "row 0, channel 4"
    assert str(Place(1, 2, 0)) == "document 1, row 2, head 0"
    assert not Element(Place(0, 0), 1.0, math.nan).nan


def test_keys_of_other_weights_have_a_factor_in_common_in_each_document() -> None:
    """One document's may be its own."""
    documents, rows = torch.tensor([0, 0, 0, 1, 1]), torch.arange(5)
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5], dtype=torch.float64)[:, None, None]

    def compared(got: list[float]) -> Compared:
        came = torch.tensor(got, dtype=torch.float64)[:, None, None]
        return Compared("dv", documents, rows, came, expected, came != expected)

    assert keys_weigh_otherwise(compared([0.3, 0.3, 0.31, 0.6, 0.6]))
    assert not keys_weigh_otherwise(compared([0.5, 0.5, 0.0, 0.5, 0.5]))
    assert not keys_weigh_otherwise(compared([0.3, 0.3, math.nan, 0.5, 0.5]))
    assert not keys_weigh_otherwise(compared([0.3, 0.3, 0.3, 0.5, 0.7]))


def test_a_kernel_that_keeps_scores_in_half_precision_is_asked_for_what_fits() -> None:
    case = Case(level="kernel", lengths=(70,), heads=2, head_dim=8, scale=2.0**-4)
    shifts = [Census.of(case.replace(seed=s), CPU, Profile(scores_dtype="fp16")).shift for s in range(4)]
    assert max(map(abs, shifts)) <= 2.0**15
