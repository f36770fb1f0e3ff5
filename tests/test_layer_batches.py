"""Batches of layer calls: drawn, answered and judged at once; clean layers are left alone, faults handed over."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch
from commandline import Run
from devices import needs_cuda, on_every_device

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Kernel
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.backends.metadata import MicroSequenceMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judge import judge, moving, usually_asked
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.batch.layer_columns import LAYER_NAMES
from attn_fuzz.batch.layer_judge import LAYER_SCHEDULE
from attn_fuzz.batch.layer_questions import LAYER_QUESTIONS, how
from attn_fuzz.campaign.calls_worker import work_on_batches
from attn_fuzz.campaign.messages import Assignment, Finished, Found, Message
from attn_fuzz.cases.call_batch import PADDING, CallBatch
from attn_fuzz.execution import observation
from attn_fuzz.execution.layer_calls import LayerHow
from attn_fuzz.execution.runner import LayerRun
from attn_fuzz.findings.finding import Finding
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layer_calls import LONGEST, draw_layer_batch
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import Crashed, MissingResult, NotExact, NotIsolated, PoisonLeaked, WroteOutside
from attn_fuzz.reduction.call_sequence import CallSequence
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import layer_answer, layer_inputs
from attn_fuzz.reference.profile import Profile

CPU = torch.device("cpu")
WHOLE = Case(
    lengths=(4, 1, 10, 3, 2, 6, 2, 5),
    document_ids=(0, 1, 2, 3, PADDING, 5, 6, 7),
    cuts=(3, 9, 15, 17, 20, 24, 28),
    heads=4,
    kv_heads=2,
    head_dim=8,
    query_norm="rms",
    key_norm="rms",
    rotary="default",
    dtype="bf16",
)
BATCH = CallBatch(WHOLE, (3, 5, 8))
"""Three calls, the second of which ends in padding."""


def drawn(name: str, seed: int, calls: int = 12) -> CallBatch:
    backend = registry.load(name)
    domain = Domain.of(backend.kernel.capabilities_on("cpu"), "cpu")
    batch = draw_layer_batch(Random(seed), backend, domain, calls, LONGEST["cpu"][seed % 3])
    assert batch is not None
    return batch


def layered(made: type[BufferedLayer], name: str = "loop") -> Backend:
    """A backend whose layer is another one, for one test."""
    return dataclasses.replace(registry.load(name), name=f"own {made.__name__}", layer=made)


def asked(backend: Backend, question: str, batch: CallBatch = BATCH, poison: str = "nan") -> Judged:
    return judge(batch, backend, CPU, Question(poison, question))


def accused(judged: Judged) -> set[str]:
    """Columns in which some call fails."""
    return {name for place, name in enumerate(judged.names) if (judged.z[:, place] > 10).any()}


def campaign(backend: str, cases: int, **options: Any) -> tuple[list[Finding], Finished]:
    messages: list[Message] = []
    options = {"levels": ("layer",), "stop_at_first": True, **options}
    work_on_batches(
        Assignment(backend=backend, device="cpu", seed=0, cases=cases, mode="batch", **options), messages.append
    )
    (finished,) = [message for message in messages if isinstance(message, Finished)]
    return [message.finding for message in messages if isinstance(message, Found)], finished


def test_calls_are_sequences_of_their_own() -> None:
    first, second, third = (BATCH.call(index) for index in range(3))
    assert (first.lengths, first.cuts, first.padding) == ((4, 1, 10), (3, 9), 0)
    assert (second.lengths, second.cuts, second.padding) == ((3,), (2,), 2)
    assert (third.lengths, third.cuts, third.document_ids) == ((6, 2, 5), (4, 8), (5, 6, 7))
    assert BATCH.first(2).ends == (3, 5)
    assert BATCH.first(2).call(0) == first
    assert BATCH.first(2).call(1) == second


@pytest.mark.parametrize("question", dict.fromkeys(each.asked for each in LAYER_SCHEDULE))
def test_half_of_the_calls_are_asked_more_than_the_others(question: str) -> None:
    tokens: list[int] = []

    class Counted(BufferedLayer):
        def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
            tokens.append(case.tokens)
            super().__init__(weights, case, kernel)

    backend = dataclasses.replace(registry.load("loop"), layer=Counted)
    judged = judge(BATCH, backend, CPU, Question("nan", question), asked=usually_asked(BATCH))
    assert not judged.failing()
    assert judged.asked == 2
    first, second, third = (tokens.count(call.tokens) for call in BATCH.calls)
    assert third == 1
    assert first == second == 1 or question not in ("", "steps")


def test_some_calls_of_a_batch_have_the_values_that_they_have_among_all() -> None:
    """Padding that ends the last of them, too."""
    whole, some = (layer_inputs(batch.case, "cpu") for batch in (BATCH, BATCH.first(2)))
    assert torch.equal(some.x, whole.x[: len(some.x)])
    assert torch.equal(some.dout, whole.dout[: len(some.dout)])


def test_a_call_ends_where_the_layer_is_cut() -> None:
    with pytest.raises(ValueError, match="15 is no cut"):
        CallBatch(WHOLE.replace(cuts=(3, 20)), (3, 5, 8))
    made = CallBatch.of(WHOLE.replace(cuts=(3, 20)), (3, 5, 8))
    assert made is not None
    assert made.case.cuts == (3, 15, 20)
    assert CallBatch.of(WHOLE.replace(lengths=(4, 1, 10, 0, 0, 6, 2, 5), cuts=()), (3, 5, 8)) is None


def test_a_call_has_the_values_and_the_answer_that_it_has_by_itself() -> None:
    whole, profile = layer_inputs(WHOLE, CPU), Profile()
    together = layer_answer(WHOLE, whole, profile, 0, BATCH.tokens)
    for index in (0, 2):
        call, rows = BATCH.call(index), slice(*BATCH.tokens[index])
        alone = layer_inputs(call, CPU)
        assert torch.equal(alone.x, whole.x[rows])
        assert torch.equal(alone.dout, whole.dout[rows])
        for name, expected in layer_answer(call, alone, profile, 0).items():
            got = together[name].value[index] if name.startswith("d_") else together[name].value[rows]
            torch.testing.assert_close(got, expected.value, rtol=1e-12, atol=1e-12)


def test_a_parameters_budget_is_that_of_its_call() -> None:
    together = layer_answer(WHOLE, layer_inputs(WHOLE, CPU), Profile(), 64, BATCH.tokens)
    for index in (0, 2):
        call = BATCH.call(index)
        alone = layer_answer(call, layer_inputs(call, CPU), Profile(), 64)
        for name in ("d_query", "d_key_value", "d_dense", "d_query_norm"):
            ratio = together[name].variance[index].mean() / alone[name].variance.mean()
            # Simulated roundings are other ones.
            assert 0.4 < ratio < 2.5, (name, ratio)


def test_draws_depend_on_the_seed_alone() -> None:
    assert drawn("loop", 3) == drawn("loop", 3)
    assert drawn("loop", 3) != drawn("loop", 6)


@pytest.mark.parametrize("ranks", [{}, {"ranks": (1, 2), "tensor_ranks": (1, 2)}])
def test_calls_are_those_that_are_cut_out_of_their_batch(ranks: dict[str, tuple[int, ...]]) -> None:
    backend = registry.load("loop")
    domain = dataclasses.replace(Domain.of(backend.kernel.capabilities, "cpu"), **ranks)
    for seed in range(12):
        batch = draw_layer_batch(Random(seed), backend, domain, 12, 9)
        assert batch is not None
        for some in (batch, batch.first(len(batch.ends) // 2), batch.first(1)):
            assert some.calls == CallBatch(some.case, some.ends).calls


def test_draws_reach_what_layers_have() -> None:
    calls = [
        batch.call(index) for seed in range(40) for batch in [drawn("loop", seed)] for index in range(len(batch.ends))
    ]
    for name in ("padding", "capacity", "softcap", "shared_key_value"):
        assert {bool(getattr(call, name)) for call in calls} == {True, False}, name
    for name in ("query_norm", "value_norm", "rotary", "weights", "dtype", "causal", "memory"):
        assert len({getattr(call, name) for call in calls}) > 1, name
    assert {len(call.cuts) for call in calls} >= {0, 1, 2, 3}
    assert any(0 in call.lengths for call in calls)


def test_what_a_backend_does_not_take_is_not_drawn() -> None:
    backend = registry.load("sdpa_dense")
    for seed in range(12):
        batch = drawn("sdpa_dense", seed)
        for index in range(len(batch.ends)):
            assert backend.refusal(batch.call(index), "cpu") is None


@pytest.mark.slow
@pytest.mark.parametrize("question", LAYER_QUESTIONS)
@pytest.mark.parametrize("name", ["loop", "sdpa_dense"])
def test_correct_layers_are_left_alone(name: str, question: str) -> None:
    for seed in range(3):
        judged = asked(registry.load(name), question, drawn(name, seed, 6), "finite" if seed % 2 else "nan")
        assert not judged.failing(), (judged.worst(), judged.broken)
        assert not judged.touched
        assert judged.paths


@on_every_device
@pytest.mark.parametrize("question", LAYER_QUESTIONS)
def test_layers_are_judged_where_they_run(question: str, device: str) -> None:
    judged = judge(BATCH, registry.load("backup"), torch.device(device), Question("nan", question))
    assert not judged.failing(), (judged.worst(), judged.broken)


def test_what_takes_long_is_done_for_the_calls_that_are_asked() -> None:
    parts = how("steps", torch.device("cuda"), 2).parts(5)
    assert [calls for calls, _ in parts] == [range(2), range(2, 5)]
    for name in ("watched", "filled", "threaded"):
        assert [getattr(each, name) for _, each in parts] == [True, False], name
    # Comparisons cost a CPU nothing.
    assert all(each.watched for _, each in how("steps", CPU, 2).parts(5))
    assert [calls for calls, _ in how("interfered", CPU, 2).parts(2)] == [range(2)]
    (backwards,) = LayerHow(backwards=True).parts(3)
    assert list(backwards[0]) == [2, 1, 0]


def test_every_question_has_its_turn() -> None:
    assert {question.asked for question in LAYER_SCHEDULE} == {*LAYER_QUESTIONS}
    for number in range(2, 12):
        together = len(LAYER_SCHEDULE) % number == 0 and len(LONGEST["cpu"]) % number == 0
        assert not together, "sizes and questions would always meet the same"


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("wrong_in_main", [False, True])
def test_backwards_run_in_either_thread(wrong_in_main: bool) -> None:
    main = threading.get_ident()

    class OfOneThread(BufferedLayer):
        def key_value_gradient(
            self, metadata: MicroSequenceMetadata, dk: torch.Tensor, dv: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            wrong = (threading.get_ident() == main) is wrong_in_main
            return super().key_value_gradient(metadata, dk + wrong, dv)

    backend = layered(OfOneThread, "backup")
    found = {
        question: bool(judge(BATCH, backend, torch.device("cuda"), Question("nan", question)).failing())
        for question in ("", "steps", "again")
    }
    assert found == {"": wrong_in_main, "steps": not wrong_in_main, "again": True}


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("question", ["", "steps"])
def test_unwritten_memory_of_a_gpu_is_poison(question: str) -> None:
    class AddsUnwritten(BufferedLayer):
        def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            unwritten = torch.empty_like(x)
            return super().forward(x, begin, end) + 0 * unwritten

    judged = judge(BATCH, layered(AddsUnwritten, "backup"), torch.device("cuda"), Question("nan", question))
    assert judged.failing()


class _RoundsQueries(BufferedLayer):
    """The query projection's gradient is rounded after each micro-sequence, by less than its budget."""

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        dx = super().backward(dout)
        self.gradients["query"].copy_(self.gradients["query"].to(dout.dtype))
        return dx


