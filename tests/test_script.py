"""Scripts made of findings: they fail with the fault, pass without it, and need nothing of this project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from attn_fuzz.backends import registry
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

from attn_fuzz.findings.script import ScriptError, candidates, standalone

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


def run(text: str, folder: Path, *, checkout: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs a script; without the checkout, in a folder from which this project cannot be imported."""
    path = folder / "reproduce.py"
    path.write_text(text)
    path_variable = {"PYTHONPATH": str(ROOT)} if checkout else {}
    command = [sys.executable, str(path)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, env={"PATH": "/usr/bin:/bin", **path_variable}
    )


@pytest.mark.parametrize("name", BROKEN)
def test_a_users_kernel_fails_broken_and_passes_mended(name: str, tmp_path: Path) -> None:
    right, wrong, case = BROKEN[name]
    kernel = tmp_path / "kernel.py"
    kernel.write_text(KERNEL.replace(right, wrong))
    backend = registry.load(f"{kernel}:kernel")
    text = standalone(Case.from_json(case), backend, "cpu", "broken")
    assert "attn_fuzz" not in text
    assert "backends" not in text
    done = run(text, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "elements wrong; at row" in done.stdout
    kernel.write_text(KERNEL)
    done = run(text, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ("M51-swapped", '{"level": "kernel", "lengths": [2], "head_dim": 2}'),
        ("M16", '{"level": "kernel", "lengths": [3], "key_lengths": [1]}'),
        ("X06", '{"level": "kernel", "lengths": [1], "head_dim": 8}'),
        ("M32-value", '{"level": "kernel", "lengths": [2], "head_dim": 2, "memory": "mixed"}'),
        ("M46-backward", '{"level": "kernel", "lengths": [3], "softcap": 3.0}'),
    ],
)
def test_a_planted_fault_fails_by_itself(fault: str, case: str, tmp_path: Path) -> None:
    text = standalone(Case.from_json(case), registry.load(f"fault:{fault}"), "cpu", fault)
    done = run(text, tmp_path, checkout=True)
    assert done.returncode == 1, done.stderr
    assert "elements wrong; at" in done.stdout or "rows behind the last document are not 0" in done.stdout
    done = run(text.replace(f"fault:{fault}", "backup"), tmp_path, checkout=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
