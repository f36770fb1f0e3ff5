"""The batch mode: calls are those of the case mode, correct backends are left alone, what fails is handed over."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from commandline import Run
from devices import needs_cuda

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Configuration, UnsupportedCase
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.batch_run import NAMES
from attn_fuzz.batch.judge import LAUNCHED, SCHEDULE, judge, schedule_on, usually_asked
from attn_fuzz.batch.judged import Question
from attn_fuzz.batch.questions import QUESTIONS
from attn_fuzz.campaign import batch_worker, inquest, pool
from attn_fuzz.campaign.calls_worker import CallsWorker, work_on_batches
from attn_fuzz.campaign.messages import Assignment, Finished, Found, Message, Tally
from attn_fuzz.campaign.plan import CampaignOptions, available_backends, plan, takes_batches
from attn_fuzz.campaign.pool import Pool
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.runner import run_kernel
from attn_fuzz.findings.finding import Finding
from attn_fuzz.generation.calls import LONGEST, draw_batch, repeated
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.length_sweeps import Sweep
from attn_fuzz.oracle.deviations import LIMIT, deviations
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import Crashed, DeadRowsNotZero, MissingResult, NotExact, WrongKeys, WrongKeysBackward
from attn_fuzz.reduction.call_sequence import CallSequence, smallest, verdict_among
from attn_fuzz.reference.answer import KERNEL_TENSORS, kernel_answer, kernel_inputs
from attn_fuzz.reference.case import MEMORIES, Case, CaseError

CPU = torch.device("cpu")
EXAMPLE = (Path(__file__).resolve().parent.parent / "examples" / "my_kernel.py").read_text()
CASE = Case(
    level="kernel",
    lengths=(3, 6, 1, 9, 2, 5, 4, 8),
    key_lengths=(3, 13, 1, 17, 9, 5, 8, 8),
    heads=2,
    head_dim=8,
    dtype="bf16",
)
BATCH = CallBatch(CASE, (1, 3, 4, 8))


def drawn(name: str, seed: int, calls: int = 24) -> CallBatch:
    backend = registry.load(name)
    domain = Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")
    batch = draw_batch(Random(seed), Sweep((9, 17), seed), backend, domain, calls)
    assert batch is not None
    return batch


def test_calls_that_are_made_again_differ_in_nothing_but_their_values() -> None:
    batch = drawn("loop", 3)
    some = [0, 2]
    again = repeated(Random(1), batch, some, "cpu", 30)
    kinds = {(call.packed_lengths, call.packed_key_lengths) for call in map(batch.call, some)}
    assert {(call.packed_lengths, call.packed_key_lengths) for call in again.calls} == kinds
    assert 1 <= len(again.ends) <= 30
    alike = again.case.replace(lengths=(1,), key_lengths=(1,), values=batch.case.values, seed=batch.case.seed)
    assert alike == batch.case.replace(lengths=(1,), key_lengths=(1,), document_ids=None)
    assert len(set(again.case.packed_ids)) == len(again.case.packed_lengths)


def test_what_is_made_again_takes_no_longer_than_what_is_drawn() -> None:
    long = CallBatch(CASE.replace(lengths=(4096,), key_lengths=(64,)), (1,))
    assert len(repeated(Random(0), long, [0], "cpu", 100).ends) < 10


def fuzzed(
    backend: str | Backend,
    monkeypatch: pytest.MonkeyPatch | None = None,
    *,
    calls: int = 200,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[list[Finding], Tally]:
    """What batches find on a backend, and the tally in the end."""
    messages: list[Message] = []
    name = backend if isinstance(backend, str) else backend.name
    job = Assignment(backend=name, device=device, seed=seed, cases=calls, mode="batch", stop_at_first=True)
    if isinstance(backend, str):
        work_on_batches(job, messages.append)
    else:
        assert monkeypatch is not None
        monkeypatch.setattr(registry, "load", lambda name: backend)
        CallsWorker(job, messages.append).run()
    last = messages[-1]
    assert isinstance(last, Finished)
    return [message.finding for message in messages if isinstance(message, Found)], last.tally


@pytest.mark.slow
def test_a_seed_draws_the_same_calls_on_a_slow_machine_where_cases_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tallies = []
    for a_batch in (0.0, 30.0):
        seconds = itertools.count(step=a_batch)
        monkeypatch.setattr(batch_worker, "now", lambda device, seconds=seconds: next(seconds))
        _, tally = fuzzed("loop", calls=720)
        tallies.append((tally.cases, tally.documents, tally.by_kind, tally.worst_case))
    assert tallies[0] == tallies[1]


class Altered(LoopKernel):
    """The loop with something done to what it gives back, told how many calls there have been."""

    def __init__(self, deed: Callable[[int, VarlenMetadata, Attended], Attended]) -> None:
        self.deed, self.count = deed, 0

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        self.count += 1
        return self.deed(self.count, metadata, super().attend(q, k, v, metadata, options))


def altered(deed: Callable[[int, VarlenMetadata, Attended], Attended]) -> Backend:
    return Backend("altered", Altered(deed), levels=("kernel",))


# What a batch is.


def test_calls_are_cases_with_the_values_of_the_packed_one() -> None:
    inputs = kernel_inputs(CASE, "cpu")
    tensors_of_calls = BatchTensors(BATCH, inputs, CPU)
    for index in range(len(BATCH.ends)):
        alone = kernel_inputs(BATCH.call(index), "cpu")
        for name, mine in zip(("q", "k", "v", "dout"), tensors_of_calls.of_calls[index], strict=True):
            assert torch.equal(mine, getattr(alone, name)), name
    sizes = [BATCH.call(index).packed_lengths for index in range(len(BATCH.ends))]
    assert sizes == [(3,), (6, 1), (9,), (2, 5, 4, 8)]


def test_ends_that_make_no_calls_are_refused() -> None:
    for ends in ((), (1, 3), (3, 3, 8), (0, 8)):
        with pytest.raises(ValueError, match="rising places up to 8"):
            CallBatch(CASE, ends)


@pytest.mark.parametrize("memory", [memory for memory in MEMORIES if memory != "broadcast"])
def test_calls_lie_aligned_between_rows_of_nan(memory: str) -> None:
    batch = CallBatch(CASE.replace(memory=memory), BATCH.ends)
    tensors_of_calls = BatchTensors(batch, kernel_inputs(batch.case, "cpu"), CPU)
    for name, item in tensors_of_calls.placed.items():
        side = tensors_of_calls.sides["k" if name in "kv" else "q"]
        theirs = torch.zeros(side.rows, dtype=torch.bool)
        for begin, count in zip(side.begins, side.counts, strict=True):
            theirs[begin : begin + count] = True
            assert begin + count == side.rows or not theirs[begin + count]
            first = item.tensor[begin:].data_ptr() - item.tensor.data_ptr()
            assert first % 128 == 0
        assert item.tensor[~theirs].isnan().all()
        assert not item.tensor[theirs].isnan().any()
    assert not tensors_of_calls.changed()
    tensors_of_calls.placed["k"].tensor[tensors_of_calls.sides["k"].counts[0]] = 1.0
    assert tensors_of_calls.changed()


def test_prefix_sums_are_those_of_each_call() -> None:
    tensors_of_calls = BatchTensors(BATCH, kernel_inputs(CASE, "cpu"), CPU)
    for index, metadata in enumerate(tensors_of_calls.metadata):
        case = BATCH.call(index)
        own = VarlenMetadata(lengths_q=case.packed_lengths, lengths_k=case.packed_key_lengths, device=CPU)
        assert metadata == own
        assert torch.equal(metadata.cu_seqlens_q, own.cu_seqlens_q)
        assert torch.equal(metadata.cu_seqlens_k, own.cu_seqlens_k)
        assert metadata.cu_seqlens_k.dtype == torch.int32
    tensors_of_calls.metadata[1].cu_seqlens_k[0] = 1
    assert tensors_of_calls.changed()


@pytest.mark.parametrize("size", range(len(LONGEST["cpu"])))
def test_drawn_calls_are_such_as_the_backend_takes(size: int) -> None:
    backend = registry.load("sdpa_nested")
    domain = Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")
    for seed in range(4):
        batch = draw_batch(Random(seed), Sweep(LONGEST["cpu"][size], seed), backend, domain, 20)
        assert batch is not None
        for index in range(len(batch.ends)):
            assert backend.refusal(batch.call(index), "cpu") is None


def declared(capabilities: Capabilities) -> Backend:
    """The loop where it takes no more than this."""
    kernel = LoopKernel()
    kernel.capabilities = capabilities  # type: ignore[misc]
    return Backend("declared", kernel, levels=("kernel",))


NARROWER: dict[str, dict[str, object]] = {
    "everything": {},
    "no shared heads": {"gqa": False},
    "no rows without keys": {"queries_without_keys": False},
    "equal lengths": {"causal_needs_equal_lengths": True, "noncausal": False},
    "packed heads only": {"head_dim_multiple": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROWER)
def test_many_heads_and_long_rows_are_drawn_where_they_are_taken(name: str) -> None:
    capabilities = Capabilities(**NARROWER[name])  # type: ignore[arg-type]
    backend = declared(capabilities)
    domain, random = Domain.of(capabilities, "cpu"), Random(0)
    batches = [draw_batch(random, Sweep((16, 32), seed), backend, domain, 16) for seed in range(150)]
    cases = [batch.case for batch in batches if batch is not None]
    assert len(cases) == len(batches)
    groups = {case.heads // case.kv_heads for case in cases}
    assert (max(groups) > 8) == capabilities.gqa
    assert 0.03 < sum(case.heads > 32 for case in cases) / len(cases) < 0.2
    pairs = [(case, q, k) for case in cases for q, k in zip(case.packed_lengths, case.packed_key_lengths, strict=True)]
    long = [(case, q, k) for case, q, k in pairs if q > 1100]
    assert len(long) < 0.3 * len(cases)
    assert bool(long) == (name != "equal lengths")
    assert all(not case.causal for case, *_ in long) == (name in ("no rows without keys", "equal lengths"))
    assert all(1 <= k <= 64 and q * k * case.heads * case.head_dim <= 1 << 23 for case, q, k in long)


# What it is judged by.

SLOW = ("sdpa_nested", "sdpa_nested_math")
"""Of the CPU's backends, those that take several times as long as the others."""


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.kernel_names())
def test_correct_backends_are_not_accused(name: str) -> None:
    backend = registry.load(name)
    if backend.kernel.why_unavailable("cpu") is not None:
        pytest.skip("not on this machine")
    for seed, turn in enumerate(dict.fromkeys(SCHEDULE)):
        judged = judge(drawn(name, seed, calls=8 if name in SLOW else 16), backend, CPU, turn)
        assert judged.failing() == []
        assert not judged.touched
        assert not judged.broken
        assert not judged.refused


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", available_backends("cuda"))
def test_nor_are_they_on_a_gpu(name: str) -> None:
    # With --require-cuda a skipped test would be a failure.
    backend = registry.load(name)
    capabilities = backend.kernel.capabilities_on("cuda")
    domain = Domain.of(capabilities, "cuda")
    drawn = (draw_batch(Random(seed), Sweep((64, 128), 1), backend, domain, 40) for seed in range(20))
    # Known issues that end the process leave nothing of some.
    batch = next(each for each in drawn if each is not None)
    for turn in dict.fromkeys(schedule_on("cuda")):
        judged = judge(batch, backend, torch.device("cuda"), turn)
        assert not judged.touched
        for index in judged.failing():
            verdict = examine(judged.call(index), backend, "cuda")
            assert verdict.first is None
            assert verdict.known


