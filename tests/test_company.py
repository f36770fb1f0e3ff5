"""A document alone and in company: bits where they are promised, budgets otherwise, and counts of how often not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.faults.company import InvariantFault
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.loop import Loop, attend
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.output import MisshapenResult
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.batch_run import COMPANY
from attn_fuzz.batch.judge import judge
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.campaign.messages import Tally
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cli.counted import counted_lines
from attn_fuzz.oracle.checks.company import same_in_company
from attn_fuzz.oracle.relations.company import alone, chosen, counted, packs
from attn_fuzz.oracle.symptoms import MissingResult, NotBatchInvariant, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

CPU = torch.device("cpu")
CASE = Case(level="kernel", lengths=(3, 5, 2), key_lengths=(6, 5, 9), heads=2, head_dim=8)
BATCH = CallBatch(Case(level="kernel", lengths=(3, 4, 2, 5, 1, 3, 6), heads=2, head_dim=8), (1, 3, 4, 7))
ASKED = Question("finite", "company")
NONE = dict.fromkeys((counted("forward"), counted("backward")), 1) | {
    counted(which, moved=True): 0 for which in ("forward", "backward")
}


class Invariant(LoopKernel):
    """The loop over copies of its documents, and what is done to what it gives back."""

    def __init__(
        self,
        deed: Callable[[VarlenMetadata, torch.Tensor], torch.Tensor] = lambda metadata, out: out,
        *,
        promised: bool = True,
    ) -> None:
        self._deed, self._loop = deed, type("Loop", (InvariantFault,), {})()
        self.capabilities = dataclasses.replace(  # type: ignore[misc]
            LoopKernel.capabilities, batch_invariant=promised, batch_invariant_backward=promised
        )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        assert isinstance(self._loop, Loop)
        out, lse = attend(self._loop, q, k, v, metadata, options)
        return Attended(self._deed(metadata, out), lse, "loop")


def backend(kernel: LoopKernel) -> Backend:
    return Backend("invariant", kernel, levels=("kernel",))


def asked(kernel: LoopKernel, case: Case = CASE) -> tuple[list[Symptom], Trial]:
    trial = Trial(case, backend(kernel), CPU)
    return list(same_in_company(trial)), trial


def last_bits(metadata: VarlenMetadata, out: torch.Tensor) -> torch.Tensor:
    """Off by two units in the last place where the call has a long document."""
    return out * (1 + 2.0**-22) if metadata.max_seqlen_k > 9 else out


def wrong(metadata: VarlenMetadata, out: torch.Tensor) -> torch.Tensor:
    """Of a call of a single document, too large by a tenth."""
    return out * 1.1 if len(metadata.lengths_q) == 1 else out


# The packs.


def test_a_document_keeps_its_values_in_every_pack() -> None:
    for seed in range(0, 40, 5):
        case = CASE.replace(seed=seed)
        place = chosen(case)
        assert place is not None
        single = alone(case, place)
        assert single is not None
        every = [single, *packs(case, place)]
        names = {pack.case.packed_ids[pack.place] for pack in every}
        assert names == {place}
        assert {len(pack.case.packed_lengths) for pack in every} == {1, 3}
        sizes = {(pack.case.packed_lengths[pack.place], pack.case.packed_key_lengths[pack.place]) for pack in every}
        assert sizes == {(case.lengths[place], case.packed_key_lengths[place])}
        # The longest document of a crowd is another one.
        assert max(every[-1].case.packed_key_lengths) == (9 if seed % 2 else 9 + 64)


def test_packs_of_a_crowd_take_a_few_looks_at_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    case, looks, names = CASE.replace(lengths=(1,) * 20_000, key_lengths=None), [0], Case.packed_ids.fget
    assert names is not None

    def looked(self: Case) -> tuple[int, ...]:
        looks[0] += 1
        return names(self)

    monkeypatch.setattr(Case, "packed_ids", property(looked))
    for seed in (0, 1):
        assert len(list(packs(case.replace(seed=seed), 7))) == 1
    assert looks[0] < 20


@pytest.mark.parametrize(
    "case", [CASE.replace(memory="broadcast"), CASE.replace(lengths=(0, 0, 2), key_lengths=(6, 5, 0))]
)
def test_documents_that_have_nothing_of_their_own_are_not_looked_at(case: Case) -> None:
    assert chosen(case) is None
    assert asked(Invariant(), case)[0] == []


# Single cases.


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(3, 5, 2), (4,)])
def test_a_kernel_that_keeps_its_promise_is_clean(dtype: str, lengths: tuple[int, ...]) -> None:
    found, trial = asked(Invariant(), CASE.replace(dtype=dtype, lengths=lengths, key_lengths=None))
    assert found == []
    assert trial.counted == NONE


def test_other_last_bits_break_a_promise_and_are_counted_without_one() -> None:
    found, trial = asked(Invariant(last_bits))
    assert {type(symptom) for symptom in found} == {NotBatchInvariant}
    assert {symptom.tensor for symptom in found} == {"out", "dq", "dk", "dv"}
    assert "alone and" in found[0].message
    assert "in company, among documents of 73/73, " in found[0].message
    assert found[0].element is not None
    unpromised, other = asked(Invariant(last_bits, promised=False))
    assert unpromised == []
    assert trial.counted == other.counted == dict.fromkeys(NONE, 1)


def test_what_is_wrong_in_some_company_is_told_without_a_promise() -> None:
    found, _ = asked(Invariant(wrong, promised=False))
    assert {symptom.tensor for symptom in found} == {"out", "dq", "dk", "dv"}
    assert all(symptom.z is not None and symptom.z > 10 for symptom in found)


def of_shapes(kernel: Invariant) -> Invariant:
    """The same as one that compiles for shapes, so that few calls have the same."""
    kernel.capabilities = dataclasses.replace(kernel.capabilities, layouts=4)  # type: ignore[misc]
    return kernel


def test_what_compiles_for_shapes_meets_few_of_them() -> None:
    met = set[tuple[tuple[int, ...], ...]]()

    def deed(metadata: VarlenMetadata, out: torch.Tensor) -> torch.Tensor:
        met.add(tuple(sorted(zip(metadata.lengths_q, metadata.lengths_k, strict=True))))
        return out

    for seed in range(0, 40, 5):
        found, trial = asked(of_shapes(Invariant(deed)), CASE.replace(key_lengths=None, seed=seed))
        assert found == []
        assert trial.counted == NONE
    # The case's own, in any order, and the longest document alone.
    assert met == {((2, 2), (3, 3), (5, 5)), ((5, 5),)}
    met.clear()
    assert judged(of_shapes(Invariant(deed))).counted[counted("forward")] == 4
    calls = [BATCH.call(index).lengths for index in range(4)]
    assert met == {tuple((n, n) for n in sorted(each)) for lengths in calls for each in (lengths, (max(lengths),))}


def test_and_is_held_to_what_it_promises_all_the_same() -> None:
    broken = judged(of_shapes(Invariant(wrong)))
    assert broken.symptom(COMPANY) is NotBatchInvariant
    assert broken.failing()
    found, _ = asked(of_shapes(Invariant(wrong)))
    assert {symptom.tensor for symptom in found} == {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize("how", ["strided", "compiled"])
def test_company_that_is_not_taken_is_not_asked_for(how: str) -> None:
    kernel, case = Invariant(last_bits), CASE
    if how == "strided":
        # Each way in which rows may lie would be compiled for, too.
        kernel, case = of_shapes(kernel), CASE.replace(memory="sliced")
    else:
        kernel.compiled = True  # type: ignore[misc]
    found, trial = asked(kernel, case)
    assert (found, dict(trial.counted)) == ([], {})


# Batches.


def judged(kernel: LoopKernel, batch: CallBatch = BATCH, count: int | None = None) -> Judged:
    return judge(batch, backend(kernel), CPU, ASKED, asked=count)


def test_a_batch_counts_a_document_of_every_call() -> None:
    clean = judged(Invariant())
    assert not clean.failing()
    assert clean.counted == {name: 4 * number for name, number in NONE.items()}
    assert judged(Invariant(), count=2).counted[counted("forward")] == 2


def test_a_batch_says_whose_bits_are_others() -> None:
    def deed(metadata: VarlenMetadata, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + 2.0**-22) if len(metadata.lengths_q) == 1 else out

    broken = judged(Invariant(deed))
    column = broken.z[:, broken.names.index(COMPANY)]
    places = [begin + (chosen(BATCH.call(index)) or 0) for index, (begin, _) in enumerate(BATCH.spans)]
    assert set(column.nonzero()[:, 0].tolist()) <= set(places)
    assert broken.symptom(COMPANY) is NotBatchInvariant
    assert len(broken.failing()) == broken.counted[counted("forward", moved=True)] == 4
    unpromised = judged(Invariant(deed, promised=False))
    assert not unpromised.failing()
    assert unpromised.counted == broken.counted


def test_a_batch_holds_other_company_to_the_budgets() -> None:
    for seed in range(3):
        other = judged(Invariant(wrong, promised=False), BATCH.other(seed))
        # What is wrong of documents alone is wrong in the calls that have one, too, and of all others by this alone.
        assert len(other.failing()) == 4


def test_a_call_that_falls_over_other_company_is_told_by_its_number() -> None:
    def deed(metadata: VarlenMetadata, out: torch.Tensor) -> torch.Tensor:
        if len(metadata.lengths_q) == 4:
            raise RuntimeError("four")
        return out

    assert judged(Invariant(deed)).broken == dict.fromkeys(range(4), "RuntimeError: four")

    def misshapen(metadata: VarlenMetadata, out: torch.Tensor) -> torch.Tensor:
        if len(metadata.lengths_q) == 4:
            raise MisshapenResult("four")
        return out

    told = judged(Invariant(misshapen))
    assert {told.fallen(index) for index in range(4)} == {MissingResult}


# Counts.


def test_counts_are_added_up_and_told_in_a_sentence() -> None:
    first, second = Tally(), Tally()
    first.count({counted("forward"): 3, counted("forward", moved=True): 1})
    second.count({counted("forward"): 4, counted("backward"): 4, "calls compiled by torch": 2})
    first.add(second)
    assert list(counted_lines(first.counted)) == [
        "documents with other bits in other company: 1 of 7 forward, 0 of 4 backward",
        "calls compiled by torch: 2",
    ]
    assert list(counted_lines({})) == []


@pytest.mark.parametrize("fault", ["C01", "C02", "C03"])
def test_the_seeded_faults_promise_what_the_loop_around_them_keeps(fault: str) -> None:
    stated = registry.load(f"fault:{fault}").kernel.capabilities
    assert stated.batch_invariant
    assert stated.batch_invariant_backward
