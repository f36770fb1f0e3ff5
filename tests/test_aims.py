"""``--aim``: every draw of a campaign has the values that are named, in each mode, and who cannot have them is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from random import Random

import pytest
from commandline import Run, sentence, write
from doubles import double

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.loop import Loop
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.layer import draw_layer_case
from attn_fuzz.campaign.messages import Assignment, CampaignError, Covered, Message
from attn_fuzz.campaign.plan import CampaignOptions, aims_of, plan
from attn_fuzz.campaign.serve import WORK
from attn_fuzz.cli import campaigns
from attn_fuzz.coverage.aims import AIMS, ALL_AIMABLE, Aims, aim_at
from attn_fuzz.coverage.allowed import Space
from attn_fuzz.coverage.axes import AXES, Value, options_of
from attn_fuzz.generation import calls, layer_calls, length_sweeps
from attn_fuzz.generation.configurations import in_order
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.drawing import few_cases
from attn_fuzz.generation.length_sweeps import Sweep
from attn_fuzz.reference.case import FAR_MEMORIES, Case

MODES = ("case", "batch", "packed")
EVERY = [(axis, value) for axis, values in AIMS.items() for value in values]
LONG = ("queries", "256-")
OF_CALLS: tuple[Value, ...] = (
    *(("gaps", "both"), ("max_seqlen", "loose"), ("LSE gradient", "on"), ("memory", "far_rows")),
    *(("value channels", "more"), ("group", "9-")),
)


def options(*aim: Value, modes: tuple[str, ...] = MODES, **changes: object) -> CampaignOptions:
    given = {"device": "cpu", "workers": 1, "cases": 20, **changes}
    return CampaignOptions(modes=modes, aim=aim, **given)  # type: ignore[arg-type]


def has(case: Case, *aim: Value) -> bool:
    """Whether a case has one of the values of each axis."""
    own = {*options_of(case).items(), *([LONG] if max(case.packed_lengths) >= 256 else [])}
    return all(own & {value for value in aim if value[0] == axis} for axis, _ in aim)


def drawn(backend: Backend, domain: Domain, mode: str, level: str, seed: int) -> Iterator[Case]:
    """What a turn of a mode draws at a level."""
    random, size = Random(seed), seed % 3
    case: Case | None
    if mode == "case":
        found: list[Case] = []
        few_cases(level, domain, seed, lambda each: found.append(each), 2)
        yield from found
    elif mode == "batch":
        if level == "layer":
            batch = layer_calls.draw_layer_batch(random, backend, domain, 6, layer_calls.LONGEST["cpu"][size])
        else:
            batch = calls.draw_batch(random, Sweep(calls.LONGEST["cpu"][size], seed), backend, domain, 8)
        yield from batch.calls if batch is not None else ()
    else:
        if level == "layer":
            case = draw_layer_case(random, backend, domain, 20, 16)
        else:
            sweep = Sweep(length_sweeps.LONGEST["cpu"][size], seed)
            case = length_sweeps.draw_case(random, sweep, backend, domain, 32)
        yield from () if case is None else (case,)


def drawn_of(aims: Aims, backend: Backend, turns: int = 3) -> dict[tuple[str, str], list[Case]]:
    """What all modes draw at the levels that have what is aimed at, by (mode, level)."""
    domain = Domain.of(aims.space.capabilities, "cpu", aim=aims.raw)
    return {
        (mode, level): [case for seed in range(turns) for case in drawn(backend, domain, mode, level, seed)]
        for mode in MODES
        for level in aims.levels_in(mode)
    }


# What draws have.


@pytest.mark.parametrize("value", EVERY, ids="=".join)
def test_every_draw_has_what_is_aimed_at(value: Value) -> None:
    found = drawn_of(aims_of("loop", options(value)), registry.load("loop"))
    assert ("case", "kernel") in found
    assert ("batch", "kernel") in found or value == ("memory", "broadcast")
    for place, cases in found.items():
        assert cases, place
        assert all(has(case, value) for case in cases), place


@pytest.mark.parametrize(
    "value", [("head_dim", "256"), ("window", "both"), LONG, ("softcap", "on"), ("group", "9-")], ids="=".join
)
def test_of_a_kernel_with_a_mask_too(value: Value) -> None:
    for place, cases in drawn_of(aims_of("backup", options(value)), registry.load("backup")).items():
        assert cases, place
        assert all(has(case, value) for case in cases), place


@pytest.mark.parametrize(
    "aim",
    [
        OF_CALLS,
        (LONG, ("group", "9-"), ("head_dim", "256"), ("window", "left")),
        (LONG, ("mask", "causal"), ("dtype", "bf16"), ("gaps", "keys"), ("memory", "far_heads"), ("memory", "strided")),
        (("window", "right"), ("window", "left"), ("head_dim", "320"), ("value channels", "same")),
        (("value channels", "same"), ("value channels", "fewer"), ("head_dim", "64"), ("LSE gradient", "off")),
    ],
)
def test_several_at_once_and_any_of_one_axis(aim: tuple[Value, ...]) -> None:
    for place, cases in drawn_of(aims_of("loop", options(*aim)), registry.load("loop"), 6).items():
        assert cases, place
        assert all(has(case, *aim) for case in cases), place


def test_each_of_several_values_is_drawn() -> None:
    aim = (("gaps", "queries"), ("gaps", "none"), ("dtype", "fp16"), ("dtype", "bf16"))
    found = drawn_of(aims_of("loop", options(*aim, levels=("kernel",))), registry.load("loop"), 12)
    for cases in found.values():
        own = [options_of(case) for case in cases]
        assert {each["gaps"] for each in own} == {"queries", "none"}
        assert {each["dtype"] for each in own} == {"fp16", "bf16"}


def test_far_memories_come_in_batches_only_where_they_are_aimed_at() -> None:
    backend = registry.load("loop")
    domain = Domain.of(backend.kernel.capabilities, "cpu", aim={"memory": ("fused",)})
    plain = Domain.of(backend.kernel.capabilities, "cpu")
    cases = [case for seed in range(150) for case in drawn(backend, plain, "batch", "kernel", seed)]
    assert not {case.memory for case in cases} & {*FAR_MEMORIES}
    single = [case for seed in range(60) for case in drawn(backend, domain, "case", "kernel", seed)]
    assert {case.memory for case in single} == {"fused"}


def test_where_no_gap_is_small_enough_it_is_the_smallest() -> None:
    backend = registry.load("loop")
    domain = Domain.of(backend.kernel.capabilities, "cpu", aim={"gaps": ((True, True),)})
    cases = [
        case for seed in range(60) for case in drawn(backend, domain, "case", "kernel", seed) if len(case.lengths) > 60
    ]
    assert {case.gaps for case in cases if len(case.lengths) > 512} <= {(1, 1)}
    assert all(min(case.gaps) > 0 for case in cases)


def test_a_backend_without_rows_that_see_no_key_has_long_ones_of_full_attention() -> None:
    capabilities = Capabilities(queries_without_keys=False)
    space = Space(capabilities, "cpu", ("kernel",), ("kernel",))
    assert aim_at(space, LONG, axes=ALL_AIMABLE) == {"long_rows": (True,), "causal": (False,)}
    assert Aims(space, (LONG, ("mask", "causal")), ("kernel",)).why_not(MODES) is not None
    backend = double(Loop(), queries_without_keys=False)
    for cases in drawn_of(Aims(space, (LONG,), ("kernel",)), backend).values():
        assert cases
        assert all(has(case, LONG, ("mask", "full")) for case in cases)


def test_configurations_that_are_compiled_have_it_too() -> None:
    aim = {"dtype": ("bf16",), "window": ("left",), "heads": ((9, 1), (16, 1)), "softcap": (True,)}
    domain = Domain.of(Capabilities(), "cpu", aim=aim)
    order = list(islice(in_order(domain, 3), 20))
    assert len({each.head_dim for each in order}) > 5
    assert all((each.dtype, each.window, bool(each.softcap)) == ("bf16", "left", True) for each in order)
    assert {(each.heads, each.kv_heads) for each in order} <= {(9, 1), (16, 1)}


# What campaigns are told.


def test_jobs_have_the_levels_that_can_have_it() -> None:
    def levels(*aim: Value) -> dict[str, tuple[str, ...]]:
        return {job.mode: job.levels for job in plan(("loop",), options(*aim))}

    both = ("layer", "kernel")
    assert levels(("dtype", "bf16")) == dict.fromkeys(MODES, both)
    assert levels(("gaps", "both")) == dict.fromkeys(MODES, ("kernel",))
    assert levels(("memory", "far_base")) == dict.fromkeys(MODES, ("kernel",))
    assert levels(("memory", "broadcast")) == {"case": ("kernel",)}
    # Of layers some cases have either.
    assert levels(("gaps", "none"), ("gaps", "both")) == dict.fromkeys(MODES, both)
    assert all(not job.aim and not job.compile_aimed for job in plan(("loop",), options()))


def test_each_backend_has_its_own_and_who_has_none_has_no_job() -> None:
    jobs = plan(("loop", "backup"), options(("gaps", "both")))
    assert {job.backend for job in jobs} == {"loop"}
    with pytest.raises(CampaignError):
        plan(("backup",), options(("gaps", "both")))
    taken = plan(("loop",), options(("dtype", "bf16"), ("dtype", "fp16"), dtypes=("bf16",)))
    assert {job.aim["dtype"] for job in taken} == {("bf16",)}


@pytest.mark.parametrize("mode", MODES)
def test_a_campaign_runs_nothing_else(mode: str) -> None:
    aim = (("gaps", "both"), ("max_seqlen", "loose"), ("memory", "strided"), ("head_dim", "16"))
    (job,) = plan(("loop",), options(*aim, modes=(mode,), cases={"case": 6, "batch": 20, "packed": 1}[mode]))
    messages: list[Message] = []
    WORK[job.mode](dataclasses.replace(job, counts=True), messages.append)
    reached = {value for each in messages if isinstance(each, Covered) for pair in each.reached.pairs for value in pair}
    assert {value for value in reached if value[0] in dict(aim)} == set(aim)
    assert {level for axis, level in reached if axis == "level"} == {"kernel"}


# The command line.


def test_a_run_of_twenty_cases(attn_fuzz: Run, in_this_process: None) -> None:
    aim = ("--aim", "LSE-gradient=on", "--aim", "value-channels=more", "--aim", "group=2")
    done = attn_fuzz("run", "-b", "loop", "--device", "cpu", "--cases", "20", "--workers", "1", "--json", *aim)
    assert done.status == 0, done.err
    told = done.json["backends"]["loop"]
    assert told["cases"] >= 40
    worst = [Case.from_dict(case) for case in told["worst_case"].values()]
    assert worst
    assert all(has(case, ("LSE gradient", "on"), ("value channels", "more"), ("group", "2")) for case in worst)


REFUSED = {
    "gaps": "--aim takes AXIS=VALUE",
    "colour=red": "unknown axis 'colour'; use dtype, head_dim",
    "level=kernel": "no draw can be aimed at a level; use dtype, head_dim",
    "gaps=some": "no draw can be aimed at gaps=some; of gaps use none, queries, keys, both",
    "queries=16-63": "of queries use 256-",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_be_aimed_at_is_one_sentence(given: str, attn_fuzz: Run) -> None:
    assert REFUSED[given] in sentence(attn_fuzz("run", "-b", "loop", "--device", "cpu", "--aim", given))
    assert REFUSED[given] in sentence(attn_fuzz("check", "kernel.py:kernel", "--device", "cpu", "--aim", given))


def test_every_axis_that_is_named_is_one() -> None:
    named = {axis.name: axis.values for axis in AXES}
    assert {axis: set(values) <= set(named[axis]) for axis, values in AIMS.items()} == dict.fromkeys(ALL_AIMABLE, True)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("-b", "backup", "--aim", "gaps=both"), "backend backup has no case with gaps=both: it is not declared"),
        (("-b", "loop", "--level", "layer", "--aim", "LSE-gradient=on"), "not in mode"),
        (("-b", "loop", "--mode", "batch", "--aim", "memory=broadcast"), "not in mode batch"),
        (
            ("-b", "loop", "--aim", "mask=causal", "--aim", "window=right"),
            "window=right: causal attention",
        ),
        (("-b", "loop", "--dtype", "fp32", "--aim", "dtype=bf16"), "dtype=bf16"),
        (("-b", "loop", "--tensor-ranks", "2", "--aim", "group=2"), "--tensor-ranks"),
    ],
)
def test_a_backend_by_name_that_has_none_is_one_sentence(arguments: tuple[str, ...], why: str, attn_fuzz: Run) -> None:
    assert why in sentence(attn_fuzz("run", "--device", "cpu", "--cases", "1", *arguments))


def test_others_are_left_out_and_that_is_said(
    attn_fuzz: Run, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attn_fuzz.cli.fuzz.available_backends", lambda *_: ("backup", "loop"))
    command = ("run", "--device", "cpu", "--mode", "case", "--cases", "4", "--workers", "1", "--json")
    done = attn_fuzz(*command, "--aim", "gaps=both", "--level", "kernel")
    assert done.status == 0, done.err
    assert set(done.json["backends"]) == {"loop"}
    assert "backend backup has no case with gaps=both: it is not declared, so it is left out" in done.err


def test_what_a_user_kernel_does_not_take_is_found_out_first(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = campaigns.LimitsFound(without={"dtypes": ("fp32",)})
    monkeypatch.setattr(campaigns, "_found_out", lambda *_: found)
    planned: list[Assignment] = []
    monkeypatch.setattr(campaigns, "plan", lambda *_: planned)
    write("kernel.py", "def kernel(q, k, v, cu_q, cu_k, max_q, max_k):\n    return q\n")
    done = attn_fuzz("check", "kernel.py:kernel", "--device", "cpu", "--aim", "dtype=bf16")
    assert done.status == 2
    assert "dtype=bf16: it is not declared" in done.err
    assert not planned