def test_everything_has_its_turn() -> None:
    assert {turn.asked for turn in schedule_on("cuda")} == {name for name in QUESTIONS if name}
    assert {*schedule_on("cpu")} == {*schedule_on("cuda")} - {*LAUNCHED}
    assert {turn.poison for turn in SCHEDULE} == {"nan", "finite"}


class _Donates(torch.autograd.Function):
    """As torch's compiler does: the backward may use memory that the forward saved, so no graph can be kept."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
        if torch._C._autograd._get_current_graph_task_keep_graph():
            raise RuntimeError("compiled with non-empty donated buffers, which requires retain_graph=False")
        return dout


def test_a_compiled_backward_that_keeps_no_graph_is_no_fault() -> None:
    backend = altered(lambda count, metadata, attended: attended._replace(out=_Donates.apply(attended.out)))
    judged = judge(BATCH, backend, CPU, Question("finite", "second backward"))
    assert not judged.broken
    assert judged.failing() == []


@pytest.mark.parametrize("turn", dict.fromkeys(SCHEDULE), ids=str)
def test_half_of_the_calls_are_asked_more_than_the_others(turn: Question) -> None:
    assert not judge(BATCH, registry.load("loop"), CPU, turn).failing()
    counts: list[int] = []

    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        counts.append(len(metadata.lengths_q))
        # Every run but the first is wrong, which cannot be seen of calls that have no other.
        return attended if count <= 4 else attended._replace(out=attended.out * 2)

    failing = judge(BATCH, altered(deed), CPU, turn, asked=usually_asked(BATCH)).failing()
    assert counts[:4] == [1, 2, 1, 4]
    if turn.asked == "swamping":
        # No document is long enough.
        assert not counts[4:]
    else:
        # Keys come apart of the second call only, and are run in two parts; a document of each is alone, then with the
        # other's, and once more as there are not five.
        runs = {"merging": [2, 2], "company": [1, 1, 2, 2]}
        assert sorted(counts[4:]) == runs.get(turn.asked, [1, 2])
        assert 1 in failing
        assert set(failing) <= {0, 1}


def test_z_is_that_of_the_case_mode() -> None:
    backend = registry.load("loop")
    judged = judge(BATCH, backend, CPU)
    for index, (begin, end) in enumerate(BATCH.spans):
        case = BATCH.call(index)
        inputs = kernel_inputs(case, "cpu")
        answer = kernel_answer(case, inputs, backend.kernel.profile)
        observation = run_kernel(backend, case, inputs, "nan", CPU)
        for column, name in enumerate(KERNEL_TENSORS):
            worst = deviations(case, observation.results[name], answer[name]).max().item()
            assert judged.z[begin:end, column].max().item() == pytest.approx(worst, rel=1e-6)


def test_the_forward_without_autograd_is_held_to_the_budget() -> None:
    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        return attended if attended.out.requires_grad else attended._replace(out=attended.out * 1.5)

    assert not judge(BATCH, altered(deed), CPU).failing()
    judged = judge(BATCH, altered(deed), CPU, Question("finite", "inference"))
    assert sorted(judged.failing()) == [0, 1, 2, 3]
    assert all(name.startswith("out") for _, name in judged.worst())


def test_calls_in_the_other_order_have_the_same_bits() -> None:
    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        # The first call of all, and of the second run the one that comes first then.
        return attended._replace(out=attended.out * (1 + 2.0**-7)) if count in (1, 5) else attended

    backend = altered(deed)
    judged = judge(BATCH, backend, CPU, Question("nan", "again"))
    bits = judged.z[:, NAMES.index("bits")]
    assert bits.isinf().tolist() == [True] + [False] * 3 + [True] * 4
    assert set(judged.failing()) == {0, 3}


def test_gradients_of_some_inputs_are_held_to_the_budget() -> None:
    class Frozen(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            attended = super().attend(q, k, v, metadata, options)
            # With a frozen query the gradients of what it meets are those of something else.
            return attended if q.requires_grad else attended._replace(out=attended.out * 1.5)

    backend = Backend("frozen", Frozen())
    assert not judge(BATCH, backend, CPU).failing()
    seen = [
        bool(judge(BATCH.other(seed), backend, CPU, Question("nan", "some gradients")).failing()) for seed in range(4)
    ]
    assert seen == [False, True, True, True]


@pytest.mark.parametrize("seed", range(6))
def test_documents_are_apart(seed: int) -> None:
    """By NaN, infinities and large numbers in either half of the documents."""

    class Mean(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            attended = super().attend(q, k, v, metadata, options)
            # One bit where another document of the call is large.
            factor = 1 + 2.0**-8 * (v.detach().float().nan_to_num(9.0, 9.0, 9.0).abs().max() > 8).float()
            return attended._replace(out=(attended.out.float() * factor).to(q.dtype))

    turn = Question("nan", "documents apart")
    assert not judge(BATCH.other(seed), registry.load("loop"), CPU, turn).failing()
    judged = judge(BATCH.other(seed), Backend("mean", Mean()), CPU, turn)
    # A call of one document has no other.
    assert judged.failing()
    assert set(judged.failing()) <= {1, 3}
    assert {judged.worst()[index][1] for index in judged.failing()} == {"isolation"}


def test_the_probe_sees_one_wrong_key() -> None:
    class Blind(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            if metadata.lengths_k == (17,):
                v = torch.cat([v[1:2], v[1:]])
            return super().attend(q, k, v, metadata, options)

    judged = judge(CallBatch(CASE.replace(values="offset", causal=False), BATCH.ends), Backend("blind", Blind()), CPU)
    probed = judged.z[:, NAMES.index("out of the probe")]
    assert probed.isinf().nonzero().tolist() == [[3]]


def test_the_needle_sees_what_only_sharp_scores_show() -> None:
    class Sharp(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            if 20 < q.detach().abs().max() < 90 and len(v) > 12:
                v = torch.cat([v[1:2], v[:1], v[2:]])
            return super().attend(q, k, v, metadata, options)

    seen = {turn.asked: judge(BATCH, Backend("sharp", Sharp()), CPU, turn) for turn in dict.fromkeys(SCHEDULE)}
    failing = {asked: judged.failing() for asked, judged in seen.items() if judged.failing()}
    assert set(failing) == {"needle"}
    assert set(failing["needle"]) == {1, 2, 3}
    assert seen["needle"].worst()[failing["needle"][0]] == (torch.inf, "out of the probe")
    assert seen["needle"].symptom("out of the probe") is WrongKeys


def test_a_gradient_in_every_row_counts_them() -> None:
    class Forgetful(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            # One row of a call does without its part of every gradient.
            attended = super().attend(q, k, v, metadata, options)
            return attended._replace(out=torch.cat([attended.out[:1].detach(), attended.out[1:]]))

    assert not judge(BATCH, registry.load("loop"), CPU, Question("nan", "every row")).failing()
    judged = judge(BATCH, Backend("forgetful", Forgetful()), CPU, Question("nan", "every row"))
    assert sorted(judged.failing()) == [0, 1, 2, 3]
    z = judged.z[:, NAMES.index("dv of the probe")]
    assert (z > LIMIT).tolist() == [True, True, False, True, True, False, False, False]
    assert z.isfinite().all()
    assert judged.symptom("dv of the probe") is WrongKeysBackward


@pytest.mark.parametrize("fault", ["X37", "X38"])
def test_small_numbers_beside_large_ones_are_not_lost(fault: str) -> None:
    case = CASE.replace(lengths=(3, 2, 4), key_lengths=(90, 33, 5), document_ids=None)
    batch, turn = CallBatch(case, (1, 2, 3)), Question("nan", "swamping")
    assert not judge(batch, registry.load("loop"), CPU, turn).failing()
    judged = judge(batch, registry.load(f"fault:{fault}"), CPU, turn)
    assert 0 in judged.failing()
    assert 2 not in judged.failing()
    assert judged.symptom(judged.worst()[0][1]) is NotExact


def test_a_second_backward_is_held_to_the_budget() -> None:
    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        if not attended.out.requires_grad:
            return attended
        passes = []

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            passes.append(gradient)
            return gradient * len(passes)

        attended.out.register_hook(hook)
        return attended

    assert not judge(BATCH, altered(deed), CPU).failing()
    judged = judge(BATCH, altered(deed), CPU, Question("nan", "second backward"))
    assert sorted(judged.failing()) == [0, 1, 2, 3]
    assert {name for _, name in judged.worst()} <= {"dq", "dk", "dv", "dq-rows", "dk-rows", "dv-rows"}


def test_a_graph_that_is_spent_may_say_so() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.used = False
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            if ctx.used:
                raise RuntimeError("what was saved is gone")
            ctx.used = True
            return gradient

    backend = altered(lambda count, _, attended: attended._replace(out=Once.apply(attended.out)))
    judged = judge(BATCH, backend, CPU, Question("nan", "second backward"))
    assert not judged.failing()
    assert not judged.broken
    assert not judged.refused


def test_earlier_rows_are_apart_from_the_future() -> None:
    class Mean(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            attended = super().attend(q, k, v, metadata, options)
            factor = 1 + 2.0**-8 * (v[-1:].detach().float().abs().max() > 8).float()
            return attended._replace(out=(attended.out.float() * factor).to(q.dtype))

    turn = Question("nan", "future apart")
    assert not judge(BATCH, registry.load("loop"), CPU, turn).failing()
    judged = judge(BATCH, Backend("mean", Mean()), CPU, turn)
    # The second call's last document has no row before its last.
    assert {0, 2, 3} <= set(judged.failing())
    assert {judged.worst()[index][1] for index in judged.failing()} == {"isolation"}
    # Nothing is hidden where every row sees everything.
    everything = CallBatch(CASE.replace(causal=False), BATCH.ends)
    assert not judge(everything, Backend("mean", Mean()), CPU, turn).failing()


def test_documents_come_in_another_order() -> None:
    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        return attended._replace(out=attended.out * 1.5) if metadata.lengths_q[0] == 5 else attended

    assert not judge(BATCH, altered(deed), CPU).failing()
    assert judge(BATCH, altered(deed), CPU, Question("nan", "turned")).failing() == [3]
    refusing = altered(deed)
    refusing.kernel.limit = lambda case, calls: "fives" if calls[0][0][0] == 5 else None  # type: ignore[method-assign]
    assert not judge(BATCH, refusing, CPU, Question("nan", "turned")).failing()


@pytest.mark.parametrize("scale", [None, 0.25, 0.5])
def test_what_is_kept_by_shape_meets_another_scale(scale: float | None) -> None:
    class Planned(LoopKernel):
        def __init__(self) -> None:
            self.plans: dict[torch.Size, float] = {}

        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            kept = dataclasses.replace(options, scale=self.plans.setdefault(k.shape, options.scale))
            return super().attend(q, k, v, metadata, kept)

    batch, turn = CallBatch(CASE.replace(scale=scale), BATCH.ends), Question("nan", "other scale")
    assert not judge(batch, registry.load("loop"), CPU, turn).failing()
    assert not judge(batch, Backend("planned", Planned()), CPU).failing()
    assert {1, 2, 3} <= set(judge(batch, Backend("planned", Planned()), CPU, turn).failing())


def test_rows_behind_the_last_document_are_nobodys() -> None:
    class Last(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            attended = super().attend(q, k, v, metadata, options)
            return attended._replace(out=attended.out * 1.5) if len(k) > sum(metadata.lengths_k) == 25 else attended

    backend, turn = Backend("last", Last()), Question("nan", "capacity")
    assert not judge(BATCH, backend, CPU).failing()
    assert not judge(BATCH, backend, CPU, turn).failing()
    batch = CallBatch(CASE.replace(key_lengths=(3, 13, 1, 17, 9, 5, 8, 3)), BATCH.ends)
    assert not judge(batch, backend, CPU).failing()
    for seed, spare in enumerate((1, 17)):
        judged = judge(batch.other(seed), backend, CPU, turn)
        assert judged.failing() == [3]
        assert judged.call(3).capacity == spare
    assert not judge(BATCH, registry.load("backup"), CPU, turn).spares


def test_rows_that_a_backend_promises_to_fill_are_looked_at() -> None:
    judged = judge(BATCH, registry.load("fault:M02-dk"), CPU, Question("nan", "capacity"))
    assert sorted(judged.failing()) == [0, 1, 2, 3]
    assert judged.z[:, NAMES.index("tails")].isinf().nonzero()[:, 0].tolist() == [0, 2, 3, 7]
    assert judged.symptom("tails") is DeadRowsNotZero


def test_a_call_that_raises_or_refuses_spoils_no_other() -> None:
    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        if len(metadata.lengths_q) == 2:
            raise RuntimeError("two documents")
        if len(metadata.lengths_q) > 3:
            raise UnsupportedCase("more than three")
        return attended

    judged = judge(BATCH, altered(deed), CPU)
    assert judged.broken == {1: "RuntimeError: two documents"}
    assert judged.fallen(1) is Crashed
    assert judged.refused == {3: "more than three"}
    assert judged.failing() == [1]
    assert all(z <= LIMIT for z, _ in judged.largest().values())


def test_a_result_that_is_not_given_has_no_deviation() -> None:
    quiet = altered(lambda count, _, attended: attended._replace(lse=None))
    told = judge(BATCH, quiet, CPU).largest()
    assert "lse" not in told
    assert {"out", "dq", "dk", "dv"} <= told.keys()
    assert "lse" in judge(BATCH, registry.load("loop"), CPU).largest()


def test_results_of_another_shape_or_dtype_are_none() -> None:
    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        out = attended.out
        return attended._replace(out=out.float() if metadata.lengths_q == (3,) else out)

    judged = judge(BATCH, altered(deed), CPU)
    assert judged.broken == {0: "out of another shape or dtype"}
    assert judged.fallen(0) is MissingResult


# What becomes of it.


FAULTS = ("M18", "X11", "M30", "M08", "M02-out")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found_and_handed_over(fault: str) -> None:
    (finding, *_), _ = fuzzed(f"fault:{fault}", calls=3000)
    assert "batch" not in finding.checks
    assert len(finding.case.lengths) <= 3


@pytest.mark.slow
def test_what_the_call_before_decides_is_found_and_handed_over() -> None:
    """By a case alone where the call around it has another shape, and by two calls in a row where it has not."""
    (finding, *_), _ = fuzzed("fault:X32", calls=3000)
    # Bits come and go: which run stands out first is a matter of what memory a process is handed.
    assert finding.symptom in ("PoisonLeaked", "NotRepeatable")
    assert len(finding.case.lengths) <= 3
    assert "batch" not in finding.checks or "one of 2 calls in a row" in finding.messages[0]


@pytest.mark.slow
def test_what_only_contents_of_memory_show_is_found_by_a_campaign(attn_fuzz: Run) -> None:
    """In a worker: of this process a C library may hand out blocks as they were freed."""
    options = (
        "--mode",
        "batch",
        "--level",
        "kernel",
        "--device",
        "cpu",
        "--cases",
        "1000",
        "--workers",
        "1",
        "--first",
    )
    done = attn_fuzz("run", "--backend", "fault:X29", *options, "--json")
    assert done.status == 1, done.err
    assert "batch" not in done.json["findings"][0]["checks"]


@pytest.mark.slow
def test_clean_calls_are_counted_one_by_one() -> None:
    findings, tally = fuzzed("loop", calls=150)
    assert findings == []
    assert tally.cases == sum(tally.by_kind.values()) == 150
    assert {kind.split()[0] for kind in tally.by_kind} == {"batch", "batch-layer"}
    assert tally.paths == {"loop": 150}
    assert set(tally.worst_z) == set(tally.worst_case)
    assert max(tally.worst_z.values()) < LIMIT


def test_a_slow_kernel_is_heard_of_between_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_fuzz.campaign.batch_worker.BEAT_SECONDS", -1.0)
    messages: list[Message] = []
    calls: list[int] = []

    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        calls.append(len(messages))
        return attended

    backend = altered(deed)
    monkeypatch.setattr(registry, "load", lambda name: backend)
    CallsWorker(Assignment(backend="altered", device="cpu", seed=0, cases=8, mode="batch"), messages.append).run()
    assert len(calls) >= 12
    assert all(later > earlier for earlier, later in zip(calls, calls[1:], strict=False))


@pytest.mark.slow
def test_the_same_seed_draws_the_same_cases() -> None:
    tallies = [fuzzed("loop", calls=40, seed=3)[1] for _ in range(2)]
    assert tallies[0].worst_case == tallies[1].worst_case
    assert tallies[0].documents == tallies[1].documents


@pytest.mark.slow
def test_what_only_many_calls_show_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"before": 0}

    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        # Wrong after a longer one: alone, every call comes after itself.
        rows, before = len(attended.out), state["before"]
        state["before"] = rows
        return attended._replace(out=attended.out * 1.5) if before > 2 * rows else attended

    backend = altered(deed)
    (finding,), _ = fuzzed(backend, monkeypatch)
    assert finding.checks == ("batch",)
    assert "in a row" in finding.messages[0]
    assert "not where the call runs by itself" in finding.messages[0]
    # It is kept with as few calls, as small ones, as it takes.
    sequence = CallSequence.from_dict(json.loads(json.dumps(finding.to_dict()))["sequence"])
    calls = [sequence.batch.call(index) for index in range(len(sequence.batch.ends))]
    assert finding.case == calls[sequence.index]
    assert sorted(sum(call.lengths) for call in calls) == [1, 3]
    assert sequence.words(sequence.judged(backend, CPU)) is not None
    correct = Backend("correct", LoopKernel())
    assert sequence.words(sequence.judged(correct, CPU)) is None
    alone = examine(finding.case, backend, CPU)
    assert not alone.symptoms
    assert verdict_among(alone, sequence, backend, CPU).checks == ("batch",)
    assert verdict_among(alone, sequence, correct, CPU) == alone


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_finding_that_takes_other_calls_is_replayed(attn_fuzz: Run, tmp_path: Path) -> None:
    path, store = tmp_path / "kernel.py", tmp_path / "store"
    deed = "    before, _rows[0] = _rows[0], len(q)\n    q = q * (3 if 2 * len(q) < before < 100 else 1)\n"
    text = EXAMPLE.replace("    out = []\n", f"{deed}    out = []\n")
    path.write_text(text + "\n\n_rows = [0]\n")
    command = ("check", f"{path}:kernel", "--mode", "batch", "--device", "cpu", "--cases", "400", "--first")
    done = attn_fuzz(*command, "--level", "kernel", "--store", str(store), "--workers", "1", "--json")
    assert done.status == 1, done.err
    assert done.out, done.err
    finding = next(each for each in json.loads(done.out)["findings"] if each["checks"] == ["batch"])
    assert len(finding["sequence"]["ends"]) == 2
    done = attn_fuzz("replay", finding["id"], "--store", str(store), "--device", "cpu")
    assert done.status == 1, done.err
    assert "calls in a row" in done.out
    assert "the one that fails: " in done.out
    assert "beside it: " in done.out
    done = attn_fuzz("script", finding["id"], "--store", str(store), "--device", "cpu")
    assert done.status == 0, done.err
    assert "fails after the others only" in done.out
    path.write_text(EXAMPLE)
    assert attn_fuzz("replay", finding["id"], "--store", str(store), "--device", "cpu").status == 0


@pytest.mark.slow
def test_calls_do_not_shrink_to_none() -> None:
    lengths, keys = (3, 6, 1, 9, 2, 5, 4, 8), (3, 0, 1, 17, 0, 5, 0, 8)
    batch = CallBatch(CASE.replace(lengths=lengths, key_lengths=keys), (2, 3, 6, 8))
    wrong = altered(lambda count, _, attended: attended._replace(out=attended.out * 1.5))
    sequence = smallest(CallSequence(batch, 2, SCHEDULE[0], 4), wrong, CPU, 20.0)
    assert sequence.batch.case.lengths == (1,)
    assert sequence.batch.case.key_lengths in (None, (1,))
    assert sequence.index == 0
    # Nothing to leave out where nothing fails.
    right = CallSequence(batch, 2, SCHEDULE[0], 4)
    assert smallest(right, altered(lambda count, _, attended: attended), CPU, 20.0) == right


@pytest.mark.parametrize(
    "change", [{"index": 4}, {"ends": [1, 3]}, {"asks": "nothing"}, {"poison": "much"}, {"asked": 0}, {"case": {}}]
)
def test_calls_in_a_row_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    sequence = CallSequence(BATCH, 2, SCHEDULE[0], 4)
    assert CallSequence.from_dict(sequence.to_dict()) == sequence
    with pytest.raises(CaseError, match="no calls in a row"):
        CallSequence.from_dict(sequence.to_dict() | change)


@pytest.mark.slow
def test_an_error_that_comes_once_is_reported_where_nothing_explains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(factor: float) -> Backend:
        return altered(lambda count, _, a: a._replace(out=a.out * factor) if count == 3 else a)

    (finding,), _ = fuzzed(once(100.0), monkeypatch, calls=60)
    assert finding.checks == ("batch",)
    assert "seen once" in finding.messages[0]


@pytest.mark.slow
def test_bad_luck_under_one_value_seed_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_fuzz.campaign.calls_worker.beyond_doubt", lambda case: 1e9)
    backend = altered(lambda count, _, a: a._replace(out=a.out * 1.25) if count == 3 else a)
    findings, tally = fuzzed(backend, monkeypatch, calls=60)
    assert findings == []
    assert tally.cases == 60


@pytest.mark.slow
def test_a_layout_that_a_kernel_refuses_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    class Aligned(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            if q.stride(-1) != 1 or q.data_ptr() % 16:
                raise RuntimeError("q must be aligned, its last dimension contiguous")
            return super().attend(q, k, v, metadata, options)

    findings, tally = fuzzed(Backend("aligned", Aligned(), levels=("kernel",)), monkeypatch, calls=150, seed=1)
    assert findings == []
    assert tally.refused > 0


@pytest.mark.slow
def test_a_lack_of_memory_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def deed(count: int, metadata: VarlenMetadata, attended: Attended) -> Attended:
        raise torch.OutOfMemoryError("out of memory")

    findings, tally = fuzzed(altered(deed), monkeypatch, calls=40)
    assert findings == []
    assert tally.cases == 0
    assert tally.refused > 0


@pytest.mark.slow
def test_who_writes_to_an_input_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scribbling(LoopKernel):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
        ) -> Attended:
            attended = super().attend(q, k, v, metadata, options)
            if len(metadata.lengths_q) == 3:
                k.data[0] += 1
            return attended

    backend = Backend("scribbling", Scribbling(), levels=("kernel",))
    (finding, *_), _ = fuzzed(backend, monkeypatch, calls=100)
    assert finding.symptom == "InputsChanged"
    # One document alone shows it: it is put into the company of two others.
    assert len(finding.case.lengths) == 1


def test_batches_of_what_compiles_for_shapes_are_of_its_layouts_and_one_configuration() -> None:
    """Every call, with its documents in order, is one of a dozen."""
    stated = registry.load("flex_compiled").kernel.capabilities
    capabilities = dataclasses.replace(stated, configurations=stated.compiled_first)
    backend, domain = declared(dataclasses.replace(capabilities, devices=("cpu",))), Domain.of(capabilities, "cpu")
    layouts, configurations = set(), set()
    for seed in range(6):
        batch = draw_batch(Random(seed), Sweep((16, 32), seed), backend, domain, 40)
        assert batch is not None
        configurations.add(Configuration.of(batch.case))
        for index in range(len(batch.ends)):
            call = batch.call(index)
            assert backend.refusal(call, "cpu") is None
            layouts.add(tuple(sorted(zip(call.packed_lengths, call.packed_key_lengths, strict=True))))
    assert configurations <= set(capabilities.configurations)
    assert len(configurations) > 1
    # Keys of causal calls are not always those of others.
    assert len(layouts) <= 2 * capabilities.layouts


@pytest.mark.slow
def test_a_call_that_ends_its_process_is_told_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As it was drawn it ends a process; each attempt at a smaller one would be another.
    monkeypatch.setattr(inquest, "minimise", lambda case, *_: case)
    monkeypatch.setattr(pool, "RESTARTS", 0)
    deed = "    if len(q) == 7:\n        import os\n\n        os._exit(9)\n"
    path = tmp_path / "kernel.py"
    path.write_text(EXAMPLE.replace("    out = []\n", f"{deed}    out = []\n"))
    job = Assignment(
        backend=f"{path}:kernel", device="cpu", seed=1, cases=400, mode="batch", levels=("kernel",), stop_at_first=True
    )
    outcome = Pool([job], 1, lambda tallies: None, lambda finding: None).run()
    (finding,) = [finding for finding in outcome.findings if finding.symptom == "Crashed"]
    # Of the call, or of one of its documents: checks run one by itself.
    lengths = finding.original_case.packed_lengths
    assert 7 in (sum(lengths), *lengths)
    assert len(lengths) <= 12


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_command_has_the_mode(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = attn_fuzz("run", "--mode", "batch", "-b", "loop", "--cases", "20", "--device", "cpu", "--level", "kernel")
    assert done.status == 0, done.err
    assert "batch" in done.out
    options = ("-b", "legacy:loop", "--cases", "4", "--device", "cpu", "--level", "layer", "--ranks", "2")
    done = attn_fuzz("run", "--mode", "batch", *options)
    assert done.status == 2
    assert "batches are of kernel calls" in done.err
    # One of all that there are: each is a process.
    assert takes_batches("flex_compiled", ("kernel",))
    assert not takes_batches("legacy:loop", ("kernel",))
    monkeypatch.setattr("attn_fuzz.cli.fuzz.available_backends", lambda *_: ("loop",))
    done = attn_fuzz("run", "--mode", "batch", "--cases", "10", "--device", "cpu", "--level", "kernel", "--json")
    assert done.status == 0, done.err
    assert "loop" in json.loads(done.out)["backends"]
    done = attn_fuzz("run", "--mode", "fast", "-b", "loop", "--cases", "4", "--device", "cpu")
    assert done.status == 2
    assert "case, batch, packed, several with + between them, both or all" in done.err


@pytest.mark.slow
def test_faults_of_kernels_are_found_by_batches_too(attn_fuzz: Run) -> None:
    command = ("faults", "--mode", "batch", "--no-rules", "--workers", "1", "--json")
    done = attn_fuzz(*command, "--only", "M51-swapped")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert told["mode"] == "batch"
    assert [row["caught"] and row["minimal"] for row in told["faults"]] == [True]
    assert attn_fuzz("faults", "--mode", "packed").status == 2


def test_all_modes_leave_batches_out_where_there_is_nothing_to_call() -> None:
    def modes(levels: tuple[str, ...], ranks: tuple[int, ...] = (1,), name: str = "loop") -> set[str]:
        every = ("case", "batch", "packed")
        options = CampaignOptions(device="cpu", workers=3, seconds=1.0, levels=levels, modes=every, ranks=ranks)
        return {job.mode for job in plan((name,), options)}

    assert "batch" not in modes(("layer",), (1, 2), "legacy:loop")
    assert modes(("layer",), (1, 2)) == {"case", "batch", "packed"}
    assert modes(("layer",)) == {"case", "batch", "packed"}
    assert modes(("layer", "kernel")) == {"case", "batch", "packed"}