class _RoundsValues(BufferedLayer):
    """The gradient buffer is."""

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        dx = super().backward(dout)
        self.buffer.dv.copy_(self.buffer.dv.to(dout.dtype))
        return dx


class _Mixes(BufferedLayer):
    """Each row is moved by a millionth of the largest number in its micro-sequence."""

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return super().forward(x, begin, end) + 1e-6 * x.nan_to_num().abs().max()


class _KeepsByShape(BufferedLayer):
    """Queries are scaled as the first layer of the same shape had it."""

    kept: ClassVar[dict[tuple[int, ...], float]] = {}

    def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
        super().__init__(weights, case, kernel)
        self.scale = self.kept.setdefault((case.tokens, case.heads, case.head_dim), case.softmax_scale)
        if self.scale != case.softmax_scale:
            self.options = dataclasses.replace(self.options, softmax_scale=self.scale)


class _WritesBehind(BufferedLayer):
    """A forward writes to the row behind its slice, which nothing reads before it is written again."""

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        out = super().forward(x, begin, end)
        if end < len(self.buffer.k):
            self.buffer.k[end] = 1.0
        return out


def test_who_strayed_is_known_where_calls_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Some(_WritesBehind):
        def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            right = self.case.tokens != 4
            return BufferedLayer.forward(self, x, begin, end) if right else super().forward(x, begin, end)

    waits: list[int] = []

    def flags(run: LayerRun, own: Callable[[LayerRun], list[torch.Tensor]] = LayerRun.flags) -> list[torch.Tensor]:
        waits.append(run.case.tokens)
        return own(run)

    # As of a GPU's memory.
    monkeypatch.setattr(observation, "waited_for", lambda tensor: True)
    monkeypatch.setattr(LayerRun, "flags", flags)
    lengths = [4 if index in (2, 17, 18) else 3 for index in range(19)]
    cuts = tuple(cut for end in itertools.accumulate(lengths) for cut in (end - 1, end))[:-1]
    batch = CallBatch(Case(lengths=tuple(lengths), cuts=cuts, head_dim=4), tuple(range(1, 20)))
    judged = asked(layered(Some), "steps", batch)
    assert accused(judged) == {"steps"}
    assert [index for index in range(19) if judged.z[index].max() > 10] == [2, 17, 18]
    assert waits == lengths


