"""The wheel, in a repository of somebody's own that has folders and files of the names that are ours in a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = (ROOT / "examples" / "my_kernel.py").read_text()
RIGHT, WRONG = "mask.tril(ke - kb - (qe - qb))", "mask.tril()"
Run = Callable[..., subprocess.CompletedProcess[str]]

THEIR_TESTS = """
import attn_fuzz
from backends import ours
from reference import ANSWER


def test_their_own():
    assert (ours, ANSWER) == (1, 42)
"""

CHECKS = """
import runpy

import pytest
import torch


def test_the_script_of_the_finding():
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("script.py", run_name="__main__")
    assert not ended.value.code
"""

NARROW = """
kernel.capabilities |= {"dtypes": ("fp32",), "head_dims": (8,), "gqa": False, "memories": ("contiguous",)}
"""
"""Finding out what a kernel takes is most of the time of a short check."""


KEEP = """
import contextlib, io, runpy, sys
from attn_fuzz.cli.app import main


def status(run, *arguments):
    sys.argv = ["attn-fuzz", *arguments]
    try:
        run()
    except SystemExit as ended:
        return ended.code or 0
    return 0


with contextlib.redirect_stdout(io.StringIO()) as printed:
    assert status(main, "script", "{id}") == 0
with open("script.py", "w") as script:
    script.write(printed.getvalue())
assert status(lambda: runpy.run_path("script.py", run_name="__main__")) == 1
assert status(main, "save", "{id}", "top_left") == 0
"""
"""Three commands in one process."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel brings, as site-packages does."""
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools here is too old to build the wheel, and another one would have to be fetched")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    # Of a copy: it is built within its folder, and other workers build one at the same time.
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "results"))
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("attn_fuzz-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """The repository."""
    (tmp_path / "reference.py").write_text("ANSWER = 42\n")
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "__init__.py").write_text("ours = 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_theirs.py").write_text(THEIR_TESTS)
    (tmp_path / "conftest.py").write_text('"""Theirs."""\n')
    (tmp_path / "kernel.py").write_text(EXAMPLE.replace(RIGHT, WRONG) + NARROW)
    return tmp_path


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a minute more; asked on machines with a GPU")


@pytest.fixture(params=["wheel", pytest.param("checkout", marks=NO_GPU)])
def run(request: pytest.FixtureRequest, theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a Python module there, as if the wheel were installed, or with a bare checkout on the path."""
    place = ROOT if request.param == "checkout" else request.getfixturevalue("installed")
    compiled = tmp_path_factory.mktemp("compiled")

    def inner(*arguments: str) -> subprocess.CompletedProcess[str]:
        # What pip compiles when it installs is compiled once, for all commands, and nothing in a checkout.
        environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONPYCACHEPREFIX": str(compiled)}
        for name in ("PYTEST_XDIST_WORKER", "PYTHONDONTWRITEBYTECODE"):
            environment.pop(name, None)
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=theirs, env=environment, capture_output=True, text=True, check=False
        )

    return inner


@pytest.mark.slow
def test_what_is_in_it(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"attn_fuzz"}
    inside = {path.name for path in (installed / "attn_fuzz").iterdir()}
    assert {"py.typed", "verdict.schema.json", "reference", "backends", "api.py", "pytest_plugin.py"} <= inside


@pytest.mark.slow
def test_from_a_finding_to_a_test_that_passes_once_it_is_mended(run: Run, theirs: Path) -> None:
    options = ("--device", "cpu", "--cases", "60", "--level", "kernel", "--mode", "case", "--workers", "1", "--first")
    checked = run("attn_fuzz", "check", "kernel.py:kernel", *options, "--json")
    assert checked.returncode == 1, checked.stderr
    finding = json.loads(checked.stdout)["findings"][0]
    assert len(finding["case"]["lengths"]) <= 3
    assert sum(finding["case"]["lengths"]) <= 8
    (theirs / "keep.py").write_text(KEEP.format(id=finding["id"]))
    kept = run("keep")
    assert kept.returncode == 0, kept.stderr
    assert "elements wrong; at [" in kept.stdout

    # As the entry point does where it is installed.
    loaded = ("-p", "attn_fuzz.pytest_plugin", "-p", "no:cacheprovider")
    suite = ("pytest", "-q", *loaded, "--strict-markers", "--attn-cases", "4", "tests")
    red = run(*suite)
    assert red.returncode == 1, red.stdout
    assert "kernel.py:kernel still fails" in red.stdout
    assert "1 failed, 1 passed" in red.stdout

    (theirs / "kernel.py").write_text(EXAMPLE + NARROW)
    (theirs / "tests" / "test_checks.py").write_text(CHECKS)
    assert run("attn_fuzz", "init", "kernel.py:kernel").returncode == 0
    green = run(*suite)
    assert green.returncode == 0, green.stdout
    assert "4 passed" in green.stdout
