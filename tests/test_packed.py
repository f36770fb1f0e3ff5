"""The packed mode: silent on correct backends, accuses faulty ones by document, cuts out what the case mode takes."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from random import Random

import pytest
import torch
from commandline import Run, sentence

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.output import require_output
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch import batch_size
from attn_fuzz.batch.batch_run import NAMES
from attn_fuzz.batch.batch_size import masks_whole_pack
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.batch.packed import PACKED_SCHEDULE, judge_packed, packed_failure
from attn_fuzz.batch.verdicts import ROWS
from attn_fuzz.campaign.batch_worker import Sizing
from attn_fuzz.campaign.messages import Assignment, Failed, Finished, Found, Message, Trying
from attn_fuzz.campaign.packed_worker import CROWD, PackedWorker, work_on_packed
from attn_fuzz.campaign.plan import takes_batches
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.runner import run_kernel
from attn_fuzz.findings.finding import Finding
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.length_sweeps import LONGEST, Sweep, draw_case
from attn_fuzz.oracle.deviations import LIMIT, row_spreads
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import Crashed, InputsChanged, MissingResult, PoisonLeaked, WrongSpread
from attn_fuzz.reduction.packed import ENOUGH, bisected, candidates, plainer
from attn_fuzz.reference.answer import kernel_answer, kernel_inputs
from attn_fuzz.reference.case import Case

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
AGAIN = Question("nan", "again")


def drawn(name: str, seed: int, documents: int, longest: tuple[int, int] = (9, 17)) -> Case:
    backend = registry.load(name)
    domain = Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")
    case = draw_case(Random(seed), Sweep(longest, seed), backend, domain, documents)
    assert case is not None
    return case


def fuzzed(name: str, *, calls: int, seed: int = 0) -> tuple[Finding | None, Finished]:
    """What the packed mode finds on a backend, and the end of the assignment."""
    messages: list[Message] = []
    work_on_packed(Assignment(backend=name, device="cpu", seed=seed, cases=calls, stop_at_first=True), messages.append)
    assert not [message for message in messages if isinstance(message, Failed)]
    found = [message.finding for message in messages if isinstance(message, Found)]
    last = messages[-1]
    assert isinstance(last, Finished)
    return (found[0] if found else None), last


class Crowded(LoopKernel):
    """The last document is wrong where there are sixteen or more."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        if len(metadata.lengths_q) < 16:
            return attended
        factor = torch.ones(len(q), 1, 1)
        factor[-metadata.lengths_q[-1] :] = 1.25
        return attended._replace(out=attended.out * factor)


class Raising(LoopKernel):
    """Raises on calls of more than three documents."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        if len(metadata.lengths_q) > 3:
            raise RuntimeError("too many documents")
        return super().attend(q, k, v, metadata, options)


class Scribbling(LoopKernel):
    """Writes to its keys."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        k.data[0] += 1
        return attended


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.kernel_names())
def test_correct_backends_are_not_accused(name: str) -> None:
    backend = registry.load(name)
    if backend.kernel.why_unavailable("cpu") is not None:
        pytest.skip("not on this machine")
    # One of them takes ten times as long as any other.
    documents = 20 if name == "sdpa_nested_math" else 60
    for seed in range(3):
        assert packed_failure(drawn(name, seed, documents), backend, CPU, AGAIN) is None


@pytest.mark.slow
def test_rows_are_those_of_the_case_mode() -> None:
    case = drawn("loop", 1, 20).replace(values="gaussian")
    backend = registry.load("loop")
    judged = judge_packed(case, backend, CPU)
    inputs = kernel_inputs(case, "cpu")
    answer = kernel_answer(case, inputs, backend.kernel.profile)
    observation = run_kernel(backend, case, inputs, "nan", CPU)
    for name in ROWS:
        worst = LIMIT * row_spreads(case, observation.results[name], answer[name]).max().item()
        column = judged.z[:, judged.names.index(f"{name}-rows")]
        assert column.max().item() == pytest.approx(worst, rel=1e-6)


