"""Verdicts as Markdown, and the GitHub Action that publishes them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commandline import Run, require_exists, sentence, shown_commands

from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store
from attn_fuzz.findings.summary import markdown
from attn_fuzz.reference.case import Case

ROOT = Path(__file__).resolve().parent.parent

FINDING = Finding(
    backend="my_kernel.py:kernel",
    device="cpu",
    symptom="WrongOutput",
    checks=("budget",),
    messages=("WrongOutput [budget] out: document 0, row 1: got 1, expected 2, z = 40",),
    case=Case(level="kernel", lengths=(2,), head_dim=1),
    original_case=Case(level="kernel", lengths=(30, 4)),
    cases_to_find=6,
    seconds_to_find=2.46,
    environment={"device": "CPU x86_64", "date": "2026-11-28", "python": "3.12.1", "torch": "2.13.0"},
)
LARGER = dataclasses.replace(FINDING, symptom="WrongGradK", case=Case(level="kernel", lengths=(9,)), cases_to_find=1)


def told(*findings: Finding, **more: Any) -> dict[str, Any]:
    """What a check prints with ``--json``, as far as a summary reads it."""
    return {
        "cases": 1200,
        "seconds": 59.7,
        "environment": dict(FINDING.environment),
        "backends": {"my_kernel.py:kernel": {}},
        "findings": [finding.to_dict() for finding in findings],
        **more,
    }


CLEAN = """\
**attn-fuzz: clean; 1,200 cases of `my_kernel.py:kernel` in 60 s.**

CPU x86_64, torch 2.13.0, Python 3.12.1; 2026-11-28
"""

FOUND = f"""\
**attn-fuzz: 2 findings in 1,200 cases of `my_kernel.py:kernel` in 60 s.**

| finding | symptom | backend | checks | level | dtype | tokens | found after |
|---|---|---|---|---|---|---:|---|
| {LARGER.id} | WrongGradK | my_kernel.py:kernel | budget | kernel | fp32 | 9 | 1 case, 2.5 s |
| {FINDING.id} | WrongOutput | my_kernel.py:kernel | budget | kernel | fp32 | 2 | 6 cases, 2.5 s |

The smallest case, of 2 tokens, shows WrongOutput:

```
WrongOutput [budget] out: document 0, row 1: got 1, expected 2, z = 40
{{"level": "kernel", "lengths": [2], "head_dim": 1}}
```

Replay it:

```
python -m attn_fuzz replay '{{"level": "kernel", "lengths": [2], "head_dim": 1}}' \
--backend my_kernel.py:kernel --device cpu
```

- declared, not taken, and left out: memory misaligned (refused)