class _CountsCuts(BufferedLayer):
    """Wrong, but only where there are no cuts."""

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        out = super().forward(x, begin, end)
        return out * 1.1 if (begin, end) == (0, sum(self.lengths)) else out


class _Draws(BufferedLayer):
    """The last bit of its output is a matter of chance."""

    calls = 0

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        type(self).calls += 1
        out = super().forward(x, begin, end)
        return out + 2.0**-7 * out.abs().max() * (self.calls % 2) * 2.0**-2


FAULTS: dict[str, tuple[type[BufferedLayer], str]] = {
    "halves": (_RoundsQueries, "halves"),
    "whole numbers": (_RoundsValues, "whole numbers"),
    "documents apart": (_Mixes, "isolation"),
    "again": (_Draws, "bits"),
    "cut elsewhere": (_CountsCuts, "out"),
    "steps": (_WritesBehind, "steps"),
}
"""By question: a fault, and the column that tells."""

FINE = CallBatch(WHOLE.replace(dtype="fp32"), BATCH.ends)


@pytest.mark.parametrize("question", FAULTS)
def test_each_question_has_a_fault_that_the_others_do_not_see(question: str) -> None:
    fault, column = FAULTS[question]
    batch = FINE if fault is _Mixes else BATCH
    judged = asked(layered(fault), question, batch)
    assert column in accused(judged)
    if question != "steps":
        # On CPUs steps are compared whatever else is asked.
        assert not accused(asked(layered(fault), "", batch))


