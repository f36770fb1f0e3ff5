"""The schema of a verdict: what commands print is as it says; and the page for agents, which shows it, is true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commandline import CASE, FOUND, Done, Run, require_exists, shown_commands, stored_finding

from attn_fuzz.campaign.limits import Limit, LimitsFound
from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.pool import Outcome
from attn_fuzz.findings.finding import Finding
from attn_fuzz.reference.case import Case

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, of the extra dev")

ROOT = Path(__file__).resolve().parent.parent
AGENTS = (ROOT / "docs" / "agents.md").read_text()
SMALL = Case.from_json(CASE)
TALLY = Tally(
    cases=7,
    documents=12,
    by_kind={"kernel fp32": 7},
    paths={"math": 7},
    known={"issue": 1},
    worst_z={"kernel fp32 out": 3.25},
    worst_case={"kernel fp32 out": CASE},
    histograms={"fp32 out": [3, 0, 1]},
)


@pytest.fixture
def schema(attn_fuzz: Run) -> dict[str, Any]:
    """As the command prints it."""
    printed: dict[str, Any] = json.loads(attn_fuzz("schema").out)
    return printed


def test_the_schema_is_one(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.fixture
def check(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``check --json`` of the example, whose campaign came to what it is given."""

    def run(limits: LimitsFound | None = None, **outcome: Any) -> Done:
        came_to = Outcome(**{"tallies": {"k.py:kernel": TALLY}, "findings": [], "seconds": 1.5} | outcome)
        monkeypatch.setattr("attn_fuzz.cli.campaigns.Pool", lambda *_: SimpleNamespace(run=lambda: came_to))
        monkeypatch.setattr("attn_fuzz.cli.campaigns.infer_limits", lambda *_: limits or LimitsFound())
        Path("k.py").write_text((ROOT / "examples" / "my_kernel.py").read_text())
        return attn_fuzz("check", "k.py:kernel", "--device", "cpu", "--cases", "7", "--json")

    return run


LIMIT = LimitsFound((Limit("head_dim 5", "refused", "too odd", SMALL),))
VERDICTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "clean": (0, "clean", {}),
    "clean, with a limit": (0, "clean", {"limits": LIMIT}),
    "found": (1, "findings", {"findings": [FOUND]}),
    "found among calls": (1, "findings", {"findings": [dataclasses.replace(FOUND, sequence={"calls": []})]}),
    "trouble": (2, "trouble", {"troubles": ("a worker was killed",), "findings": [FOUND]}),
    "nothing tested": (3, "untested", {"tallies": {"k.py:kernel": Tally(refused=9)}}),
    "interrupted": (3, "untested", {"interrupted": True}),
}


@pytest.mark.parametrize(("status", "verdict", "came_to"), VERDICTS.values(), ids=VERDICTS)
def test_what_check_prints_is_as_the_schema_says(
    status: int, verdict: str, came_to: dict[str, Any], check: Any, schema: dict[str, Any]
) -> None:
    done: Done = check(**came_to)
    assert (done.status, done.json["verdict"]) == (status, verdict)
    jsonschema.Draft202012Validator(schema).validate(done.json)
    # Nothing is printed that the schema does not tell of.
    assert set(done.json) == set(schema["properties"])
    for part, known in (("findings", "finding"), ("limits", "limit")):
        assert all(set(each) == set(schema["$defs"][known]["properties"]) for each in done.json[part])
    (tally,) = done.json["backends"].values()
    assert set(tally) == set(schema["$defs"]["tally"]["properties"])


@pytest.mark.parametrize(
    ("key", "value"), [("verdict", "fine"), ("cases", "7"), ("findings", [{"id": "x"}]), ("untested", None)]
)
def test_another_thing_is_none(key: str, value: object, check: Any, schema: dict[str, Any]) -> None:
    told = check().json
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(told | {key: value})
    del told[key]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(told)


def test_committed_findings_are_as_it_says(schema: dict[str, Any]) -> None:
    """Of real campaigns, whose other keys were fewer when they were measured."""
    of_finding = {**schema, "$ref": "#/$defs/finding", "required": []}
    validator = jsonschema.Draft202012Validator(of_finding)
    results = (json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*_legacy.json")))
    found = [finding for result in results for finding in result["findings"]]
    assert len(found) > 3
    for finding in found:
        validator.validate(Finding.from_dict(finding).to_dict())


# The page for agents.


def test_commands_for_agents_exist() -> None:
    names = [require_exists(command) for command in shown_commands(AGENTS)]
    assert names == ["check", "summary", "list", "show", "replay", "script", "save", "schema"]


def test_commands_for_agents_work(attn_fuzz: Run) -> None:
    stored_finding()
    Path("verdict.json").write_text(json.dumps({"findings": [FOUND.to_dict()]}))
    for command in shown_commands(AGENTS)[1:]:
        name, *words = command.replace("ID", FOUND.id).replace("NAME", "kept").split()
        assert attn_fuzz(name, *words).status == (1 if name == "replay" else 0), command


def test_what_the_loop_prints_is_json(schema: dict[str, Any]) -> None:
    (line,) = [line.strip() for line in AGENTS.splitlines() if line.startswith('    {"verdict"')]
    shown = json.loads(line.replace(", ...]", "]"))
    assert shown["verdict"] in schema["properties"]["verdict"]["enum"]
    Case.from_dict(shown["case"])
    assert f"save {shown['id']}" in AGENTS


def test_statuses_for_agents_are_those_of_the_schema(schema: dict[str, Any]) -> None:
    rows = [line.split("|")[1:3] for line in AGENTS.splitlines() if line.startswith(("| 0", "| 1", "| 2", "| 3"))]
    assert [verdict.split("`")[1] for _, verdict in rows] == schema["properties"]["verdict"]["enum"]
