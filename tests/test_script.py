"""Scripts made of findings: they fail with the fault, pass without it, and need nothing of this project."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from attn_fuzz.backends import registry
from attn_fuzz.findings.script import ScriptError, candidates, standalone
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

ROOT = Path(__file__).resolve().parent.parent
KERNEL = (ROOT / "examples" / "my_kernel.py").read_text()

BROKEN = {
    "top-left": (
        "mask.tril(ke - kb - (qe - qb))",
        "mask.tril()",
        '{"level": "kernel", "lengths": [1], "key_lengths": [3]}',
    ),
    "scaled": (
        "torch.cat(out)",
        "torch.cat([*out[:-1], out[-1] * 1.02])",
        '{"level": "kernel", "lengths": [2, 1], "heads": 2}',
    ),
    "strided memory": (
        "torch.cat(out)",
        "torch.cat(out) * 1.02",
        '{"level": "kernel", "lengths": [2], "head_dim": 4, "memory": "strided"}',
    ),
    "misaligned": (
        "torch.cat(out)",
        "torch.cat(out) * 1.02",
        '{"level": "kernel", "lengths": [2], "dtype": "bf16", "memory": "misaligned"}',
    ),
    "mixed memory": (
        "torch.cat(out)",
        "torch.cat(out) * 1.02",
        '{"level": "kernel", "lengths": [3], "heads": 2, "kv_heads": 2, "head_dim": 4, "memory": "mixed"}',
    ),
    "broadcast": (
        "torch.cat(out)",
        "torch.cat(out) * 1.5",
        '{"level": "kernel", "lengths": [2], "heads": 2, "memory": "broadcast"}',
    ),
}


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

for path in sys.argv[1:]:
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
    done = python(folder, "-c", ONE_AFTER_ANOTHER, *(str(path) for path in paths.values()), checkout=checkout)
    assert done.returncode == 0, done.stderr
    told = {path: (status, said) for path, status, said in map(json.loads, done.stdout.splitlines())}
    return {name: told[str(path)] for name, path in paths.items()}


def of_a_users_kernel(name: str, folder: Path) -> tuple[str, Path]:
    """The script of a finding about a kernel with a line broken, and the kernel's file."""
    right, wrong, case = BROKEN[name]
    folder.mkdir()
    kernel = folder / "kernel.py"
    kernel.write_text(KERNEL.replace(right, wrong))
    return standalone(Case.from_json(case), registry.load(f"{kernel}:kernel"), "cpu", "broken"), kernel


@pytest.mark.slow
def test_users_kernels_fail_broken_and_pass_mended(tmp_path: Path) -> None:
    made = {name: of_a_users_kernel(name, tmp_path / str(index)) for index, name in enumerate(BROKEN)}
    texts = {name: text for name, (text, _) in made.items()}
    for text in texts.values():
        assert "attn_fuzz" not in text
        assert "backends" not in text
    # In another folder, and not later in the same: all scripts run in one process.
    mended = tmp_path / "mended"
    mended.mkdir()
    (mended / "kernel.py").write_text(KERNEL)
    texts |= {f"{name} mended": text.replace(str(made[name][1].parent), str(mended)) for name, text in texts.items()}
    for name, (status, said) in run(tmp_path, texts).items():
        assert status == (0 if "mended" in name else 1), (name, status)
        assert ("elements wrong; at row" in said) is ("mended" not in name), name


@pytest.mark.slow
def test_a_script_runs_by_itself(tmp_path: Path) -> None:
    text, _ = of_a_users_kernel("top-left", tmp_path / "kernels")
    path = tmp_path / "reproduce.py"
    path.write_text(text)
    done = python(tmp_path, str(path), checkout=False)
    assert done.returncode == 1, done.stderr
    assert "elements wrong; at row" in done.stdout


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
        (Case(level="layer", lengths=(2,)), "loop", "a layer case"),
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
