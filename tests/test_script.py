"""Scripts made of findings: they fail with the fault, pass without it, and need nothing of this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.findings.script import standalone
from attn_fuzz.findings.scripts.kernel import candidates
from attn_fuzz.findings.scripts.markdown import tracker_report
from attn_fuzz.findings.scripts.run import Ran, run_script
from attn_fuzz.findings.scripts.text import ScriptError
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from tests.script_faults import FAULTS, QUICK

ROOT = Path(__file__).resolve().parent.parent
FAULTY = {
    "M51-swapped": '{"level": "kernel", "lengths": [2], "head_dim": 2}',
    "M16": '{"level": "kernel", "lengths": [3], "key_lengths": [1]}',
    "X06": '{"level": "kernel", "lengths": [1], "head_dim": 8}',
    "M32-value": '{"level": "kernel", "lengths": [2], "head_dim": 2, "memory": "mixed"}',
    "M46-backward": '{"level": "kernel", "lengths": [3], "softcap": 3.0}',
    "S01": '{"level": "kernel", "lengths": [2], "key_lengths": [1], "head_dim": 2, "lse_gradient": true}',
    "S04": '{"level": "kernel", "lengths": [2], "heads": 2, "head_dim": 1, "memory": "sliced", "lse_gradient": true}',
}

ONE_AFTER_ANOTHER = """
import contextlib, io, json, runpy, sys, traceback

if sys.argv[1] == "without this project":
    sys.modules["attn_fuzz"] = None
