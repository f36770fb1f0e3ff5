"""A user's own layer over ranks under test: right ones, broken ones, ranks that fall; what may be declared of ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from random import Random

import pytest
import torch
from commandline import Run, sentence
from devices import needs_cuda
from hunts import first_failure, first_finding
from hypothesis import given, settings
from rewritten import rewritten

from attn_fuzz import api as attn_fuzz_api
from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable, Capabilities
from attn_fuzz.campaign.limit_questions import plain_case
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.campaign.ranks_taken import require_ranks
from attn_fuzz.cases.spread import in_multiples
from attn_fuzz.evaluation.seeded_faults import drawn
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layer_calls import draw_layer_batch
from attn_fuzz.generation.strategies import cases
from attn_fuzz.oracle.examine import examine, some_probes
from attn_fuzz.ranks import stillness
from attn_fuzz.ranks.rank_group import rank_groups
from attn_fuzz.ranks.stillness import Stillness, asleep
from attn_fuzz.reduction.minimise import minimise
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import micro_sequences, owned_slices

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "my_rank_layer.py"
TENSOR = ROOT / "tests" / "user_tensor_layer.py"
CPU = torch.device("cpu")

ACROSS = Case(lengths=(4, 1, 9), padding=2, cuts=(8,), heads=4, kv_heads=2, head_dim=8, ranks=2, capacity=3)
"""Documents over rank borders and a cut, padding on the last rank, spare rows; 2 or 4 ranks."""

REDUCED = "        dist.reduce_scatter(own, parts, group=self.group)\n"

# Each breaks a line or two of the example.
BREAKS = {
    "gathered_backwards": ("return torch.cat(parts)", "return torch.cat(parts[::-1])"),
    "sum_forgotten": (REDUCED, "        own.copy_(parts[self.rank])\n"),
    "share_forgotten": (REDUCED, "        parts = [part * (self.rank + 1 < self.ranks) for part in parts]\n" + REDUCED),
    "past_forgotten": (
        "first = self.first_row[own.start]",
        "first = own.start if self.rank else self.first_row[begin]",
    ),
    "first_ranks_extent": (
        "        self.gradient[first : own.stop] += leaf.grad\n",
        "        extent = self.first_row[begin]\n        self.gradient[extent : extent + len(leaf)] += leaf.grad\n",
    ),
    "first_ranks_positions": (
        "row, key = torch.arange(own.start, own.stop, device=x.device)",
        "row, key = torch.arange(begin, begin + size, device=x.device)",
    ),
    "others_parameter_gradients": (
        "        return self.gradients\n",
        "        for gradient in self.gradients.values() if self.group else ():\n"
        "            dist.all_reduce(gradient, group=self.group)\n        return self.gradients\n",
    ),
    "stale_rows": (
        "self.buffer[begin:end] = self.gathered(key_value.detach())",
        "self.buffer[begin : own.stop] = self.gathered(key_value.detach())[: own.stop - begin]",
    ),
    "reduced_in_the_dtype": (
        "        own = torch.empty_like(parts[self.rank])\n",
        "        parts = [part.to(self.buffer.dtype) for part in parts]\n"
        "        own = torch.empty_like(parts[self.rank])\n",
    ),
    "one_rank_shows_another_buffer": (
        "        return self.buffer[:, 0], self.buffer[:, 1]",
        "        return self.buffer[self.rank :, 0], self.buffer[:, 1]",
    ),
}

# What shows each: the symptom that names it and its check, in the smallest case, as campaigns have shrunk it.
EXPECTED: dict[str, tuple[str, str, dict[str, object]]] = {
    "gathered_backwards": ("WrongOutput", "budget", {"lengths": (2,)}),
    "sum_forgotten": ("WrongGradK", "budget", {"lengths": (3,), "padding": 1}),
    "share_forgotten": ("WrongGradK", "budget", {"lengths": (2,)}),
    "past_forgotten": ("WrongOutput", "budget", {"lengths": (2,)}),
    "first_ranks_extent": ("DeadRowsNotZero", "dead_rows", {"lengths": (1, 1)}),
    "first_ranks_positions": ("WrongOutput", "budget", {"lengths": (2,)}),
    "others_parameter_gradients": ("WrongParameterGradient", "budget", {"lengths": (2,)}),
    "stale_rows": ("PoisonLeaked", "unwritten", {"lengths": (2,)}),
    "reduced_in_the_dtype": ("NotExact", "exact_accumulation", {"lengths": (2,), "dtype": "bf16"}),
    "one_rank_shows_another_buffer": ("RanksDiffer", "replicas", {"lengths": (2,)}),
}

OPTIONS = ("--device", "cpu", "--json", "--workers", "1")


written = functools.partial(rewritten, EXAMPLE)
"""The example with some of it replaced."""


def loaded(path: Path) -> registry.Backend:
    return registry.load(f"layer:{path}:Layer")


def said(case: Case, backend: registry.Backend) -> list[str]:
    return [str(symptom) for symptom in examine(case, backend, CPU).symptoms]


def job(path: Path, *, cases: int = 40) -> Assignment:
    """What a campaign on a layer over 2 and 4 ranks gives its worker."""
    return Assignment(
        backend=f"layer:{path}:Layer",
        device="cpu",
        seed=0,
        levels=("layer",),
        cases=cases,
        stop_at_first=True,
        ranks=(2, 4),
    )


# Right ones.


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_example_is_clean(dtype: str, ranks: int) -> None:
    assert said(ACROSS.replace(dtype=dtype, ranks=ranks), loaded(EXAMPLE)) == []


@pytest.mark.slow
def test_the_example_is_clean_on_drawn_cases() -> None:
    backend = loaded(EXAMPLE)
    for case in drawn(backend, seed=0, count=16, spread=((1, 2, 4), (1,))):
        assert examine(case, backend, "cpu", probes=some_probes(case)).symptoms == (), case.to_json()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tensor_ranks"), [(1, 2), (2, 2)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_layer_over_tensor_parallel_ranks_is_handed_both_groups(dtype: str, ranks: int, tensor_ranks: int) -> None:
    case = ACROSS.replace(kv_heads=1, dtype=dtype, ranks=ranks, tensor_ranks=tensor_ranks)
    assert said(case, loaded(TENSOR)) == []


RING = "        if self.group is not None and self.rank < 2 < self.ranks:\n            one = torch.ones(1)\n" + (
    "            dist.send(one, 1, group=self.group) if self.rank == 0 else dist.recv(one, 0, group=self.group)\n"
)


@pytest.mark.slow
def test_what_is_sent_to_one_neighbour_only_is_no_fault(tmp_path: Path) -> None:
    """Ranks count other numbers of messages then, as the ends of rings do."""
    ring = loaded(
        written(
            tmp_path, "        x = x.detach().requires_grad_()\n", RING + "        x = x.detach().requires_grad_()\n"
        )
    )
    case = ACROSS.replace(ranks=4)
    for _ in range(2):
        assert examine(case, ring, CPU, ("nan",), probes=()).symptoms == ()


# Broken ones.


@functools.cache
def said_of_example(case: Case) -> list[str]:
    """Of the layer before a line was broken; several lines break in one case."""
    return said(case, loaded(EXAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_shows_in_a_small_case(name: str, tmp_path: Path) -> None:
    symptom, check, layout = EXPECTED[name]
    case = Case(head_dim=1, hidden=1, ranks=2, **layout)  # type: ignore[arg-type]
    verdict = examine(case, loaded(written(tmp_path, *BREAKS[name])), CPU)
    assert (type(verdict.first).__name__, verdict.checks[0]) == (symptom, check)
    assert said_of_example(case) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_convicted(name: str, tmp_path: Path) -> None:
    found = first_failure(job(written(tmp_path, *BREAKS[name])))
    assert found.cases_to_find <= 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gathered_backwards", "others_parameter_gradients"])
def test_a_broken_line_is_shrunk_to_the_fewest_ranks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hypothesis need not shrink what is shrunk after it.
    monkeypatch.setattr("attn_fuzz.campaign.worker._SHRINK_SECONDS", 0.5)
    found = first_finding(job(written(tmp_path, *BREAKS[name])))
    assert found.symptom == EXPECTED[name][0]
    assert (found.case.ranks, found.case.tokens) == (2, 2)


# Ranks that fall.

BEGINS = "        x = x.detach().requires_grad_()\n"
FALLS = {
    "raises": (
        f"        assert not self.rank, 'no such rank'\n{BEGINS}",
        "rank 1 of 2 raised AssertionError: no such rank (written.py, line ",
    ),
    "dies": (f"        import os\n        self.rank and os._exit(3)\n{BEGINS}", "rank 1 of 2 died with exit code 3"),
    "waits": (
        f"        self.rank and dist.recv(torch.empty(1), 0, group=self.group)\n{BEGINS}",
        "of 2 ranks, 0, 1 wait for what never comes",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", FALLS)
def test_a_rank_that_falls_is_named(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stillness, "STILL", 0.5)
    lines, told = FALLS[how]
    verdict = examine(ACROSS, loaded(written(tmp_path, BEGINS, lines)), CPU)
    (symptom,) = verdict.symptoms
    assert type(symptom).__name__ == ("Hung" if how == "waits" else "Crashed")
    assert told in symptom.message
    assert said(ACROSS, loaded(EXAMPLE)) == []


@pytest.mark.slow
def test_a_result_of_another_shape_on_one_rank_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "        return out.detach()\n", "        return out.detach()[self.rank :]\n")
    (symptom,) = examine(ACROSS, loaded(path), CPU).symptoms
    assert type(symptom).__name__ == "MissingResult"
    assert "on rank 1 of 2, the shape of what forward gives is [3, 16], but should be [4, 16]" in symptom.message


@pytest.mark.slow
def test_a_collective_that_is_left_over_does_not_meet_the_next_case(tmp_path: Path) -> None:
    """Of the last call of a case, so that everybody comes back; another layer has other ranks."""
    ends = "        return self.gradients\n"
    left = (
        "        if self.rank:\n            one = torch.ones(1)\n"
        "            Layer.kept = dist.all_reduce(one, group=self.group, async_op=True)\n"
    )
    case = ACROSS.replace(seed=1)
    path = written(tmp_path, ends, left + ends)
    for each in (path, EXAMPLE):
        verdict = examine(case, loaded(each), CPU, ("nan",), probes=())
    assert verdict.symptoms == ()


def proc(folder: Path, *threads: tuple[str, float, str]) -> Path:
    """What the system says of process 7: of each thread its state, seconds that it has run, and children."""
    for number, (state, seconds, children) in enumerate(threads):
        task = folder / "7" / "task" / str(7 + number)
        task.mkdir(parents=True)
        (task / "stat").write_text(f"7 (a) b) {state} 1 2")
        (task / "schedstat").write_text(f"{int(seconds * 1e9)} 500000000 3")
        (task / "children").write_text(children)
    return folder


@pytest.mark.parametrize(
    ("threads", "wanted"),
    [
        ([("S", 1.0, ""), ("S", 2.0, "")], 4.0),
        # A transport's thread looks for messages.
        ([("S", 1.0, ""), ("R", 0.0, "")], 2.0),
        ([("R", 1.0, ""), ("S", 2.0, "")], None),
        ([("S", 1.0, ""), ("D", 2.0, "")], None),
        ([("T", 1.0, "")], None),
        ([("S", 1.0, "8 ")], None),
    ],
)
def test_who_sleeps_is_told_by_the_system(
    threads: list[tuple[str, float, str]], wanted: float | None, tmp_path: Path
) -> None:
    assert asleep(7, proc(tmp_path, *threads)) == wanted


def test_nothing_is_said_of_a_process_that_is_gone(tmp_path: Path) -> None:
    assert asleep(7, tmp_path) is None


def test_stillness_lasts_while_nothing_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, wanted = [0.0], dict.fromkeys((7, 8), 1.0)
    monkeypatch.setattr(stillness.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stillness, "asleep", lambda pid: wanted[pid])
    looks = Stillness([7, 8])

    def look(seconds: float) -> bool:
        now[0] += seconds
        return looks.lasts([0, 1])

    assert [look(1.0), look(1.0), look(1.0)] == [False, False, True]
    # One works for a second.
    wanted[8] = 2.0
    assert [look(1.0), look(1.0), look(1.0)] == [False, False, True]
    wanted[7] = None  # type: ignore[assignment]
    assert [look(3.0), look(3.0)] == [False, False]


# What is declared.


@pytest.mark.parametrize(
    ("declared", "ranks", "tensor_ranks", "refusal"),
    [
        ("True", 3, 1, None),
        ("[1, 2]", 2, 1, None),
        ("[1, 2]", 4, 1, "4 ranks"),
        ("[2]", 1, 1, "1 rank"),
        ("False", 2, 1, "more than one rank"),
        ("True", 1, 2, "2 tensor ranks"),
    ],
)
def test_only_declared_ranks_are_taken(
    declared: str, ranks: int, tensor_ranks: int, refusal: str | None, tmp_path: Path
) -> None:
    backend = loaded(written(tmp_path, '"ranks": True', f'"ranks": {declared}'))
    assert backend.refusal(Case(lengths=(12,), heads=2, ranks=ranks, tensor_ranks=tensor_ranks), "cpu") == refusal


def test_the_example_without_ranks_takes_none() -> None:
    backend = registry.load(f"layer:{ROOT / 'examples' / 'my_layer.py'}:Layer")
    assert backend.refusal(Case(lengths=(4,), ranks=2), "cpu") == "more than one rank"


@pytest.mark.parametrize("value", ["'two'", "[]", "[0]", "[2.0]", "4"])
def test_ranks_that_are_no_numbers_are_told(value: str, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"capabilities: ranks must be True"):
        loaded(written(tmp_path, '"ranks": True', f'"ranks": {value}'))


def test_a_class_that_declares_ranks_is_built_with_a_group(tmp_path: Path) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"should be built as CLASS\(weights, case, group=\.\.\.\): got an unex"
    ):
        loaded(written(tmp_path, "case, group=None):", "case):\n        group = None"))
    with pytest.raises(BackendUnavailable, match=r"should be built as CLASS\(weights, case\): missing a required arg"):
        loaded(written(tmp_path, "case, group=None):", "case, group):"))


@pytest.mark.parametrize(
    ("path", "ranks", "tensor_ranks", "told"),
    [
        (ROOT / "examples" / "my_layer.py", (2,), (1,), "does not declare that it goes over ranks"),
        (EXAMPLE, (2,), (2,), "does not declare that it goes over tensor ranks"),
        (TENSOR, (1, 2, 4), (2,), "takes 1, 2 ranks, not 4; choose with --ranks"),
        (TENSOR, (2,), (1,), "takes 2 tensor ranks, not 1; choose with --tensor-ranks"),
    ],
)
def test_a_campaign_over_other_ranks_is_refused(
    path: Path, ranks: tuple[int, ...], tensor_ranks: tuple[int, ...], told: str
) -> None:
    with pytest.raises(BackendUnavailable, match=told):
        require_ranks(f"layer:{path}:Layer", ranks, tensor_ranks)


def test_a_campaign_over_declared_ranks_is_not() -> None:
    require_ranks(f"layer:{EXAMPLE}:Layer", (1, 2, 64), (1,))
    require_ranks(f"layer:{TENSOR}:Layer", (1, 2), (2,))
    require_ranks("loop", (1, 2), (1, 2))


def test_the_command_refuses_in_one_sentence(attn_fuzz: Run) -> None:
    layer = ROOT / "examples" / "my_layer.py"
    done = attn_fuzz("check-layer", f"{layer}:Layer", *OPTIONS, "--ranks", "2", "--cases", "1")
    assert "my_layer.py:Layer does not declare that it goes over ranks" in sentence(done)


# Slices of a size.

FOURS = Capabilities(slice_multiple=4, ranks=(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1,), (2, 4)])
def test_drawn_slices_are_multiples(ranks: tuple[int, ...]) -> None:
    @settings(max_examples=25, database=None, deadline=None, derandomize=True)
    @given(cases("layer", Domain.of(FOURS, "cpu", ranks=ranks)))
    def look(case: Case) -> None:
        assert all(own.length % 4 == 0 for own in owned_slices(case)), case.to_json()

    look()


@pytest.mark.parametrize("multiple", [1, 4])
def test_calls_of_batches_have_slices_of_that_size(multiple: int) -> None:
    backend = loaded(EXAMPLE)
    backend = registry.narrowed(backend, {"slice_multiple": multiple})
    domain = Domain.of(backend.kernel.capabilities, "cpu")
    batches = [draw_layer_batch(Random(seed), backend, domain, calls=8, longest=33) for seed in range(5)]
    calls = [batch.call(index) for batch in batches if batch is not None for index in range(len(batch.ends))]
    assert any(call.cuts for call in calls)
    assert all(own.length % multiple == 0 for call in calls for own in owned_slices(call))


def test_shrinking_keeps_slices_multiples() -> None:
    start = Case(lengths=(5, 30, 13), cuts=(16, 32), ranks=4)
    seen: list[Case] = []

    def fails(case: Case) -> bool:
        seen.append(case)
        return case.ranks > 1 and bool(case.cuts)

    smallest = minimise(start, fails, multiple=4)
    assert all(own.length % 4 == 0 for case in seen for own in owned_slices(case))
    assert (smallest.ranks, smallest.tokens, smallest.cuts) == (2, 16, (8,))


def test_cases_are_made_to_fit() -> None:
    assert in_multiples(Case(lengths=(5, 2), cuts=(3, 6)), 4) == Case(lengths=(5, 2), padding=1, cuts=(4,))
    across = Case(lengths=(4, 2), cuts=(4,), causal=False)
    assert in_multiples(across, 2) == across
    assert in_multiples(across, 4) == across.replace(padding=2)
    assert in_multiples(across, 3) == across.replace(cuts=())
    kernel = Case(level="kernel", lengths=(5,))
    assert in_multiples(kernel, 4) == kernel


def test_slices_of_other_sizes_are_refused(tmp_path: Path) -> None:
    backend = loaded(written(tmp_path, '"ranks": True', '"ranks": [2], "slice_multiple": 4'))
    assert backend.refusal(Case(lengths=(16,), cuts=(8,), ranks=2), "cpu") is None
    told = "slices of micro-sequences that are no multiple of 4 tokens"
    assert backend.refusal(Case(lengths=(12,), ranks=2), "cpu") == told
    assert backend.refusal(Case(lengths=(16,), cuts=(4,), ranks=2), "cpu") == told


@pytest.mark.parametrize("noncausal", [True, False])
def test_a_plain_case_is_on_as_few_ranks_as_are_taken(noncausal: bool, tmp_path: Path) -> None:
    capabilities = f'"ranks": [4, 2], "slice_multiple": 8, "causal": {not noncausal}, "noncausal": {noncausal}, "n'
    source = EXAMPLE.read_text().replace('        "noncausal": False,\n', "").replace("group=None", "*, group")
    path = tmp_path / "only.py"
    path.write_text(source.replace('"ranks": True,\n        "n', capabilities))
    backend = loaded(path)
    case = plain_case(backend, Domain.of(backend.kernel.capabilities, "cpu"), "fp32")
    assert case.ranks == 2
    assert case.causal is not noncausal
    assert backend.refusal(case, "cpu") is None
    assert noncausal or len(micro_sequences(case)) == 2


@pytest.mark.slow
def test_a_plain_case_of_tensor_parallel_ranks() -> None:
    backend = loaded(TENSOR)
    case = plain_case(backend, Domain.of(backend.kernel.capabilities, "cpu"), "fp32")
    assert (case.ranks, case.tensor_ranks) == (1, 2)
    assert said(case, backend) == []


# The whole way.


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_command_is_clean_on_the_example(attn_fuzz: Run) -> None:
    done = attn_fuzz("check-layer", f"{EXAMPLE}:Layer", *OPTIONS, "--ranks", "2", "--ranks", "4", "--cases", "8")
    assert done.status == 0, done.err
    # Eight in each mode.
    assert done.json["cases"] == 16


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_what_is_found_over_ranks_is_replayed_and_kept(attn_fuzz: Run, tmp_path: Path) -> None:
    broken = written(tmp_path, *BREAKS["gathered_backwards"])
    done = attn_fuzz("check-layer", "written.py:Layer", *OPTIONS, "--ranks", "2", "--cases", "20", "--first")
    assert done.status == 1, done.err
    (finding,) = done.json["findings"]
    assert finding["case"]["ranks"] == 2
    assert attn_fuzz("replay", finding["id"]).status == 1
    assert attn_fuzz("save", finding["id"], "flipped").status == 0
    assert attn_fuzz("replay", "flipped").status == 1
    broken.write_text(EXAMPLE.read_text())
    # Ranks have imported the broken one.
    rank_groups().close()
    assert attn_fuzz("replay", "flipped").status == 0


@pytest.mark.slow
def test_python_code_checks_a_layer_over_ranks() -> None:
    verdict = attn_fuzz_api.check_layer(
        f"{EXAMPLE}:Layer", ranks=(1, 2), cases=2, mode="case", device="cpu", dtype="fp32", workers=1
    )
    assert verdict, verdict.data
    with pytest.raises(attn_fuzz_api.CheckError, match="does not declare that it goes over tensor ranks"):
        attn_fuzz_api.check_layer(f"{EXAMPLE}:Layer", tensor_ranks=2, device="cpu")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_example_is_clean_on_gpus(dtype: str, ranks: int) -> None:
    """NCCL with a GPU for each rank where there are enough, gloo over CUDA tensors otherwise."""
    case = ACROSS.replace(dtype=dtype, ranks=ranks, head_dim=64)
    assert [str(symptom) for symptom in examine(case, loaded(EXAMPLE), "cuda").symptoms] == []
