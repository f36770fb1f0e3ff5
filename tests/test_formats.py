"""Files of other versions: older ones are read, newer ones are said to be newer and never to be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import CASE, Run, sentence, write

from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.regression_cases import RegressionCase, read_regression_case
from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.reference.case import Case, CaseError
from attn_fuzz.reference.case_format import FORMAT, NewerVersion

OF_VERSION_1: dict[str, Any] = {
    "id": "a5b6e1a7b8",
    "backend": "loop",
    "device": "cpu",
    "symptom": "WrongGradK",
    "checks": ["budget"],
    "messages": ["WrongGradK [budget] dk: wrong"],
    "case": {"level": "kernel", "lengths": [2]},
    "original_case": {"level": "kernel", "lengths": [3, 4]},
    "cases_to_find": 17,
    "seconds_to_find": 0.125,
    "environment": {"torch": "2.11.0"},
    "company": None,
}
"""A finding as version 0.1 wrote it."""
NEWER = "written by a newer version"


def test_a_finding_of_version_1_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(OF_VERSION_1))
    finding = Store(tmp_path).load("old")
    assert (finding.case, finding.symptom) == (Case(level="kernel", lengths=(2,)), "WrongGradK")
    assert read_regression_case(tmp_path / "old.json").backend == "loop"


def test_a_regression_case_of_version_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"about": "why", "case": {"lengths": [2]}, "convicts": {"cpu": ["legacy:loop"]}}))
    saved = read_regression_case(path)
    assert (saved.about, saved.expected_failures) == ("why", {"cpu": ("legacy:loop",)})


def test_what_this_version_writes_says_its_format() -> None:
    finding = Finding.from_dict(OF_VERSION_1)
    assert finding.to_dict()["format"] == FORMAT
    assert Finding.from_dict(finding.to_dict()) == finding
    assert json.loads(RegressionCase("name", finding.case).to_json())["format"] == FORMAT
    assert Case.from_dict({"format": FORMAT, **finding.case.to_dict()}) == finding.case


def test_the_format_is_no_part_of_an_id() -> None:
    finding = Finding.from_dict(OF_VERSION_1)
    assert Finding.from_dict({**OF_VERSION_1, "format": FORMAT}).id == finding.id


NEWER_FINDINGS = {
    "format": {"format": FORMAT + 1},
    "format without anything known": {"format": FORMAT + 1, "backend": None, "case": 3},
    "key": {"colour": "red"},
    "key of its case": {"case": {"level": "kernel", "lengths": [2], "colour": "red"}},
    "key of its original case": {"original_case": {"level": "kernel", "lengths": [2], "colour": "red"}},
    "format of its case": {"case": {"level": "kernel", "lengths": [2], "format": FORMAT + 1}},
}


@pytest.mark.parametrize("what", NEWER_FINDINGS)
def test_a_newer_finding_is_not_called_damaged(what: str, tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(json.dumps(OF_VERSION_1 | NEWER_FINDINGS[what]))
    with pytest.raises(StoreError, match=NEWER) as told:
        Store(tmp_path).load("new")
    assert "damaged" not in str(told.value)
    assert "upgrade attn-fuzz" in str(told.value)
    if "original_case" not in NEWER_FINDINGS[what]:
        with pytest.raises(CaseError, match=NEWER):
            read_regression_case(tmp_path / "new.json")


@pytest.mark.parametrize("change", [{"format": FORMAT + 1}, {"colour": "red"}, {"case": {"colour": "red"}}])
def test_so_is_no_newer_regression_case(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    path.write_text(json.dumps({"about": "why", "case": {"lengths": [2]}} | change))
    with pytest.raises(CaseError, match=rf"new.json: .*{NEWER}"):
        read_regression_case(path)


def test_a_newer_case_says_its_format() -> None:
    with pytest.raises(NewerVersion, match=rf"{NEWER} \(format {FORMAT + 7}\); upgrade attn-fuzz"):
        Case.from_dict({"lengths": [1], "format": FORMAT + 7, "colour": "red"})


@pytest.mark.parametrize("version", ["2", None, 1.5, True])
def test_a_format_is_a_whole_number(version: object) -> None:
    with pytest.raises(CaseError, match="format must be a whole number"):
        Case.from_dict({"lengths": [1], "format": version})


def test_the_command_says_so(attn_fuzz: Run) -> None:
    write("case.json", json.dumps({"format": FORMAT + 1, **json.loads(CASE)}))
    assert sentence(attn_fuzz("replay", "case.json")).endswith(f"(format {FORMAT + 1}); upgrade attn-fuzz")
