"""Scripts of published reports: standalone, each saying what it stands for."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from results.render.backend_tables import load
from upstream.__main__ import ANSWERS, SCRIPTS, about, attempt, names

ALLOWED = {"sys", "os", "warnings", "inspect", "importlib", "subprocess"}
PACKAGES = {"flash_attn", "flash_attn_interface", "cutlass", "xformers"}
ALLOWED |= {"torch", *PACKAGES}


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
def test_a_script_has_told_on_a_gpu_whether_the_defect_is_there(name: str) -> None:
    """As committed (results/backends/reports*.json)."""
    told = {report["answer"] for run in load("reports*.json") for report in run["reports"] if report["id"] == name}
    assert told & {"reproduced", "not reproduced"}


def needs_a_package(name: str) -> bool:
    """Whether there is nothing to try without one; one script has torch's own calls beside that of a package."""
    text = (SCRIPTS / f"{name}.py").read_text()
    return name != "fast_llm_514" and any(re.search(rf"(import|from) {package}\b", text) for package in PACKAGES)


@pytest.mark.parametrize("name", [*filter(needs_a_package, names())])
def test_a_script_without_its_package_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert ANSWERS[ended.value.code] == "not tried"
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "unknown report 'nonsense'"),
        pytest.param(
            [], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs no CUDA device")
        ),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["upstream", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS.parent / "__main__.py"), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("attn-fuzz: ")
    assert said in line
