"""Backends that installed packages bring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attn_fuzz.backends.user import import_object

_PACKAGE = """
import torch
from attn_fuzz.backends.kernels.loop import LoopKernel

class Theirs(LoopKernel):
    name = "theirs"

KERNEL = Theirs()

def function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False):
    return torch.zeros_like(q) * q * k.sum() * v.sum()
"""

_ENTRY_POINTS = """[attn_fuzz.backends]
theirs = their_package:KERNEL
their-function = their_package:function
loop = their_package:KERNEL
broken = their_package:nothing
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has a package with backends installed."""
    (tmp_path / "their_package.py").write_text(_PACKAGE)
    information = tmp_path / "their_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(_ENTRY_POINTS)
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attn_fuzz", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_they_are_listed_beside_ours(installed: dict[str, str]) -> None:
    done = run(installed, "backends", "--device", "cpu", "--json", "-b", "theirs", "-b", "their-function", "-b", "loop")
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)["backends"]}
    assert set(listed) == {"theirs", "their-function", "loop"}
    assert all(entry["available"] for entry in listed.values())


@pytest.mark.slow
def test_they_are_put_under_test(installed: dict[str, str], tmp_path: Path) -> None:
    common = ["--device", "cpu", "--workers", "1", "--json", "--store", str(tmp_path / "store")]
    right = run(installed, "run", "-b", "theirs", "--cases", "20", *common)
    assert (right.returncode, json.loads(right.stdout)["findings"]) == (0, [])
    wrong = run(installed, "run", "-b", "their-function", "--cases", "20", "--first", *common)
    assert wrong.returncode == 1
    assert json.loads(wrong.stdout)["findings"][0]["backend"] == "their-function"


@pytest.mark.slow
def test_what_cannot_be_imported_says_so(installed: dict[str, str]) -> None:
    done = run(installed, "run", "-b", "broken", "--cases", "5", "--device", "cpu")
    assert done.returncode == 2
    assert "their_package has no 'nothing'" in done.stderr


def test_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    """What a kernel defines as it runs, as compilers do, is looked for in its own file."""
    kernels = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "kernel.py"
        path.write_text(f"import sys\n\ndef where():\n    return sys.modules[__name__].FOLDER\n\nFOLDER = {folder!r}\n")
        kernels.append(import_object(f"{path}:where"))
    assert [where() for where in kernels] == ["a", "b"]