def test_a_row_that_is_off_as_a_whole_is_seen() -> None:
    backend = registry.load("trigger:6,13,row:loop")
    case = Case(level="kernel", lengths=(3, 6, 9), key_lengths=(3, 13, 17), head_dim=128, dtype="bf16")
    found = packed_failure(case, backend, CPU)
    assert found is not None
    assert found.symptom is WrongSpread
    assert found.documents == (1,)


def test_two_poisons_are_held_against_one_another() -> None:
    backend = registry.load("fault:X29")
    case = Case(level="kernel", lengths=(3, 6, 9), key_lengths=(3, 13, 17), dtype="bf16")
    assert packed_failure(case, backend, CPU) is None
    found = packed_failure(case, backend, CPU, AGAIN)
    assert found is not None
    assert found.symptom is PoisonLeaked


def test_so_they_are_for_kernels_that_promise_nothing_and_repeat_themselves() -> None:
    backend = registry.load("fault:X29")
    kernel = copy.copy(backend.kernel)
    silent = dataclasses.replace(kernel.capabilities, repeatable=None, repeatable_backward=None)
    kernel.capabilities = silent  # type: ignore[misc]
    case = Case(level="kernel", lengths=(3, 6, 9), key_lengths=(3, 13, 17), dtype="bf16")
    found = packed_failure(case, dataclasses.replace(backend, kernel=kernel), CPU, AGAIN)
    assert found is not None
    assert found.symptom is PoisonLeaked


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["M18", "M20-causal", "M51-detached", "X10", "M05"])
def test_a_planted_fault_is_found_and_shrunk(fault: str) -> None:
    finding, _ = fuzzed(f"fault:{fault}", calls=6)
    assert finding is not None
    assert "packed" not in finding.checks
    assert len(finding.case.lengths) <= 3
    assert len(finding.original_case.lengths) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("how", ["scale", "key"])
def test_a_size_in_hundreds_is_found_and_shrinks_to_itself(how: str) -> None:
    finding, last = fuzzed(f"trigger:11,23,{how}:loop", calls=60)
    assert finding is not None
    assert (finding.case.lengths, finding.case.key_lengths) == ((11,), (23,))
    assert (finding.case.heads, finding.case.head_dim) == (1, 1)
    # 17 * 33 sizes in every third call; two thirds of its documents walk through them, but where rows are long, as in a
    # share of 0.35. One walk, and the documents of the call that ends it.
    assert last.tally.documents <= 17 * 33 * 3 * 3 / 2 / (1 - 0.35) + 512


def test_every_size_comes_to_be_asked_everything() -> None:
    assert {question.asked for question in PACKED_SCHEDULE} == {"keys", "again", "needle", "every row", "swamping"}
    for longest in LONGEST.values():
        assert math.gcd(len(PACKED_SCHEDULE), len(longest)) == 1


@pytest.mark.slow
def test_what_is_cut_out_is_what_the_backend_takes() -> None:
    """A fault in calls that a backend declares not to take is none of its own."""
    backend = Backend("crowded", Crowded(), levels=("kernel",))
    backend.kernel.limit = lambda case, calls: "few documents" if len(case.lengths) < 20 else None  # type: ignore[method-assign]
    case = Case(level="kernel", lengths=(3, 0, 5, 1) * 10, key_lengths=(4, 2, 5, 3) * 10, head_dim=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda name: backend)
        worker = PackedWorker(Assignment(backend="crowded", device="cpu", seed=0, levels=("kernel",)), lambda m: None)
    assert worker.fails(case, AGAIN)
    small = bisected(case, lambda each: worker.fails(each, AGAIN), 60.0)
    assert len(small.lengths) == 20