def test_memory_is_watched_step_by_step() -> None:
    judged = asked(layered(_WritesBehind), "")
    assert accused(judged) == {"steps"}
    assert judged.symptom("steps") is WroteOutside


def test_what_is_kept_by_shape_shows_around_another_call() -> None:
    alone = CallBatch.of_one(WHOLE.replace(document_ids=None, scale=0.25))
    _KeepsByShape.kept.clear()
    assert not asked(layered(_KeepsByShape), "", alone).failing()
    _KeepsByShape.kept.clear()
    assert asked(layered(_KeepsByShape), "interfered", alone).failing()


def test_columns_have_their_symptoms() -> None:
    judged = asked(registry.load("loop"), "")
    found = {name: judged.symptom(name) for name in LAYER_NAMES}
    assert (found["isolation"], found["bits"]) == (NotIsolated, PoisonLeaked)
    assert {found["halves"], found["whole numbers"]} == {NotExact}
    assert found["d_dense"].__name__ == "WrongParameterGradient"


def test_calls_that_raise_are_told_from_the_others() -> None:
    class Raises(BufferedLayer):
        def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
            super().__init__(weights, case, kernel)
            if case.padding:
                raise RuntimeError("no padding, please")

    judged = asked(layered(Raises), "again")
    assert [*judged.broken] == [1]
    assert "no padding, please" in judged.broken[1]
    assert judged.fallen(1) is Crashed
    assert judged.failing() == [1]


def test_missing_and_misshapen_results_are_told() -> None:
    class Missing(BufferedLayer):
        def parameter_gradients(self) -> dict[str, torch.Tensor]:
            return {name: x for name, x in super().parameter_gradients().items() if name != "dense"}

        def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            return super().forward(x, begin, end).double()

    judged = asked(layered(Missing), "")
    assert len(judged.broken) == 3
    assert "out, d_dense" in judged.broken[0]
    assert judged.fallen(0) is MissingResult


