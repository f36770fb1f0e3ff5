"""Scripts of published reports: standalone, each saying what it stands for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from upstream.__main__ import SCRIPTS, about, attempt, names

ALLOWED = {"sys", "os", "warnings", "inspect", "importlib", "subprocess"}
ALLOWED |= {"torch", "flash_attn", "flash_attn_interface", "cutlass", "xformers"}


@pytest.mark.parametrize("name", names())
def test_a_script_names_its_report(name: str) -> None:
    assert re.match(r"[\w.-]+(/[\w.-]+)?#\d+", about(name))


@pytest.mark.parametrize("name", names())
def test_a_script_needs_torch_and_its_backend_only(name: str) -> None:
    tree = ast.parse((SCRIPTS / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in imported} <= ALLOWED


@pytest.mark.parametrize("name", names())
def test_a_script_can_say_that_the_defect_is_there(name: str) -> None:
    assert "sys.exit(" in (SCRIPTS / f"{name}.py").read_text()


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("print('gone'); sys.exit(0)", "not reproduced"),
        ("print('there'); sys.exit(1)", "reproduced"),
        ("print('no package'); sys.exit(3)", "not tried"),
        ("import os; os.abort()", "reproduced"),
        ("sys.exit(7)", "failed"),
        ("raise ValueError('our mistake')", "failed"),
    ],
)
def test_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, answer: str) -> None:
    (tmp_path / "report.py").write_text(f'"""some/thing#1: about."""\nimport sys\n{body}\n')
    monkeypatch.setattr("upstream.__main__.SCRIPTS", tmp_path)
    assert attempt("report")["answer"] == answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "unknown report 'nonsense'"),
        pytest.param(
            [], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs no CUDA device")
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "upstream", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    # What torch itself warns about (a missing numpy, say) is not ours.
    assert len([line for line in done.stderr.splitlines() if line.startswith("attn-fuzz: ")]) == 1
    assert "Traceback" not in done.stderr