for path in sys.argv[2:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            status = traceback.format_exc()
    print(json.dumps([path, status, said.getvalue()]))
"""
"""Runs scripts in one process: each that had one of its own would import torch anew."""


def python(folder: Path, *arguments: str, checkout: bool) -> subprocess.CompletedProcess[str]:
    """Without the checkout, in a folder from which this project cannot be imported."""
    environment = {"PATH": "/usr/bin:/bin", **({"PYTHONPATH": str(ROOT)} if checkout else {})}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, env=environment
    )


def run(folder: Path, texts: Mapping[str, str], *, checkout: bool = False) -> dict[str, tuple[object, str]]:
    """Exit status and standard output of every script, by name."""
    paths = {name: folder / f"script_{index}.py" for index, name in enumerate(texts)}
    for name, path in paths.items():
        path.write_text(texts[name])
    where = "in a checkout" if checkout else "without this project"
    # Ranks are forked, which a process must not be whose autograd has threads for a GPU: of other scripts before.
    apart = [name for name in texts if name.startswith("ranks") and torch.cuda.is_available()]
    lines = []
    for names in ([name for name in texts if name not in apart], *([name] for name in apart)):
        scripts = [str(paths[name]) for name in names]
        done = python(folder, "-c", ONE_AFTER_ANOTHER, where, *scripts, checkout=checkout)
        assert done.returncode == 0, done.stderr
        # What a process prints that a script has started stands between.
        lines += [line for line in done.stdout.splitlines() if line.startswith('["')]
    told = {path: (status, said) for path, status, said in map(json.loads, lines)}
    return {name: told[str(path)] for name, path in paths.items()}


def held_to(faults: Sequence[str], folder: Path) -> None:
    """Scripts of some faults fail with the fault and pass without it, where this project cannot be imported."""
    texts = {}
    for index, name in enumerate(faults):
        fault = FAULTS[name]
        path = fault.written(folder / str(index), broken=True)
        texts[name] = fault.script(path)
        # In another folder, and not later in the same: all scripts run in one process.
        mended = fault.written(folder / f"mended {index}", broken=False)
        texts[f"{name}, mended"] = texts[name].replace(str(path), str(mended))
    for text in texts.values():
        assert "attn_fuzz" not in text
    for name, (status, said) in run(folder, texts).items():
        there = "mended" not in name
        assert status == (1 if there else 0), (name, status, said)
        assert said.splitlines()[-1].split(":")[0] == f"the fault is {'there' if there else 'gone'}", name


def test_ten_faults_have_layers_ranks_and_other_calls_among_them() -> None:
    kinds = Counter(name.partition(":")[0] for name in QUICK)
    assert kinds == {"kernel": 3, "calls": 1, "layer": 4, "ranks": 2}
    assert any("tensor_ranks" in FAULTS[name].case for name in QUICK)


@pytest.mark.slow
def test_scripts_of_users_code_fail_broken_and_pass_mended(tmp_path: Path) -> None:
    held_to(tuple(FAULTS) if os.environ.get("ATTN_FUZZ_ALL_SCRIPTS") else QUICK, tmp_path)


def code_of(text: str) -> list[str]:
    """Lines of a script to be read: neither blank, nor in its head, nor values of tensors and settings."""
    head, body = text.split('"""', 2)[1:]
    assert head
    lines, inside = [], False
    for line in body.splitlines():
        inside = inside or line.startswith(("SETTINGS", "WEIGHTS", "CALL"))
        if line.strip() and not inside:
            lines.append(line)
        inside = inside and not line.startswith((")", "]"))
    return lines


@pytest.mark.parametrize("name", FAULTS)
def test_scripts_are_short(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    lines = code_of(fault.script(fault.written(tmp_path, broken=True)))
    assert 40 <= len(lines) <= (100 if name.startswith("ranks") else 85)
    assert max(map(len, lines)) <= 125


def test_a_call_that_fails_after_others_of_its_shape_is_told_with_one(tmp_path: Path) -> None:
    """As a finding of the case mode has it, whose interfering call is none of its own."""
    fault = FAULTS["layer: documents of the sequence before"]
    path = fault.written(tmp_path, broken=True)
    case = Case.from_json('{"lengths": [1, 2], "cuts": [2], "head_dim": 4, "hidden": 4}')
    text = standalone(case, registry.load(f"layer:{path}:Layer"), "cpu", "broken")
    assert text.count("case=SimpleNamespace") == 2


@pytest.mark.slow
def test_a_script_runs_by_itself(tmp_path: Path) -> None:
    fault = FAULTS["kernel: top-left"]
    text = fault.script(fault.written(tmp_path / "kernels", broken=True))
    ran = run_script(text, 100)
    assert (ran.status, ran.answer) == (1, "wrong")
    assert "elements wrong; at [" in ran.output
    report = tracker_report(
        "a title", ["a sentence"], text, ran, {"torch": "2.13", "commit": "c0ffee", "date": "today"}
    )
    assert report.startswith("# a title\n\n- a sentence\n")
    assert "| torch | 2.13 |" in report
    assert "c0ffee" not in report
    assert text in report
    assert f"```\n{ran.output}\n```" in report
    assert "today (exit status 1)" in report


@pytest.mark.parametrize(
    ("status", "output", "answer"),
    [
        (1, "out: 1 of 4 elements wrong\nthe fault is there", "wrong"),
        (1, "exit status of the call: 7\nthe fault is there\nSystemExit", "wrong"),
        (0, "the fault is gone", "right"),
        (1, "ModuleNotFoundError: No module named 'flash_attn'", "not run"),
        (None, "the fault is there", "not run"),
        (-9, "", "not run"),
    ],
)
def test_a_script_that_could_not_tell_is_neither_right_nor_wrong(status: int | None, output: str, answer: str) -> None:
    assert Ran(status, output).answer == answer


@pytest.mark.slow
def test_planted_faults_fail_by_themselves(tmp_path: Path) -> None:
    texts = {}
    for fault, case in FAULTY.items():
        text = standalone(Case.from_json(case), registry.load(f"fault:{fault}"), "cpu", fault)
        # Where the LSE has a gradient, what is right has an LSE.
        right = "loop" if "lse_gradient" in case else "backup"
        texts |= {fault: text, f"{fault} mended": text.replace(f"fault:{fault}", right)}
    for name, (status, said) in run(tmp_path, texts, checkout=True).items():
        assert status == (0 if "mended" in name else 1), (name, status, said)
        if "mended" not in name:
            assert "elements wrong; at" in said or "rows behind the last document are not 0" in said, name


@pytest.mark.parametrize(
    ("case", "backend", "sentence"),
    [
        (Case(level="layer", lengths=(2,)), "loop", "the layer of this project"),
        (Case(level="layer", lengths=(2,), ranks=2), "fault:R01", "the layer of this project"),
        (Case(level="kernel", lengths=(2,)), "loop", "no single call"),
        (Case(level="kernel", lengths=(200,), head_dim=64, heads=4, kv_heads=4), "fault:M51-swapped", "shrink it"),
    ],
)
def test_what_cannot_be_told_is_said(case: Case, backend: str, sentence: str) -> None:
    with pytest.raises(ScriptError, match=sentence):
        standalone(case, registry.load(backend), "cpu", "title")


def test_what_a_script_tries_is_what_the_checks_ask_of_such_a_kernel() -> None:
    """Scores that are kept in float16 must fit."""
    case = Case(level="kernel", lengths=(3,), seed=3)
    largest = {
        scores: max(inputs.q.abs().max().item() for inputs in candidates(case, Profile(scores_dtype=scores)))
        for scores in ("", "fp16")
    }
    assert largest[""] > 2.0**15 >= largest["fp16"]


CROWDED = """
import torch

FAULT = {fault}


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, lengths):
        ctx.crowded = FAULT and len(lengths) > 1400
        return v.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (0.5 if ctx.crowded else 1.0), None


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=True):
    # Of documents of one token attention is their value.
    return _First.apply(v, cu_seqlens_q) + 0 * (q + k)
"""


@pytest.mark.slow
def test_a_crowd_of_documents_is_told_as_one_so_many_times(tmp_path: Path) -> None:
    kernel = tmp_path / "crowded.py"
    kernel.write_text(CROWDED.format(fault=True))
    case = Case(level="kernel", lengths=(1,) * 1500, head_dim=8)
    text = standalone(case, registry.load(f"{kernel}:kernel"), "cpu", "half of dV of many documents")
    assert len(text.splitlines()) < 100
    assert "lengths_q=[1] * 1500" in text
    assert text.count("] * 1500") >= 4
    script = tmp_path / "script.py"
    script.write_text(text)
    assert python(tmp_path, str(script), checkout=False).returncode == 1
    kernel.write_text(CROWDED.format(fault=False))
    assert python(tmp_path, str(script), checkout=False).returncode == 0


def test_documents_that_differ_are_no_crowd(tmp_path: Path) -> None:
    kernel = tmp_path / "crowded.py"
    kernel.write_text(CROWDED.format(fault=True))
    case = Case(level="kernel", lengths=(1,) * 1500 + (2,), head_dim=8)
    with pytest.raises(ScriptError, match="more than 20000 numbers"):
        standalone(case, registry.load(f"{kernel}:kernel"), "cpu", "half of dV of many documents")