CPU x86_64, torch 2.13.0, Python 3.12.1; 2026-11-28
"""


def test_a_clean_verdict() -> None:
    assert markdown(told()) == CLEAN


def test_a_verdict_with_findings() -> None:
    limits = [{"axis": "memory misaligned", "how": "refused"}]
    assert markdown(told(LARGER, FINDING, limits=limits)) == FOUND


@pytest.mark.parametrize(
    ("more", "headline", "note"),
    [
        (
            {"untested": ["it took none of 9 cases"], "cases": 0},
            "no verdict, too little was tested; 0 cases",
            "it took",
        ),
        ({"untested": ["interrupted"], "interrupted": True}, "no verdict, too little was tested; 1,200", "interrupted"),
        ({"troubles": ["the disk is full"]}, "no verdict, something went wrong; 1,200 cases", "the disk is full"),
    ],
)
def test_no_verdict_is_not_called_clean(more: dict[str, Any], headline: str, note: str) -> None:
    lines = markdown(told(**more)).splitlines()
    assert lines[0].startswith(f"**attn-fuzz: {headline}")
    assert any(line.startswith(f"- {note}") for line in lines)


def test_what_fails_among_other_calls_is_replayed_from_its_store() -> None:
    among = dataclasses.replace(FINDING, sequence={"calls": []})
    assert f"replay {among.id} --store FOLDER" in markdown(told(among))


def test_one_bug_that_was_found_twice_is_counted_once() -> None:
    again = dataclasses.replace(LARGER, same_as=FINDING.id)
    text = markdown(told(FINDING, again))
    assert text.startswith("**attn-fuzz: 1 finding in 1,200 cases")
    assert f"| {again.id} | WrongGradK, same as {FINDING.id} |" in text


def test_tables_stay_tables_and_comments_short() -> None:
    wide = dataclasses.replace(FINDING, backend="a|b.py:kernel", messages=("x" * 10_000,))
    text = markdown(told(*[wide] * 300))
    assert "a\\|b.py:kernel" in text
    assert len(text) < 20_000
    assert "280 more are in the JSON." in text


def test_files_and_stores_are_summarised(attn_fuzz: Run, tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text(json.dumps(told()))
    assert attn_fuzz("summary", "verdict.json").out == CLEAN
    store = Store(tmp_path / "store")
    store.prepare()
    store.save(FINDING)
    done = attn_fuzz("summary", "store")
    assert done.status == 0
    assert done.out.startswith("**attn-fuzz: 1 finding in the store.**")
    assert FINDING.id in done.out
    (tmp_path / "other.json").write_text('{"backends": []}')
    assert "other.json is no verdict" in sentence(attn_fuzz("summary", "other.json"))
    assert "none.json cannot be read" in sentence(attn_fuzz("summary", "none.json"))


# The action.


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML, of the extra dev")
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    return loaded


def step(action: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [step for step in action["runs"]["steps"] if step.get("name") == name]
    return found


def test_its_inputs_and_outputs_are_used(action: dict[str, Any]) -> None:
    assert action["runs"]["using"] == "composite"
    assert all(step.get("shell") == "bash" for step in action["runs"]["steps"] if "run" in step)
    said = (ROOT / "action.yml").read_text()
    assert set(re.findall(r"inputs\.([a-z]+)", said)) == set(action["inputs"])
    written = step(action, "Check")["run"]
    assert all(f"{name}=$" in written or f"{name}<<" in written for name in action["outputs"])


def test_its_commands_exist(action: dict[str, Any]) -> None:
    """Each is parsed by the command line itself, which refuses options that it does not have."""
    script = step(action, "Check")["run"].replace("\\\n", " ")
    # What is given only where it is not empty, given; and what a user may add.
    script = script.replace('${LEVEL:+--level "$LEVEL"}', "--level layer").replace('"${more[@]}"', "--seed 7")
    values = {"DEVICE": "cpu", "LENGTH": "60"}
    commands = [
        [values.get(word.lstrip("$"), word) for word in shlex.split(command)] for command in shown_commands(script)
    ]
    assert [require_exists(command) for command in commands] == ["check", "summary"]


VERDICT = json.dumps({"findings": []})
FAKE = """#!/usr/bin/env bash
# Stands for the installed package: a check that ends as it is told to, and a summary.
echo "$@" >> "$ASKED"
case "$3" in
    check) echo "attn-fuzz: what it says" >&2; printf '%s' "$ANSWER"; exit "$ENDS" ;;
    summary) echo "**the summary**" ;;
esac
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "answer", "status", "said"),
    [
        (0, VERDICT, 0, "**the summary**"),
        (1, VERDICT, 1, "**the summary**"),
        (2, "", 2, "**attn-fuzz: k.py:kernel was not checked.**\n\n- what it says"),
        (3, VERDICT, 3, "**the summary**"),
        (0, "", 2, "**attn-fuzz: k.py:kernel was not checked.**\n\n- what it says"),
    ],
)
def test_it_fails_where_the_check_does(
    ends: int, answer: str, status: int, said: str, action: dict[str, Any], tmp_path: Path
) -> None:
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    written = {name: str(tmp_path / name.lower()) for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "ASKED")}
    given = {"KERNEL": "k.py:kernel", "DEVICE": "cpu", "LENGTH": "5", "LEVEL": "", "ARGS": "--dtype bf16"}
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**written, **given, "ENDS": str(ends), "ANSWER": answer, "PATH": path}
    run = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step(action, "Check")["run"]]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(written["GITHUB_STEP_SUMMARY"]).read_text().rstrip() == said
    outputs = Path(written["GITHUB_OUTPUT"]).read_text()
    assert f"status={status}\n" in outputs
    assert said in outputs
    asked = Path(written["ASKED"]).read_text().splitlines()[0]
    results = tmp_path / "attn-fuzz-results"
    assert (
        asked
        == f"-m attn_fuzz check k.py:kernel --device cpu --seconds 5 --store {results}/findings --json --dtype bf16"
    )
    assert "exit" in step(action, "Verdict")["run"]