def test_a_call_that_lacks_memory_is_made_smaller() -> None:
    class Cramped(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            if len(metadata.lengths_q) > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
            return super().attend(q, k, v, metadata, options)

    messages = fuzzed_kernel(Cramped(), 3)
    assert not [message.finding.messages for message in messages if isinstance(message, Found)]
    last = messages[-1]
    assert isinstance(last, Finished)
    assert last.tally.refused
    assert last.tally.cases == 3


@pytest.mark.slow
def test_what_needs_company_is_found_by_bisection() -> None:
    backend = Backend("crowded", Crowded(), levels=("kernel",))
    case = Case(level="kernel", lengths=(3, 0, 5, 1) * 20, key_lengths=(4, 2, 5, 3) * 20, head_dim=4)
    found = packed_failure(case, backend, CPU)
    assert found is not None
    assert found.documents == (79,)
    assert not any(packed_failure(small, backend, CPU) for small in candidates(case, found.documents))
    small = bisected(case, lambda each: packed_failure(each, backend, CPU) is not None, 60.0)
    assert ENOUGH < len(small.lengths) == 16
    small = plainer(small, lambda each: packed_failure(each, backend, CPU) is not None, 60.0)
    assert len(small.lengths) == 16
    assert max(small.lengths) == max(small.packed_key_lengths) == 1
    assert small.head_dim == 1


def test_a_call_that_raises_or_changes_its_inputs_fails_as_a_whole() -> None:
    case = drawn("loop", 1, 10)
    for kernel, symptom, words in (
        (Raising(), Crashed, "RuntimeError: too many documents"),
        (Shortened(), MissingResult, "the output's shape is"),
        (Scribbling(), InputsChanged, "changed"),
    ):
        found = packed_failure(case, Backend("broken", kernel), CPU)
        assert found is not None
        assert found.symptom is symptom
        assert words in found.message
        assert len(found.documents) == len(case.lengths)


class Shortened(LoopKernel):
    """Leaves the last row out, which is seen as it is of a user's kernel."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        require_output(attended.out[:-1], q, v)
        return attended


class Refusing(LoopKernel):
    """Takes nothing, and does not say so."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        raise NotImplementedError("not today")


class Flat(LoopKernel):
    """Reads whole vectors of channels, which not every memory layout has."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        if q.shape[-1] > 1 and q.stride(-1) != 1:
            raise RuntimeError("channels must be contiguous")
        return super().attend(q, k, v, metadata, options)


def fuzzed_kernel(kernel: LoopKernel, calls: int) -> list[Message]:
    messages: list[Message] = []
    job = Assignment(backend="mine", device="cpu", seed=3, levels=("kernel",), cases=calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda name: Backend(name, kernel, levels=("kernel",)))
        patch.setattr("attn_fuzz.campaign.packed_worker.SIZING", Sizing(first=4, most=4, seconds=0.5))
        patch.setattr("attn_fuzz.campaign.packed_worker.CROWD", 4)
        work_on_packed(job, messages.append)
    return messages


def test_a_backend_that_refuses_everything_is_no_finding_and_no_endless_work() -> None:
    messages = fuzzed_kernel(Refusing(), 5)
    assert not [message for message in messages if isinstance(message, Found)]
    last = messages[-1]
    assert isinstance(last, Failed)
    assert "not today" in last.reason


@pytest.mark.slow
def test_an_unusual_layout_that_is_not_taken_is_refused() -> None:
    messages = fuzzed_kernel(Flat(), 16)
    assert not [message.finding.messages for message in messages if isinstance(message, Found)]
    last = messages[-1]
    assert isinstance(last, Finished)
    assert last.tally.refused


def test_cut_out_documents_keep_their_values() -> None:
    case = drawn("loop", 0, 12)
    whole, kept = kernel_inputs(case, "cpu"), (3, 7)
    small = subset(case, kept)
    assert small is not None
    rows = torch.cat(
        [torch.arange(*span) for span in ((sum(case.lengths[:i]), sum(case.lengths[: i + 1])) for i in kept)]
    )
    assert torch.equal(kernel_inputs(small, "cpu").q, whole.q[rows])


def test_a_sweep_meets_every_size_once() -> None:
    sweep = Sweep((16, 32), 1234)
    pairs = [pair for _ in range(3) for pair in zip(*(side.tolist() for side in sweep.take(187)), strict=True)]
    assert sorted(pairs) == [(q, k) for q in range(17) for k in range(33)]


def test_a_kernel_that_is_wrong_for_one_size_is_one_like_any_other_for_batches() -> None:
    assert takes_batches("trigger:11,23:loop", ("kernel", "layer"))
    assert registry.load("trigger:11,23:loop").kernel.capabilities == registry.load("loop").kernel.capabilities


def test_layouts_have_documents_of_every_kind() -> None:
    case = drawn("loop", 0, 400, (16, 32))
    pairs = list(zip(case.packed_lengths, case.packed_key_lengths, strict=True))
    kinds = {(q > k) - (q < k) for q, k in pairs} | {"empty" for q, k in pairs if q == k == 0}
    assert kinds == {-1, 0, 1, "empty"}
    assert drawn("loop", 0, 400, (16, 32)) == case


MASKING = [("loop", False), ("backup", True), ("sdpa_dense", True), ("sdpa_nested", True)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "masks"), MASKING)
def test_kernels_that_mask_the_whole_pack_are_known_by_what_they_make(
    name: str, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "_seconds", lambda call: len(call.case.lengths))
    backend = registry.load(name)
    assert masks_whole_pack(backend, Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")) is masks


@pytest.mark.slow
@pytest.mark.parametrize(("name", "masks"), [("loop", False), ("backup", True)])
def test_others_are_known_by_their_time(name: str, masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "_forms_a_mask", lambda call: False)
    backend = registry.load(name)
    assert masks_whole_pack(backend, Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")) is masks


def test_masks_over_the_whole_pack_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "free_bytes", lambda: 4 << 30)
    for longest in ((16, 32), (64, 128), (256, 400)):
        documents = batch_size.bearable(longest)
        assert documents >= batch_size.affordable(longest)
        # Scores of four heads, in float32, some six times over.
        pairs = documents * longest[0] / 2 * documents * longest[1] / 2
        assert documents == batch_size.affordable(longest) or pairs * 4 * 4 * 6 < (4 << 30) / 2


def test_cut_outs_have_a_key() -> None:
    case = Case(level="kernel", lengths=(2, 3, 4), key_lengths=(0, 3, 0))
    assert subset(case, [0, 2]) is None
    assert [small.key_lengths for small in candidates(case, (0,))] == [(0, 3), (0, 3, 0)]


def clean(batch: CallBatch, question: Question) -> Judged:
    """What is said of a batch with which nothing is wrong."""
    return Judged(batch, torch.zeros(len(batch.case.lengths), len(NAMES), dtype=torch.float64), question)


@pytest.mark.slow
def test_calls_of_more_documents_than_time_allows_come_early() -> None:
    messages: list[Message] = []
    job = Assignment(backend="crowd", device="cpu", seed=1, levels=("kernel",), cases=5, stop_at_first=True)
    with pytest.MonkeyPatch.context() as patch:
        # Nothing but the number of documents is asked here: no kernel, no reference.
        patch.setattr(registry, "load", lambda name: Backend(name, LoopKernel(), levels=("kernel",)))
        patch.setattr(PackedWorker, "judge", lambda self, batch, question: clean(batch, question))
        work_on_packed(job, messages.append)
    cases = [Case.from_json(message.case) for message in messages if isinstance(message, Trying)]
    assert max(len(case.lengths) for case in cases) >= CROWD
    assert len(cases[0].lengths) < CROWD


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_command_finds_and_stores(attn_fuzz: Run, tmp_path: Path) -> None:
    command = ("run", "--mode", "packed", "--device", "cpu", "--json", "--first")
    options = ("--backend", "fault:M18", "--cases", "5", "--workers", "1", "--store", str(tmp_path))
    done = attn_fuzz(*command, *options)
    assert done.status == 1, done.err
    assert done.json["documents"] >= 64
    (finding,) = done.json["findings"]
    assert (tmp_path / f"{finding['id']}.json").is_file()


@pytest.mark.parametrize("arguments", [["--mode", "broad"], ["--backend", "trigger:3:loop"]])
def test_what_cannot_be_is_one_sentence(arguments: list[str], attn_fuzz: Run) -> None:
    assert sentence(attn_fuzz("run", "--device", "cpu", *arguments))


@pytest.mark.parametrize("how", ["scale", "key", "row"])
def test_the_rare_fault_takes_rows_behind_the_last_document(how: str) -> None:
    backend = registry.load(f"trigger:11,23,{how}:loop")
    case = Case(level="kernel", lengths=(2, 3), capacity=2, head_dim=128, dtype="bf16")
    assert examine(case, backend, "cpu").symptoms == ()
    assert examine(case.replace(lengths=(2, 11), key_lengths=(3, 23)), backend, "cpu").symptoms
