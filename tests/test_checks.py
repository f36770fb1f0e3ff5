"""The oracle: silent on clean runs, and each check fires on the deviation that it is there for.

Doubles are the ``loop`` stand-in or the buffered layer with one step changed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from doubles import Double

from attn_fuzz.backends.kernel import Attended, AttentionOptions, UnsupportedCase
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.backends.loop import Call, Gradients, Loop
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend, LayerFactory, load
from attn_fuzz.oracle.checks import CHECKS, Check
from attn_fuzz.oracle.checks.additivity import sums_add_up
from attn_fuzz.oracle.checks.memory import unwritten_unread
from attn_fuzz.oracle.deviations import LIMIT, beyond_doubt, deviations
from attn_fuzz.oracle.examine import Verdict, examine
from attn_fuzz.oracle.symptoms import (
    Crashed,
    DeadRowsNotZero,
    InputsChanged,
    MissingResult,
    NotExact,
    PoisonLeaked,
    Symptom,
    WrongBuffer,
    WrongGradV,
    WrongInputGradient,
    WrongLse,
    WrongOutput,
    WrongParameterGradient,
    WroteOutside,
)
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Expected, kernel_answer, kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

CPU = torch.device("cpu")


KERNEL = Case(level="kernel", lengths=(3, 0, 4), key_lengths=(3, 2, 6), heads=2, kv_heads=2)
"""Its second document has keys and no queries: key rows 3 and 4 are dead."""
DEAD = slice(3, 5)
LAYER = Case(lengths=(4, 1, 10), cuts=(7,), capacity=2)
"""Rows 0 to 4 are dead to the second micro-sequence, rows 15 and 16 to both."""


def around(loop: Loop, kind: type[Double] = Double, **capabilities: object) -> Backend:
    """A double of the loop backend, which leaves dead rows as they are."""
    return Backend("double", kind(loop, covers_all_rows=False, **capabilities))


def kernel_verdict(loop: Loop, case: Case = KERNEL) -> Verdict:
    return examine(case, around(loop), CPU)


def layer_verdict(layer: LayerFactory, case: Case = LAYER) -> Verdict:
    return examine(case, Backend("double", load("loop").kernel, layer), CPU)


def kinds(verdict: Verdict) -> set[type[Symptom]]:
    return {type(symptom) for symptom in verdict.symptoms}


class ChangesGradients(Loop):
    """A loop whose gradients somebody alters in place."""

    def __init__(self, change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]) -> None:
        self.change = change

    def backward(self, *args: object) -> Gradients:
        gradients = super().backward(*args)  # type: ignore[arg-type]
        self.change(*gradients)
        return gradients


class AfterBackward(Loop):
    """A loop that does something to its inputs once it has computed."""

    def __init__(self, meddle: Callable[[Call, torch.Tensor, torch.Tensor], None]) -> None:
        self.meddle = meddle

    def backward(self, call: Call, q: torch.Tensor, k: torch.Tensor, *args: torch.Tensor) -> Gradients:
        gradients = super().backward(call, q, k, *args)
        self.meddle(call, q.data, k.data)
        return gradients


# Clean runs.

CLEAN = {
    "kernel": KERNEL,
    "kernel bf16": KERNEL.replace(dtype="bf16", kv_heads=1, memory="fused"),
    "layer": LAYER,
    "layer bf16": LAYER.replace(dtype="bf16", key_norm="rms", rotary="default"),
}


@functools.cache
def clean_trial(name: str) -> Trial:
    """Checks share a trial and what it has observed, as they do in ``examine``."""
    return Trial(CLEAN[name], load("loop"), CPU)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CLEAN)
def test_every_check_is_silent_on_a_clean_run(name: str, check: Check) -> None:
    assert list(check(clean_trial(name))) == []


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_verdict_is_empty_and_says_what_ran(name: str) -> None:
    verdict = examine(CLEAN[name], load("loop"), CPU)
    assert (verdict.symptoms, verdict.first, verdict.checks) == ((), None, ())
    assert verdict.paths == {"loop"}
    assert {"out", "dk", "dv"} <= verdict.worst_z.keys()
    assert max(verdict.worst_z.values()) < LIMIT


def test_the_double_itself_is_clean() -> None:
    assert kernel_verdict(Loop()).symptoms == ()


def test_what_is_refused_is_not_judged() -> None:
    with pytest.raises(UnsupportedCase, match="double does not take dtype fp32"):
        examine(KERNEL, around(Loop(), dtypes=("bf16",)), CPU)


# Unwritten memory.


@pytest.mark.parametrize(("tensor", "index"), [("dq", 0), ("dk", 1), ("dv", 2)])
def test_unwritten_gradient_rows_leak_poison(tensor: str, index: int) -> None:
    def unwrite(*gradients: torch.Tensor) -> None:
        gradients[index][0] = torch.empty_like(gradients[index][0])

    first = kernel_verdict(ChangesGradients(unwrite)).first
    assert type(first) is PoisonLeaked
    assert (first.check, first.tensor) == ("unwritten", tensor)
    assert "document 0, row 0" in first.message


def test_unwritten_dead_rows_leak_poison() -> None:
    """The project's seed bug in miniature: no query attends to these rows, so no output can show them."""

    def unwrite(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
        dk[DEAD] = torch.empty_like(dk[DEAD])

    verdict = kernel_verdict(ChangesGradients(unwrite))
    assert kinds(verdict) == {PoisonLeaked, DeadRowsNotZero}
    assert {symptom.tensor for symptom in verdict.symptoms} == {"dk"}


def read_laundered_memory(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """NaN becomes 0 and finite poison moves the last bit, so that no value looks wrong."""
    unwritten = torch.empty_like(dv[0]).nan_to_num(0.0).clamp(-1e16, 1e16)
    dv[0] *= 1 + 2.0**-23 * (unwritten / 1e16)


def test_reading_unwritten_memory_changes_bits() -> None:
    (symptom,) = kernel_verdict(ChangesGradients(read_laundered_memory)).symptoms
    assert (type(symptom), symptom.check, symptom.tensor) == (PoisonLeaked, "unwritten", "dv")
    assert "bits change" in symptom.message


def test_bits_may_change_where_a_backend_does_not_repeat_itself() -> None:
    backend = around(ChangesGradients(read_laundered_memory), repeatable_backward=False)
    assert list(unwritten_unread(Trial(KERNEL, backend, CPU))) == []


@pytest.mark.parametrize("poisons", [("nan",), ("finite",)])
def test_the_legacy_layer_is_convicted_under_either_poison(poisons: tuple[str, ...]) -> None:
    verdict = examine(LAYER, load("legacy:loop"), CPU, poisons)
    assert type(verdict.first) is (PoisonLeaked if poisons == ("nan",) else DeadRowsNotZero)
    assert {"dk", "dv", "dx"} <= {symptom.tensor for symptom in verdict.symptoms}


# Dead rows.


@pytest.mark.parametrize(("tensor", "index"), [("dk", 1), ("dv", 2)])
def test_the_smallest_gradient_in_a_dead_row_is_seen(tensor: str, index: int) -> None:
    def litter(*gradients: torch.Tensor) -> None:
        gradients[index][DEAD][0, 1, 5] = 1e-30

    verdict = kernel_verdict(ChangesGradients(litter))
    assert kinds(verdict) == {DeadRowsNotZero}
    for symptom in verdict.symptoms:
        assert (symptom.check, symptom.tensor) == ("dead_rows", tensor)
        assert "document 1, row 0" in symptom.message
        assert "1e-30" in symptom.message


def test_a_query_without_keys_is_a_dead_row_too() -> None:
    def litter(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
        dq[0, 0, 0] = 1e-30

    verdict = kernel_verdict(ChangesGradients(litter), KERNEL.replace(lengths=(3, 0, 4), key_lengths=(2, 2, 6)))
    assert kinds(verdict) == {DeadRowsNotZero}
    assert {symptom.tensor for symptom in verdict.symptoms} == {"dq"}


def test_negative_zero_is_zero() -> None:
    def negate(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
        if not dk[DEAD].any():
            dk[DEAD] = -0.0

    assert kernel_verdict(ChangesGradients(negate)).symptoms == ()


class TouchesSpareGradients(BufferedLayer):
    """Its backward alters a gradient row behind the packed sequence."""

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        dx = super().backward(dout)
        self.buffer.dv[-1] += 1e-30
        return dx


def test_a_gradient_row_outside_the_extent_is_seen() -> None:
    verdict = layer_verdict(TouchesSpareGradients)
    assert kinds(verdict) == {DeadRowsNotZero}
    assert {symptom.tensor for symptom in verdict.symptoms} == {"dv"}
    assert any("backward of [7, 15] changed rows 16" in symptom.message for symptom in verdict.symptoms)


class TouchesDeadGradients(BufferedLayer):
    """Its backward of the second micro-sequence alters the gradient of a finished document."""

    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        dx = super().backward(dout)
        if len(dout) == 8:
            self.buffer.dk[2] += 1e-30
        return dx


def test_a_dead_gradient_row_that_gets_overwhelmed_later_is_seen() -> None:
    verdict = layer_verdict(TouchesDeadGradients)
    assert kinds(verdict) == {DeadRowsNotZero}
    assert all("backward of [7, 15] changed rows 2 " in symptom.message for symptom in verdict.symptoms)


# The buffer.


class WritesAhead(BufferedLayer):
    """Its forward also writes the row behind its slice, which the next one overwrites."""

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        out = super().forward(x, begin, end)
        if begin == 0:
            self.buffer.k.data[end] = 1.0
        return out


class RewritesThePast(BufferedLayer):
    """Its forward also alters a finished document, to which nothing attends any more."""

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        out = super().forward(x, begin, end)
        if begin:
            self.buffer.v.data[0, 0, 0] *= 1 + 2**-22
        return out


@pytest.mark.parametrize(
    ("layer", "tensor", "step"),
    [
        (WritesAhead, "k", "forward of [0, 7] changed rows [7]"),
        (RewritesThePast, "v", "forward of [7, 15] changed rows [0]"),
    ],
)
def test_a_write_outside_the_slice_is_seen(layer: type[BufferedLayer], tensor: str, step: str) -> None:
    verdict = layer_verdict(layer)
    assert kinds(verdict) == {WroteOutside}
    assert verdict.checks == ("buffer_intact",)
    assert {symptom.tensor for symptom in verdict.symptoms} == {tensor}
    assert all(step in symptom.message for symptom in verdict.symptoms)


class WrongKeys(BufferedLayer):
    """Stores values that are 2 % too large in the buffer, after it has attended."""

    def forward(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        out = super().forward(x, begin, end)
        if end == self.case.tokens:
            self.buffer.k.data[begin:end] *= 1.02
        return out


def test_a_wrong_buffer_is_seen() -> None:
    assert type(layer_verdict(WrongKeys, LAYER.replace(cuts=())).first) is WrongBuffer


# Inputs.


def flip_query(call: Call, q: torch.Tensor, k: torch.Tensor) -> None:
    q[0, 0, 0] += 1.0


def write_before_keys(call: Call, q: torch.Tensor, k: torch.Tensor) -> None:
    k.as_strided((1,), (1,), k.storage_offset() - 1).fill_(1.0)


def write_behind_keys(call: Call, q: torch.Tensor, k: torch.Tensor) -> None:
    k.as_strided((1,), (1,), k.storage_offset() + k.numel()).fill_(1.0)


def change_sums(call: Call, q: torch.Tensor, k: torch.Tensor) -> None:
    call.metadata.cu_seqlens_q[-1] += 1


MEDDLING: dict[str, tuple[Callable[[Call, torch.Tensor, torch.Tensor], None], str]] = {
    "q": (flip_query, "values of q"),
    "in front of k": (write_before_keys, "guard margins of k"),
    "behind k": (write_behind_keys, "guard margins of k"),
    "prefix sums": (change_sums, "cu_seqlens_q"),
}


@pytest.mark.parametrize("name", MEDDLING)
def test_changed_inputs_are_seen(name: str) -> None:
    meddle, what = MEDDLING[name]
    (symptom,) = kernel_verdict(AfterBackward(meddle)).symptoms
    assert type(symptom) is InputsChanged
    assert (symptom.check, symptom.tensor) == ("inputs_intact", what)


def test_gaps_between_rows_are_guarded_too() -> None:
    """In the fused layout the row of V follows each row of K."""

    def write_into_gap(call: Call, q: torch.Tensor, k: torch.Tensor) -> None:
        k.as_strided((1,), (1,), k.storage_offset() + k.shape[1] * k.shape[2]).fill_(1.0)

    (symptom,) = kernel_verdict(AfterBackward(write_into_gap), KERNEL.replace(memory="fused")).symptoms
    assert (type(symptom), symptom.tensor) == (InputsChanged, "guard margins of k")


class ChangesWeights(BufferedLayer):
    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        dx = super().backward(dout)
        if not self._pending:
            self.weights["dense"].data[0, 0] += 1.0
        return dx


def test_changed_weights_are_seen() -> None:
    (symptom,) = layer_verdict(ChangesWeights).symptoms
    assert (type(symptom), symptom.tensor) == (InputsChanged, "values of weight dense")


# The budget.


def largest_wrong(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
    dv.view(-1)[dv.abs().argmax()] *= 1.02


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_one_wrong_gradient_element_is_seen(dtype: str) -> None:
    (symptom,) = kernel_verdict(ChangesGradients(largest_wrong), KERNEL.replace(dtype=dtype)).symptoms
    assert type(symptom) is WrongGradV
    assert (symptom.check, symptom.tensor) == ("budget", "dv")
    assert "1 of 352 elements wrong" in symptom.message
    assert symptom.z is not None
    assert symptom.z > LIMIT


def test_a_wrong_element_is_placed_in_its_document() -> None:
    def wrong(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
        dv[6, 1, 3] += 1.0

    (symptom,) = kernel_verdict(ChangesGradients(wrong)).symptoms
    assert "document 2, row 1, head 1, channel 3" in symptom.message
    assert "in documents [2]" in symptom.message


class ScalesOutput(Loop):
    def forward(self, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().forward(*args)  # type: ignore[arg-type]
        return out * 1.02, lse


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_scaled_output_is_seen(dtype: str) -> None:
    first = kernel_verdict(ScalesOutput(), KERNEL.replace(dtype=dtype)).first
    assert type(first) is WrongOutput
    assert (first.check, first.tensor) == ("budget", "out")


class ShiftedLse(Double):
    def attend(self, *args: object) -> Attended:
        attended = super().attend(*args)  # type: ignore[arg-type]
        assert attended.lse is not None
        return attended._replace(lse=attended.lse + 0.01)


def test_a_wrong_lse_is_seen() -> None:
    (symptom,) = examine(KERNEL, around(Loop(), ShiftedLse), CPU).symptoms
    assert (type(symptom), symptom.tensor) == (WrongLse, "lse")


class ScalesInputGradient(BufferedLayer):
    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        return super().backward(dout) * 1.02


class ForgetsParameterGradient(BufferedLayer):
    """Leaves the last micro-sequence out of one projection's gradient."""

    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        gradients = super().parameter_gradients()
        return gradients | {"query": gradients["query"] * 0.5}


@pytest.mark.parametrize(
    ("layer", "symptom", "tensor"),
    [
        (ScalesInputGradient, WrongInputGradient, "dx"),
        (ForgetsParameterGradient, WrongParameterGradient, "d_query"),
    ],
)
def test_wrong_layer_gradients_are_seen(layer: type[BufferedLayer], symptom: type[Symptom], tensor: str) -> None:
    assert [(type(found), found.tensor) for found in layer_verdict(layer).symptoms] == [(symptom, tensor)]


class WrongForOneDraw(Loop):
    """Wrong only for one draw of values.

    Args:
        z: by how much, in standard deviations of the budget.
    """

    def __init__(self, z: float) -> None:
        answer = kernel_answer(KERNEL, kernel_inputs(KERNEL, "cpu"), Profile())["dv"]
        self.error = z * float(answer.variance[0, 0, 0].sqrt())

    def backward(self, call: Call, q: torch.Tensor, *args: torch.Tensor) -> Gradients:
        dq, dk, dv = super().backward(call, q, *args)
        if torch.equal(q, kernel_inputs(KERNEL, "cpu").q):
            dv[0, 0, 0] += self.error
        return dq, dk, dv


def test_an_error_under_one_value_seed_only_accuses_nobody() -> None:
    verdict = kernel_verdict(WrongForOneDraw(3 * LIMIT))
    assert verdict.worst_z["dv"] > LIMIT
    assert verdict.symptoms == ()


def test_an_error_beyond_doubt_needs_no_second_value_seed() -> None:
    (symptom,) = kernel_verdict(WrongForOneDraw(2 * beyond_doubt(KERNEL))).symptoms
    assert isinstance(symptom, WrongGradV)


def expected(value: float, variance: float) -> Expected:
    return Expected(torch.tensor([value], dtype=torch.float64), torch.tensor([variance], dtype=torch.float64))


@pytest.mark.parametrize(
    ("got", "value", "variance", "z"),
    [
        (1.5, 1.0, 0.0625, 2.0),
        (0.0, 0.0, 0.0, 0.0),
        (1e-30, 0.0, 0.0, torch.inf),
        (torch.nan, 1.0, 1.0, torch.inf),
        (torch.inf, 1.0, 1.0, torch.inf),
        (-torch.inf, -torch.inf, 0.0, 0.0),
        (0.0, -torch.inf, 0.0, torch.inf),
    ],
)
def test_deviations(got: float, value: float, variance: float, z: float) -> None:
    assert deviations(KERNEL, torch.tensor([got]), expected(value, variance)).item() == z


def test_values_that_do_not_fit_the_dtype_owe_nothing() -> None:
    overflowed = torch.tensor([torch.inf], dtype=torch.float16)
    assert deviations(KERNEL.replace(dtype="fp16"), overflowed, expected(1e5, 1.0)).item() == 0
    assert deviations(KERNEL, overflowed.float(), expected(1e5, 1.0)).item() == torch.inf


# Crashes and missing results.


class Crashes(Loop):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def forward(self, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("\nCUDA error: no kernel image\nand a second line"), "RuntimeError: CUDA error: no kernel image"),
        (AssertionError(), "AssertionError: (no message)"),
        (IndexError("x" * 999), "IndexError: " + "x" * 300),
    ],
)
def test_a_crash_is_one_symptom_of_one_line(error: Exception, message: str) -> None:
    (symptom,) = kernel_verdict(Crashes(error)).symptoms
    assert (type(symptom), symptom.check) == (Crashed, "runs")
    # The innermost line outside this project and its packages, where somebody will look first.
    assert re.fullmatch(re.escape(message) + r" \(test_checks\.py, line \d+\)", symptom.message)


def test_a_crash_in_the_backward_is_a_crash() -> None:
    def crash(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
        raise RuntimeError("in the backward")

    assert type(kernel_verdict(ChangesGradients(crash)).first) is Crashed


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory")])
def test_running_out_of_memory_accuses_nobody(error: Exception) -> None:
    with pytest.raises(type(error)):
        kernel_verdict(Crashes(error))


def test_an_unsupported_case_is_no_crash() -> None:
    with pytest.raises(UnsupportedCase, match="found out late"):
        kernel_verdict(Crashes(UnsupportedCase("found out late")))


class WrongLseShape(Double):
    def attend(self, *args: object) -> Attended:
        attended = super().attend(*args)  # type: ignore[arg-type]
        assert attended.lse is not None
        return attended._replace(lse=attended.lse.T)


class NoLse(Double):
    def attend(self, *args: object) -> Attended:
        return super().attend(*args)._replace(lse=None)  # type: ignore[arg-type]


class WrongOutShape(Double):
    def attend(self, *args: object) -> Attended:
        attended = super().attend(*args)  # type: ignore[arg-type]
        return attended._replace(out=attended.out[:-1])


class WrongInputGradientShape(BufferedLayer):
    def backward(self, dout: torch.Tensor) -> torch.Tensor:
        return super().backward(dout)[1:]


class LosesParameterGradient(BufferedLayer):
    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        gradients = super().parameter_gradients()
        del gradients["dense"]
        return gradients


class ShowsNoBuffer(BufferedLayer):
    def key_value(self) -> None:
        return None

    def key_value_gradients(self) -> None:
        return None


def test_a_result_of_the_wrong_shape_is_missing() -> None:
    (symptom,) = examine(KERNEL, around(Loop(), WrongLseShape), CPU).symptoms
    assert (type(symptom), symptom.check, symptom.tensor) == (MissingResult, "complete", "lse")
    assert "[2, 7]" in symptom.message
    assert "[7, 2]" in symptom.message


def test_an_output_of_the_wrong_shape_convicts() -> None:
    """No backward can run from it, so that the call itself fails."""
    assert kinds(examine(KERNEL, around(Loop(), WrongOutShape), CPU)) <= {Crashed, MissingResult}


def test_a_kernel_may_keep_its_lse() -> None:
    assert examine(KERNEL, around(Loop(), NoLse), CPU).symptoms == ()


@pytest.mark.parametrize(("layer", "tensor"), [(WrongInputGradientShape, "dx"), (LosesParameterGradient, "d_dense")])
def test_missing_layer_results_are_seen(layer: type[BufferedLayer], tensor: str) -> None:
    (symptom,) = layer_verdict(layer).symptoms
    assert (type(symptom), symptom.tensor) == (MissingResult, tensor)


def test_a_layer_may_keep_its_buffer() -> None:
    assert layer_verdict(ShowsNoBuffer).symptoms == ()


# Verdicts.


def test_symptoms_stand_in_order_of_rank() -> None:
    def several(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
        largest_wrong(dq, dk, dv)
        dk[DEAD] = 1e-30
        dq[0] = torch.empty_like(dq[0])

    verdict = kernel_verdict(ChangesGradients(several))
    ranks = [symptom.rank for symptom in verdict.symptoms]
    assert ranks == sorted(ranks)
    assert verdict.checks == ("unwritten", "dead_rows", "budget")
    assert verdict.first is verdict.symptoms[0]


@pytest.mark.parametrize(
    ("tensor", "row", "place"),
    [("dq", 3, (2, 0)), ("dk", 3, (1, 0)), ("dv", 10, (2, 5)), ("out", 0, (0, 0)), ("d_query", 3, (None, 3))],
)
def test_rows_are_named_by_document(tensor: str, row: int, place: tuple[int | None, int]) -> None:
    assert Trial(KERNEL, load("loop"), CPU).document_of(tensor, row) == place


# Runs that other checks make.


class InferenceWrites(Double):
    """Without autograd the output goes where the queries lie."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        if not torch.is_grad_enabled():
            q.copy_(attended.out)
        return attended


def test_inputs_that_only_inference_writes_to_are_seen() -> None:
    """By each probe that makes such a call: in inference, and in parts of the keys that are merged."""
    verdict = examine(KERNEL, around(Loop(), InferenceWrites), CPU)
    assert {(type(symptom), symptom.check, symptom.tensor) for symptom in verdict.symptoms} == {
        (InputsChanged, "inputs_intact", "values of q")
    }


# Additivity.

APART = LAYER.replace(lengths=(4, 3, 10), cuts=(4, 7), dtype="bf16", query_norm="rms", key_norm="rms", value_norm="rms")
"""Cut between documents only."""


class RoundsOneSum(BufferedLayer):
    """Hands one parameter's gradient over in float32, but with what the storage dtype has left of it."""

    rounded = ""

    def parameter_gradients(self) -> dict[str, torch.Tensor]:
        return {
            name: gradient.bfloat16().float() if name == self.rounded else gradient
            for name, gradient in super().parameter_gradients().items()
        }


@pytest.mark.parametrize("name", ["query", "key_value", "query_norm", "key_norm", "value_norm"])
def test_a_parameters_sum_that_was_rounded_does_not_add_up(name: str) -> None:
    layer = type("RoundsIt", (RoundsOneSum,), {"rounded": name})
    trial = Trial(APART, Backend("double", load("loop").kernel, layer), CPU)
    (symptom,) = sums_add_up(trial)
    assert (type(symptom), symptom.check, symptom.tensor) == (NotExact, "additivity", f"d_{name}")


@pytest.mark.slow
@pytest.mark.parametrize("case", [APART, APART.replace(cuts=(3, 9)), APART.replace(cuts=(4, 8), padding=1, ranks=2)])
def test_correct_sums_add_up(case: Case) -> None:
    for dtype in ("bf16", "fp16"):
        assert list(sums_add_up(Trial(case.replace(dtype=dtype), load("loop"), CPU))) == []


def test_what_is_handed_over_in_the_storage_dtype_need_not_add_up() -> None:
    class InDtype(BufferedLayer):
        def parameter_gradients(self) -> dict[str, torch.Tensor]:
            return {name: x.bfloat16() for name, x in super().parameter_gradients().items()}

    trial = Trial(APART, Backend("double", load("loop").kernel, InDtype), CPU)
    assert list(sums_add_up(trial)) == []
