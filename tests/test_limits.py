"""What a user's kernel takes is found out before it is fuzzed: limits are named, and end no campaign."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from commandline import Run
from in_turn import InThisProcess

from attn_fuzz.backends import known, registry
from attn_fuzz.backends.kernel import BackendUnavailable, Capabilities
from attn_fuzz.backends.known import KnownIssue, built_on
from attn_fuzz.campaign import limits
from attn_fuzz.campaign.endings import cause_of_death
from attn_fuzz.campaign.isolated import Ended, Isolated, Report, Subject
from attn_fuzz.campaign.limit_questions import GROUPED_VALUES, LENGTHS, OTHER_VALUES
from attn_fuzz.campaign.limits import Limit, LimitsFound, infer_limits, taken, without_of
from attn_fuzz.generation.domain import Domain
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import WrongOutput
from attn_fuzz.reference.case import MEMORIES, Case

KERNEL = """
import os
import torch

def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False):
    FIRST
    out = []
    for (a, b), (c, d) in zip(cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist()):
        own, keys, values = (x.float().transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        seen = torch.ones(b - a, d - c, dtype=torch.bool)
        seen = seen.tril(d - c - (b - a)) if causal else seen
        scores = (own @ keys.transpose(1, 2)) * (softmax_scale or q.shape[-1] ** -0.5)
        p = torch.exp(scores.masked_fill(~seen, -torch.inf) - scores.masked_fill(~seen, -1e30).logsumexp(-1)[..., None])
        out.append((p.nan_to_num() @ values).transpose(0, 1).to(q.dtype) if d > c else 0 * q[a:b])
    out = torch.cat(out) + 0 * (q.sum() + k.sum() + v.sum())
    LAST

kernel.capabilities = CAPABILITIES
"""
PLAIN = {"queries_without_keys": False, "isolates_nonfinite": False, "empty_documents": False, "capacity": False}


def written(folder: Path, first: str = "pass", last: str = "return out", **capabilities: object) -> str:
    path = folder / "limited.py"
    text = KERNEL.replace("FIRST", first).replace("LAST", last)
    path.write_text(text.replace("CAPABILITIES", repr(PLAIN | capabilities)))
    return f"{path}:kernel"


def found(name: str, dtypes: tuple[str, ...] = ()) -> LimitsFound:
    return infer_limits(name, "cpu", dtypes, 1, lambda limit: None)


@pytest.mark.usefixtures("in_this_process")
def test_a_kernel_that_takes_what_it_declares_has_no_limits(tmp_path: Path) -> None:
    assert found(written(tmp_path, head_dims=(16, 8))) == LimitsFound(without={"head_dims_v": True})


LIMITS: dict[str, tuple[str, dict[str, Any]]] = {
    "dtype fp16": ("assert q.dtype != torch.float16", {"dtypes": ("fp32", "bf16")}),
    "grouped heads": ("assert q.shape[1] == k.shape[1]", {"gqa": False}),
    "memory strided": ("assert q.stride(-1) == 1", {"memories": tuple(m for m in MEMORIES if m != "strided")}),
    "memory misaligned": (
        "assert q.storage_offset() % 2 == 0",
        {"memories": tuple(m for m in MEMORIES if m != "misaligned")},
    ),
}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("axis", LIMITS)
def test_what_raises_is_a_limit_with_its_case_and_the_campaign_goes_on_without(axis: str, tmp_path: Path) -> None:
    first, without = LIMITS[axis]
    name = written(tmp_path, first, head_dims=(16,))
    result = found(name)
    assert [limit.axis for limit in result.limits] == [axis]
    (limit,) = result.limits
    assert limit.how in ("crashed", "refused")
    assert dict(result.without) == without
    backend = registry.load(name)
    assert backend.refusal(limit.case, "cpu") is None
    assert registry.narrowed(backend, result.without).refusal(limit.case, "cpu") is not None


OF_VALUES: dict[str, tuple[str, str, str, object]] = {
    "raises": ("assert v.shape == k.shape", "return out", "crashed", False),
    "refuses": ("if v.shape != k.shape: raise NotImplementedError('d_v')", "return out", "refused", False),
    "of another shape": (
        "pass",
        "return out[..., :1].expand(q.shape) if v.shape != k.shape else out",
        "wrong",
        False,
    ),
    "drops channels": (
        "v = v * (torch.arange(v.shape[-1]) < q.shape[-1])",
        "return out",
        "wrong",
        ((64, 32), (192, 128)),
    ),
    "no fewer": ("assert v.shape[-1] <= q.shape[-1]", "return out", "crashed", ((64, 32), (192, 128))),
}


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", OF_VALUES)
def test_values_of_another_head_dim_are_nobodys_promise(kind: str, tmp_path: Path) -> None:
    """What is not taken, or comes back wrong, is one limit, and the campaign asks for no more than was right."""
    first, last, how, pairs = OF_VALUES[kind]
    result = found(
        written(tmp_path, first, last, dtypes=("fp32",), memories=("contiguous",), gqa=False, max_head_dim=192)
    )
    (limit,) = [limit for limit in result.limits if limit.axis == OTHER_VALUES]
    assert (limit.how, result.without["head_dims_v"]) == (how, pairs)
    assert limit.case.head_dim_v is not None


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_values_of_another_head_dim_that_are_declared_are_a_promise(tmp_path: Path) -> None:
    """Then what comes back wrong is for the campaign to find."""
    few = {"dtypes": ("fp32",), "memories": ("contiguous",), "gqa": False, "head_dims": (64,)}
    wrong = "v = v * (torch.arange(v.shape[-1]) < q.shape[-1])"
    assert found(written(tmp_path, wrong, head_dims_v=[[64, 128]], **few)) == LimitsFound()
    assert found(written(tmp_path, "assert v.shape == k.shape", head_dims_v=[[64, 128]], **few)).without == {
        "head_dims_v": False
    }


EQUAL = "assert q.shape[1] == k.shape[1] or v.shape == k.shape"
"""As some backwards have it: channels of values are those of keys where heads are grouped."""

OF_GROUPS: dict[str, tuple[str, str, list[tuple[str, str]], dict[str, object]]] = {
    "all is taken": ("pass", "return out", [], {"head_dims_v": True}),
    "raises": (EQUAL, "return out", [(GROUPED_VALUES, "crashed")], {"head_dims_v": True, "gqa_head_dims_v": False}),
    "comes back wrong": (
        "v = v * (1 + (q.shape[1] > k.shape[1] and v.shape != k.shape))",
        "return out",
        [(GROUPED_VALUES, "wrong")],
        {"head_dims_v": True, "gqa_head_dims_v": False},
    ),
    "no groups": (
        "assert q.shape[1] == k.shape[1]",
        "return out",
        [("grouped heads", "crashed")],
        {"head_dims_v": True, "gqa": False},
    ),
    "no such values": ("assert v.shape == k.shape", "return out", [(OTHER_VALUES, "crashed")], {"head_dims_v": False}),
    "neither": (
        "assert v.shape == k.shape and q.shape[1] == k.shape[1]",
        "return out",
        [(OTHER_VALUES, "crashed"), ("grouped heads", "crashed")],
        {"head_dims_v": False, "gqa": False},
    ),
    "no wider ones, which are asked about first": (
        "assert v.shape[-1] <= q.shape[-1]",
        "return out",
        [(OTHER_VALUES, "crashed")],
        {"head_dims_v": ((16, 8),)},
    ),
    "no narrower ones, and none with groups": (
        f"assert v.shape[-1] >= q.shape[-1]; {EQUAL}",
        "return out",
        [(OTHER_VALUES, "crashed"), (GROUPED_VALUES, "crashed")],
        {"head_dims_v": ((8, 16),), "gqa_head_dims_v": False},
    ),
}
SOME: dict[str, Any] = {"dtypes": ("fp32",), "memories": ("contiguous",), "head_dims": (8, 16)}
"""Of which values are asked about with 16 channels beside keys of 8, then with 8 beside 16."""


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", OF_GROUPS)
def test_values_beside_grouped_heads_are_a_limit_of_their_own_where_each_is_taken(kind: str, tmp_path: Path) -> None:
    """A cause has one limit, though it shows where both are asked about, too."""
    first, last, named, without = OF_GROUPS[kind]
    name = written(tmp_path, first, last, **SOME)
    result = found(name)
    assert [(limit.axis, limit.how) for limit in result.limits] == named
    assert dict(result.without) == without
    for limit in result.limits:
        assert registry.load(name).refusal(limit.case, "cpu") is None
        assert registry.narrowed(registry.load(name), result.without).refusal(limit.case, "cpu") is not None


@pytest.mark.usefixtures("in_this_process")
def test_values_beside_grouped_heads_that_are_declared_are_a_promise(tmp_path: Path) -> None:
    """What raises is a limit, what comes back wrong is for the campaign to find, and what is left out is not asked."""
    wrong = OF_GROUPS["comes back wrong"][0]
    assert found(written(tmp_path, wrong, head_dims_v=True, **SOME)) == LimitsFound()
    assert found(written(tmp_path, EQUAL, head_dims_v=[[8, 16]], **SOME)).without == {"gqa_head_dims_v": False}
    assert found(written(tmp_path, EQUAL, head_dims_v=True, gqa_head_dims_v=False, **SOME)) == LimitsFound()


@pytest.mark.parametrize(
    ("declared", "asked"),
    [
        ({}, [((8, 16), 4, 2)]),
        ({"head_dims_v": [[16, 8], [8, 16]]}, [((16, 8), 4, 2)]),
        ({"gqa": False}, []),
        ({"gqa_head_dims_v": False}, []),
        ({"head_dims_v": False}, []),
    ],
)
def test_one_call_asks_for_values_beside_grouped_heads(
    declared: dict[str, object], asked: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[Case] = []

    class Notes(InThisProcess):
        def report(self, case: Case, *, operators: bool = False, judged: bool | None = None) -> Report:
            cases.append(case)
            return Report()

    monkeypatch.setattr(limits, "Isolated", Notes)
    found(written(tmp_path, **SOME, **declared))
    both = [case for case in cases if case.head_dim_v is not None and case.heads != case.kv_heads]
    assert [((case.head_dim, case.head_dim_v), case.heads, case.kv_heads) for case in both] == asked


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_what_a_kernel_keeps_of_the_plain_layout_shows(tmp_path: Path) -> None:
    """A launcher that keeps what was compiled for aligned addresses, and gives it others: right if those come first."""
    first = (
        "kernel.kept = getattr(kernel, 'kept', q.storage_offset() % 2); assert kernel.kept == q.storage_offset() % 2"
    )
    result = found(written(tmp_path, first, head_dims=(16,), dtypes=("fp32",)))
    assert [limit.axis for limit in result.limits] == ["memory misaligned"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_floors_of_head_dim_are_found(tmp_path: Path) -> None:
    """As of Triton's products: at least 16, and a power of two."""
    name = written(tmp_path, "assert q.shape[-1] >= 16 and q.shape[-1] & (q.shape[-1] - 1) == 0")
    result = found(name, ("bf16",))
    assert result.without["head_dims"] == (16, 32, 64, 128, 256, 512)
    assert {"head_dim 1", "head_dim 8", "head_dim 24"} <= {limit.axis for limit in result.limits}


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_windows_are_asked_about_where_the_signature_has_them(tmp_path: Path) -> None:
    name = written(tmp_path, "assert window_size == (-1, -1)", head_dims=(16,), dtypes=("fp32",))
    path = Path(name.rpartition(":")[0])
    path.write_text(path.read_text().replace("causal=False):", "causal=False, window_size=(-1, -1)):"))
    result = found(f"{path}:kernel")
    assert {limit.axis for limit in result.limits} == {"window, causal", "window, non-causal"}
    assert result.without["window"] is False


@pytest.mark.usefixtures("in_this_process")
def test_what_fails_wherever_it_is_called_is_left_to_the_campaign(tmp_path: Path) -> None:
    assert found(written(tmp_path, "raise RuntimeError('never')")) == LimitsFound()


UNUSABLE = {
    "an import that fails": ("import no_such_package", "return out", "No module named 'no_such_package'"),
    "a variable that is not set": (
        "os.environ['NO_SUCH_VARIABLE']",
        "return out",
        "it reads the environment variable 'NO_SUCH_VARIABLE', which is not set; set it, or give it a default",
    ),
    "a number": ("pass", "return 3", "the output should be a tensor, but is int"),
    "a list": ("pass", "return [out]", "the output should be a tensor, but is list"),
    "another dtype": ("pass", "return out.double()", "dtype is torch.float64, but should be torch.float32"),
    "another device": ("pass", "return out.to('meta')", "device is meta, but should be cpu"),
    "a name that is not there": ("undefined_name", "return out", "undefined_name"),
    "a function that torch lacks": ("torch.no_such_function", "return out", "no_such_function"),
    "nothing returned": ("pass", "return None", "NoneType"),
    "weights beside the output": ("pass", "return out, None", "(Tensor, NoneType)"),
    "another shape": ("pass", "return out[None]", "shape"),
    "no gradient": ("pass", "return out.detach()", "its output has no gradient; make it differentiable"),
}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("what", UNUSABLE)
def test_what_is_no_kernel_is_told_in_one_sentence(what: str, tmp_path: Path) -> None:
    first, last, words = UNUSABLE[what]
    name = written(tmp_path, first, last, dtypes=("fp32",))
    with pytest.raises(BackendUnavailable) as told:
        found(name)
    assert str(told.value).startswith(f"{name} cannot be tested: ")
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    # What checks call it is no part of the sentence.
    assert "[" not in str(told.value).partition("cannot be tested")[2] or what == "another shape"


@pytest.mark.parametrize("signature", ["(q, k, v)", "(q, k, v, cu_seqlens)", "(*, q)"])
def test_another_signature_is_refused_before_anything_runs(signature: str, tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text(f"def kernel{signature}:\n    return q\n")
    with pytest.raises(BackendUnavailable, match="is no varlen kernel, which is called with"):
        registry.load(f"{path}:kernel")


NO_FUNCTION = {
    "class kernel: pass": "is a class, not a function",
    "async def kernel(*x): return x": "is a coroutine function",
    "def kernel(*x): yield x": "is a generator function",
    "kernel = 'flash'": "is no function but of type str",
    "import torch.nn as kernel": "is no function but of type module",
}


@pytest.mark.parametrize("text", NO_FUNCTION)
def test_what_is_no_function_is_refused_before_anything_runs(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text(text)
    with pytest.raises(BackendUnavailable, match=NO_FUNCTION[text]):
        registry.load(f"{path}:kernel")


def test_a_module_has_the_signature_of_its_forward(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import torch\nclass Own(torch.nn.Module):\n    def forward(self, q, k, v): return q\nkernel = Own()\n"
    )
    with pytest.raises(BackendUnavailable, match=r"kernel\(q, k, v\) is no varlen kernel"):
        registry.load(f"{path}:kernel")


# Kernels that no process survives, and some that none comes back from.


def falling(reports: dict[tuple[int, ...], Report]) -> type[InThisProcess]:
    """Stands for ``Isolated`` with a kernel that brings this, by the lengths of a case."""

    class Falling(InThisProcess):
        def report(self, case: Case, *, operators: bool = False, judged: bool | None = None) -> Report:
            return reports[case.lengths]

    return Falling


@pytest.mark.parametrize("small", [True, False])
def test_a_kernel_that_no_process_survives_is_a_finding_at_once(
    small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = Report("Crashed", "the process was ended by SIGSEGV while it ran this case", survived=False)
    monkeypatch.setattr(limits, "Isolated", falling({LENGTHS: died, (1,): died if small else Report()}))
    fatal = found(written(tmp_path, dtypes=("fp32", "bf16"))).fatal
    assert fatal is not None
    assert fatal.case.lengths == ((1,) if small else LENGTHS)
    assert (fatal.how, fatal.message) == ("crashed", died.message)
    finding = limits.finding_of(fatal, "mine", "cpu")
    assert (finding.symptom, finding.messages) == ("Crashed", (f"Crashed [limits] every call: {died.message}",))


def test_a_kernel_that_never_returns_is_a_finding_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = Report("Hung", "the process was silent for 45 seconds", survived=False)
    monkeypatch.setattr(limits, "Isolated", falling({LENGTHS: hung}))
    fatal = found(written(tmp_path, dtypes=("fp32", "bf16"))).fatal
    assert fatal is not None
    assert limits.finding_of(fatal, "mine", "cpu").symptom == "Hung"
    assert limits.SOON_SECONDS < 60


def test_an_interruption_while_a_kernel_is_asked_begins_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Case] = []
    plain = itertools.repeat(Report(), 1)

    class Waits(InThisProcess):
        over = threading.Event()

        def report(self, case: Case, *, operators: bool = False, judged: bool | None = None) -> Report:
            if (answer := next(plain, None)) is not None:
                return answer
            begun.append(case)
            # A signal of its own: what only says that there was one wakes nobody who waits.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert self.over.wait(60)
            raise Ended

        def end(self) -> None:
            self.over.set()

    monkeypatch.setattr(limits, "Isolated", Waits)
    # What a shell starts in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            found(written(tmp_path, dtypes=("fp32",)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(begun) == 1


def test_who_has_been_ended_starts_no_process(tmp_path: Path) -> None:
    child = Isolated(Subject(written(tmp_path), "cpu"), 60.0)
    child.end()
    with pytest.raises(Ended):
        child.report(Case(level="kernel", lengths=(1,)))


def test_such_a_kernel_has_no_campaign(tmp_path: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fatal = Limit("every call", "hung", "the process was silent", Case(level="kernel", lengths=(1,)))
    monkeypatch.setattr("attn_fuzz.cli.campaigns.infer_limits", lambda *_: LimitsFound(fatal=fatal))
    monkeypatch.delattr("attn_fuzz.cli.campaigns.Pool")
    done = attn_fuzz("check", written(tmp_path), "--device", "cpu", "--json")
    assert done.status == 1
    assert "Traceback" not in done.err
    (finding,) = done.json["findings"]
    assert finding["symptom"] == "Hung"
    assert (tmp_path / ".attn-fuzz" / "findings" / f"{finding['id']}.json").is_file()


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [(4, "died with exit code 4"), (-11, "was ended by SIGSEGV"), (130, "ended with KeyboardInterrupt"), (77, "died")],
)
def test_how_a_process_ended_is_said_in_words(exit_code: int, words: str) -> None:
    assert cause_of_death(exit_code) == words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "words"),
    [("raise KeyboardInterrupt", "ended with KeyboardInterrupt"), ("raise SystemExit(4)", "died with exit code 4")],
)
def test_what_ends_its_process_says_no_more_than_that(
    deed: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = Isolated(Subject(written(tmp_path, deed), "cpu", judged=False), 120.0)
    try:
        report = child.report(Case(level="kernel", lengths=(1,)))
    finally:
        child.close()
    assert report.message == f"the process {words} while it ran this case"
    assert not report.survived
    assert "Traceback" not in capfd.readouterr().err


def test_a_layer_that_is_built_otherwise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    methods = ("forward", "backward", "parameter_gradients", "key_value", "key_value_gradients")
    path.write_text("class Layer:\n    def __init__(self): pass\n" + "".join(f"    {m} = print\n" for m in methods))
    with pytest.raises(BackendUnavailable, match=r"built as CLASS\(weights, case\)"):
        registry.load(f"layer:{path}:Layer")


FEW = {"dtypes": ("bf16",), "head_dims": (16,), "memories": ("contiguous", "misaligned"), "gqa": False}
"""Little to be asked for."""


@pytest.mark.slow
def test_a_crash_costs_an_answer_and_no_campaign(tmp_path: Path, attn_fuzz: Run) -> None:
    """The command, with real processes: one layout kills them, and the campaign is clean without it."""
    name = written(tmp_path, "q.storage_offset() % 2 and os.kill(os.getpid(), 11)", **FEW)
    options = ("--device", "cpu", "--workers", "1", "--cases", "12", "--mode", "case", "--level", "kernel", "--json")
    done = attn_fuzz("check", name, *options)
    assert done.status == 0, done.err
    told = json.loads(done.out)
    (limit,) = told["limits"]
    assert (limit["axis"], limit["how"]) == ("memory misaligned", "crashed")
    assert limit["case"]["memory"] == "misaligned"
    assert told["cases"] == 12
    assert told["findings"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_strict_makes_limits_findings(tmp_path: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(level="kernel", lengths=(1,), memory="misaligned", head_dim=16)
    limit = Limit("memory misaligned", "crashed", "it died", case, "known: so and so")
    monkeypatch.setattr(
        "attn_fuzz.cli.campaigns.infer_limits", lambda *_: LimitsFound((limit,), {"memories": MEMORIES[:2]})
    )
    options = ("--device", "cpu", "--workers", "1", "--cases", "4", "--mode", "case", "--level", "kernel", "--strict")
    done = attn_fuzz("check", written(tmp_path, dtypes=("fp32",), head_dims=(16,)), *options, "--json")
    assert done.status == 1, done.err
    (finding,) = json.loads(done.out)["findings"]
    assert (finding["symptom"], finding["checks"], finding["case"]["memory"]) == ("Crashed", ["limits"], "misaligned")
    assert finding["messages"][1] == "Known below it: known: so and so"
    assert (tmp_path / ".attn-fuzz" / "findings" / f"{finding['id']}.json").is_file()


@pytest.mark.parametrize(
    ("dim", "right", "wrong", "expected"),
    [
        (32, {64, 16}, {1, 8}, True),
        (32, {64}, {8, 16}, False),
        (5, {8, 16}, {1}, False),
        (100, {36}, {1, 5}, True),
        (224, {80}, {320}, False),
        (256, {64, 128}, {320}, True),
        (24, {64}, {1}, True),
    ],
)
def test_a_head_dim_that_was_not_asked_is_as_the_nearest_of_its_kind(
    dim: int, right: set[int], wrong: set[int], expected: bool
) -> None:
    assert taken(dim, right, wrong) is expected


def test_without_is_what_is_declared_less_the_limits() -> None:
    domain = Domain.of(Capabilities(), "cpu")
    case = Case(level="kernel", lengths=(1,))
    axes = ("dtype fp32", "memory fused", "window, non-causal")
    without = without_of([Limit(axis, "crashed", "", case) for axis in axes], {64}, domain)
    assert without == {
        "dtypes": ("bf16", "fp16"),
        "memories": tuple(memory for memory in MEMORIES if memory != "fused"),
        "window_needs_causal": True,
    }


@pytest.fixture
def torch_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> KnownIssue:
    """A known issue of torch's sum, on CPUs, of cases of three tokens and layouts that are misaligned."""
    (example,) = (issue for issue in known.KNOWN if issue.id == "sdpa-16-byte-rows")
    issue = dataclasses.replace(
        example,
        device="cpu",
        present=lambda: True,
        covers=lambda case, calls: case.tokens == 3 or case.memory == "misaligned",
        operators=("aten::sum",),
    )
    monkeypatch.setattr(known, "KNOWN", (issue,))
    return issue


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_limit_names_the_known_fault_below_it(tmp_path: Path, torch_is_at_fault: KnownIssue) -> None:
    result = found(written(tmp_path, "assert q.storage_offset() % 2 == 0", head_dims=(16,), dtypes=("bf16",)))
    (limit,) = result.limits
    assert limit.below is not None
    assert torch_is_at_fault.id in limit.below
    assert torch_is_at_fault.reference in limit.below


def test_what_a_known_fault_below_explains_is_no_finding(tmp_path: Path, torch_is_at_fault: KnownIssue) -> None:
    """The kernel runs torch's sum: wrong results are known in the cases that the issue covers, and in no others."""
    backend = registry.load(written(tmp_path, last="return out * 1.5"))
    three, four = (Case(level="kernel", lengths=(n,), head_dim=16) for n in (3, 4))
    assert examine(three, backend, "cpu").known == (torch_is_at_fault.id,)
    assert examine(three, backend, "cpu").first is None
    assert type(examine(four, backend, "cpu").first) is WrongOutput
    other = dataclasses.replace(torch_is_at_fault, operators=("aten::no_such_operator",))
    assert not built_on(other, ("aten::sum",))
