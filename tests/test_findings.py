"""Findings: there and back through JSON, ids that stay, and what is no finding."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from attn_fuzz.findings.finding import Finding, FindingError, summarise
from attn_fuzz.oracle.examine import Verdict
from attn_fuzz.oracle.symptoms import Element, Place, PoisonLeaked, Symptom, WrongGradK, WrongGradV
from attn_fuzz.reference.case import Case, CaseError

FINDING = Finding(
    backend="loop",
    device="cuda:1",
    symptom="WrongGradK",
    checks=("budget", "census"),
    messages=("first", "second"),
    case=Case(level="kernel", lengths=(2,), window=(1, -1)),
    original_case=Case(level="kernel", lengths=(3, 4), seed=2),
    cases_to_find=17,
    seconds_to_find=0.125,
    environment={"torch": "2.13"},
)


def test_a_finding_survives_json() -> None:
    assert Finding.from_dict(json.loads(json.dumps(FINDING.to_dict()))) == FINDING


def test_a_finding_without_an_environment_can_be_read() -> None:
    data = FINDING.to_dict()
    del data["environment"]
    assert Finding.from_dict(data) == dataclasses.replace(FINDING, environment={})


def test_ids_are_those_of_the_first_version() -> None:
    """Stores are merged by copying files, and people quote ids in reports."""
    assert FINDING.id == "59f1270759"
    assert FINDING.to_dict()["id"] == FINDING.id


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"backend": "flash"}, False),
        ({"symptom": "WrongGradV"}, False),
        ({"case": Case(level="kernel", lengths=(3,))}, False),
        ({"device": "cpu"}, True),
        ({"original_case": Case(lengths=(9,)), "cases_to_find": 1, "seconds_to_find": 3.0}, True),
        ({"messages": (), "checks": (), "environment": {}}, True),
    ],
)
def test_an_id_says_what_was_found_and_not_how(changes: dict[str, Any], same: bool) -> None:
    assert (dataclasses.replace(FINDING, **changes).id == FINDING.id) == same


@pytest.mark.parametrize("name", ["backend", "device", "symptom", "checks", "messages", "cases_to_find"])
def test_a_finding_with_something_missing_is_none(name: str) -> None:
    data = FINDING.to_dict()
    del data[name]
    with pytest.raises(FindingError, match=f"this is no finding: it has no '{name}'"):
        Finding.from_dict(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"checks": "budget"},
        {"checks": [1]},
        {"messages": None},
        {"messages": {"a": 1}},
        {"cases_to_find": "many"},
        {"cases_to_find": float("inf")},
        {"seconds_to_find": []},
        {"environment": 3},
        {"environment": ["torch"]},
    ],
    ids=str,
)
def test_a_finding_with_something_else_in_a_field_is_none(changes: dict[str, Any]) -> None:
    with pytest.raises(FindingError, match="this is no finding"):
        Finding.from_dict({**FINDING.to_dict(), **changes})


@pytest.mark.parametrize("data", [None, 3, "finding", [], [FINDING.to_dict()]])
def test_what_is_no_object_is_no_finding(data: object) -> None:
    with pytest.raises(FindingError, match="this is no finding"):
        Finding.from_dict(data)


@pytest.mark.parametrize("name", ["case", "original_case"])
def test_an_impossible_case_is_told_as_such(name: str) -> None:
    with pytest.raises(CaseError, match="lengths is empty"):
        Finding.from_dict({**FINDING.to_dict(), name: {"lengths": []}})


def test_a_verdict_is_summarised_by_its_first_symptoms() -> None:
    """Each check once, in order of rank; and not too many sentences."""
    symptoms: list[Symptom] = [PoisonLeaked("unwritten", "dk", "NaN")]
    symptoms += [WrongGradK("budget", "dk", f"row {row}") for row in range(20)]
    symptoms += [WrongGradV("budget", "dv", "row 0")]
    said = summarise(Verdict(tuple(symptoms), {}, frozenset()))
    assert said["checks"] == ("unwritten", "budget")
    assert said["messages"][:2] == ("PoisonLeaked [unwritten] dk: NaN", "WrongGradK [budget] dk: row 0")
    assert len(said["messages"]) == len(said["symptoms"]) == 12


def test_a_symptom_is_data_that_every_json_reader_takes() -> None:
    element = Element(Place(1, 7, 0), math.nan, -0.5)
    data = WrongGradK("budget", "dk", "a sentence", z=math.inf, element=element).to_dict()
    where = {"document": 1, "row": 7, "head": 0}
    values = {"got": "nan", "expected": -0.5, "z": "inf"}
    assert data == {"symptom": "WrongGradK", "check": "budget", "tensor": "dk", **where, **values}
    json.dumps(data, allow_nan=False)
    kept = dataclasses.replace(FINDING, symptoms=(data,))
    assert Finding.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept
