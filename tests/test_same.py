"""One bug that is found by two modes, at two levels or in two campaigns is one finding, or two linked ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commandline import Run

from attn_fuzz.campaign.messages import Assignment, Candidate, Found, Tally
from attn_fuzz.campaign.pool import Outcome, Pool, Worker
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.same import count_bugs, is_same
from attn_fuzz.findings.store import Store
from attn_fuzz.reference.case import Case

KERNEL = Case(level="kernel", lengths=(2,), head_dim=1)
LAYER = Case(lengths=(2,), head_dim=1, hidden=1)


def finding(case: Case = KERNEL, check: str = "budget", tensor: str = "out", **changes: Any) -> Finding:
    made = Finding(
        backend="loop",
        device="cpu",
        symptom="WrongOutput",
        checks=(check,),
        messages=(f"WrongOutput [{check}] {tensor}: document 0, row 1: wrong",),
        symptoms=({"symptom": "WrongOutput", "check": check, "tensor": tensor},),
        case=case,
        original_case=case,
        cases_to_find=6,
        seconds_to_find=2.5,
    )
    return dataclasses.replace(made, **changes)


PACKED = Case(level="kernel", lengths=(3, 5) * 40, key_lengths=(4, 5) * 40)
SAME = {
    "another level": finding(LAYER),
    "other sizes": finding(KERNEL.replace(lengths=(7,), head_dim=64)),
    "another check": finding(check="census"),
    "another device": finding(device="cuda:0"),
    "a packed call": finding(PACKED, "packed"),
    "a batch": finding(PACKED, "batch"),
}
OTHER = {
    "backend": finding(backend="flash"),
    "symptom": finding(symptom="WrongKeys"),
    "tensor": finding(tensor="lse"),
    "nothing said of a tensor": finding(symptoms=()),
    "a past": finding(LAYER.replace(cuts=(1,))),
    "two documents": finding(KERNEL.replace(lengths=(1, 1))),
    "a window": finding(KERNEL.replace(window=(1, -1))),
    "no mask": finding(KERNEL.replace(causal=False)),
    "dtype": finding(KERNEL.replace(dtype="bf16")),
    "grouped heads": finding(KERNEL.replace(heads=2)),
    "memory": finding(KERNEL.replace(memory="misaligned")),
    "a packed call without a mask": finding(PACKED.replace(causal=False), "packed"),
    "other calls": finding(sequence={}),
    "another folder's kernel": finding(root="../.."),
}


@pytest.mark.parametrize("what", SAME)
def test_what_needs_the_same_is_the_same(what: str) -> None:
    assert is_same(finding(), SAME[what])
    assert is_same(SAME[what], finding())


@pytest.mark.parametrize("what", OTHER)
def test_anything_else_is_another(what: str) -> None:
    assert not is_same(finding(), OTHER[what])
    assert not is_same(OTHER[what], finding())


def test_bugs_are_counted_once() -> None:
    first = finding()
    assert count_bugs([first, finding(LAYER, same_as=first.id)]) == 1
    assert count_bugs([first, finding(LAYER)]) == 2
    assert count_bugs([finding(LAYER, same_as=first.id)]) == 1


# In campaigns.


@pytest.fixture
def campaign(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a campaign whose workers find this, one after another; gives what it prints as JSON."""

    def run(*findings: Finding, reported: Sequence[Finding] | None = None) -> dict[str, Any]:
        def made(assignments: object, workers: int, progress: object, found: Callable[..., None], *_: object) -> Any:
            def campaign() -> Outcome:
                for each in findings:
                    found(each)
                return Outcome({"loop": Tally(cases=9)}, list(findings if reported is None else reported))

            return SimpleNamespace(run=campaign)

        monkeypatch.setattr("attn_fuzz.cli.campaigns.Pool", made)
        done = attn_fuzz("run", "-b", "loop", "--cases", "9", "--device", "cpu", "--json")
        assert done.status == 1, done.err
        return done.json

    return run


def stored() -> dict[str, str]:
    """What each finding of the store is said to be the same as."""
    store = Store(Path(".attn-fuzz") / "findings")
    return {identifier: store.load(identifier).same_as for identifier in store.identifiers()}


def test_the_later_finding_is_linked_to_the_first(campaign: Callable[..., dict[str, Any]], attn_fuzz: Run) -> None:
    first, later = finding(), finding(LAYER)
    assert [each["same_as"] for each in campaign(first)["findings"]] == [""]
    assert [each["same_as"] for each in campaign(later)["findings"]] == [first.id]
    assert stored() == {first.id: "", later.id: first.id}
    assert json.loads((Path(".attn-fuzz") / "findings" / f"{later.id}.json").read_text())["same_as"] == first.id
    listed = attn_fuzz("list").out
    assert "1 findings" in listed
    assert "same as" in listed
    assert f"same as {first.id}, which was found before" in attn_fuzz("show", later.id).out
    assert "same as" not in attn_fuzz("show", first.id).out


def test_a_third_one_is_linked_to_the_first_too(campaign: Callable[..., dict[str, Any]]) -> None:
    first, second, third = finding(), finding(LAYER), finding(PACKED, "packed")
    for each in (first, second, third):
        campaign(each)
    assert stored() == {first.id: "", second.id: first.id, third.id: first.id}


def test_the_same_finding_again_is_not_linked_to_itself(campaign: Callable[..., dict[str, Any]]) -> None:
    for _ in range(2):
        assert campaign(finding())["findings"][0]["same_as"] == ""


def test_a_smaller_case_in_the_same_campaign_takes_the_place_of_a_larger(
    campaign: Callable[..., dict[str, Any]], attn_fuzz: Run
) -> None:
    large, small = finding(PACKED, "packed"), finding()
    told = campaign(large, small, reported=[small])
    assert [(each["id"], each["same_as"]) for each in told["findings"]] == [(small.id, "")]
    assert stored() == {large.id: small.id, small.id: ""}
    assert "1 findings" in attn_fuzz("list").out


def test_two_bugs_stay_two(campaign: Callable[..., dict[str, Any]], attn_fuzz: Run) -> None:
    campaign(finding(), finding(KERNEL.replace(window=(1, -1)), symptom="WrongKeys"))
    assert set(stored().values()) == {""}
    listed = attn_fuzz("list").out
    assert "2 findings" in listed
    assert "same as" not in listed


@pytest.mark.parametrize("shrinking", [True, False])
def test_the_first_finding_ends_all_that_test_its_backend(shrinking: bool) -> None:
    """``--first``: one that is shrinking what it has found as well, which would be a second finding."""
    killed: list[int] = []
    jobs = [Assignment(backend="loop", device="cpu", seed=seed, stop_at_first=True) for seed in range(3)]
    found: list[Finding] = []
    pool = Pool(jobs, 2, lambda tallies: None, found.append)
    workers = [
        Worker(job, SimpleNamespace(kill=lambda place=place: killed.append(place)), None, None, 0, place)  # type: ignore[arg-type]
        for place, job in enumerate(jobs[:2])
    ]
    pool._running[:] = workers
    if shrinking:
        pool._take(workers[1], Candidate(finding(LAYER, symptom="WrongKeys")))
    pool._take(workers[0], Found(finding()))
    assert found == [finding()]
    assert killed == [1]
    assert pool._running == workers[:1]
    assert not pool._waiting