def test_a_layer_that_shows_no_buffer_is_judged_by_the_rest() -> None:
    class Closed(BufferedLayer):
        def key_value(self) -> None:  # type: ignore[override]
            return None

        def key_value_gradients(self) -> None:  # type: ignore[override]
            return None

    assert not asked(layered(Closed), "again").failing()


def test_bits_that_come_and_go_are_known() -> None:
    undecided = LoopKernel.capabilities
    kernel = type("Undecided", (LoopKernel,), {"capabilities": dataclasses.replace(undecided, repeatable=None)})()
    backend = dataclasses.replace(layered(_Draws), kernel=kernel)
    assert not moving(BATCH, registry.load("loop"), CPU, "nan").any()
    assert moving(BATCH, backend, CPU, "nan").dtype == torch.bool


def test_gradients_left_on_weights_are_each_calls_own() -> None:
    class Leaves(BufferedLayer):
        """Autograd adds to what it finds on the tensors that it was handed."""

        def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
            assert all(weight.grad is None for weight in weights.values())
            super().__init__(weights, case, kernel)
            for weight in weights.values():
                weight.grad = torch.ones_like(weight)

    judged = asked(layered(Leaves), "again")
    assert not judged.broken
    assert not judged.failing()


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "symptom"), [("H9", "WrongGradK"), ("L06", "WroteOutside")])
def test_faults_of_layers_are_found_shrunk_and_handed_over(fault: str, symptom: str) -> None:
    (finding,), finished = campaign(f"fault:{fault}", 600)
    assert finding.symptom == symptom
    first = examine(finding.case, registry.load(f"fault:{fault}"), CPU).first
    assert type(first).__name__ == symptom
    assert len(finding.case.packed_lengths) <= 2
    assert any(kind.startswith("batch-layer") for kind in finished.tally.by_kind)


def test_a_clean_campaign_counts_its_calls() -> None:
    findings, finished = campaign("loop", 24)
    tally = finished.tally
    assert not findings
    assert tally.cases == 24
    assert sum(tally.by_kind.values()) == 24
    assert all(kind.startswith("batch-layer ") for kind in tally.by_kind)
    assert tally.straddling
    assert any(key.startswith("batch-layer") for key in tally.worst_z)


def test_levels_take_turns() -> None:
    _, finished = campaign("loop", 16, levels=("layer", "kernel"))
    assert {kind.split()[0] for kind in finished.tally.by_kind} == {"batch", "batch-layer"}


def test_what_fails_after_other_calls_only_is_kept_with_them() -> None:
    class Third(BufferedLayer):
        """Wrong where the call before it had padding."""

        before = False

        def __init__(self, weights: dict[str, torch.Tensor], case: Case, kernel: Kernel) -> None:
            super().__init__(weights, case, kernel)
            self.after, Third.before = Third.before, bool(case.padding)

        def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            out = super().forward(x, begin, end)
            return out * 1.5 if self.after else out

    backend = layered(Third)
    judged = asked(backend, "")
    assert judged.failing() == [2]
    sequence = CallSequence(BATCH, 2, judged.question, judged.asked)
    kept = CallSequence.from_dict(json.loads(json.dumps(sequence.to_dict())))
    assert kept == sequence
    words = kept.words(kept.judged(backend, CPU))
    assert words is not None
    assert "out: z = " in words
    fewer = sequence.of([[3, 4], [5, 6, 7]], 1)
    assert fewer is not None
    assert fewer.words(fewer.judged(backend, CPU)) is not None


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_commands_take_layers_in_batches(attn_fuzz: Run, tmp_path: Path) -> None:
    done = attn_fuzz(
        "run", "--mode", "batch", "-b", "loop", "--level", "layer", "--cases", "20", "--device", "cpu", "--json"
    )
    assert done.status == 0, done.err
    assert json.loads(done.out)["backends"]["loop"]["cases"] == 20
    example = Path(__file__).resolve().parent.parent / "examples" / "my_layer.py"
    done = attn_fuzz("check-layer", f"{example}:Layer", "--mode", "batch", "--cases", "20", "--device", "cpu", "--json")
    assert done.status == 0, done.err
    (told,) = json.loads(done.out)["backends"].values()
    assert told["cases"] == 20
