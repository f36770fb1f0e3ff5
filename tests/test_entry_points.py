"""Backends that installed packages bring."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import Run

from attn_fuzz.backends import registry
from attn_fuzz.backends.importing import import_object

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


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process has a package with backends installed, and so has every one that it starts."""
    (tmp_path / "their_package.py").write_text(_PACKAGE)
    information = tmp_path / "their_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(_ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    registry.third_party.cache_clear()
    yield
    sys.modules.pop("their_package", None)
    registry.third_party.cache_clear()


def test_they_are_listed_beside_ours(attn_fuzz: Run) -> None:
    done = attn_fuzz("backends", "--device", "cpu", "--json", "-b", "theirs", "-b", "their-function", "-b", "loop")
    listed = {entry["name"]: entry for entry in done.json["backends"]}
    assert set(listed) == {"theirs", "their-function", "loop"}
    assert all(entry["available"] for entry in listed.values())


COMMON = ("--device", "cpu", "--workers", "1", "--json", "--cases", "8")


@pytest.mark.slow
def test_they_are_put_under_test(attn_fuzz: Run) -> None:
    """In a worker of the campaign's, which looks for them by itself."""
    right = attn_fuzz("run", "-b", "theirs", *COMMON)
    assert (right.status, right.json["findings"]) == (0, [])


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_what_is_wrong_with_them_is_found(attn_fuzz: Run) -> None:
    wrong = attn_fuzz("run", "-b", "their-function", "--first", *COMMON)
    assert wrong.status == 1
    assert wrong.json["findings"][0]["backend"] == "their-function"


def test_what_cannot_be_imported_says_so(attn_fuzz: Run) -> None:
    done = attn_fuzz("run", "-b", "broken", "--cases", "5", "--device", "cpu")
    assert done.status == 2
    assert "their_package has no 'nothing'" in done.err


def test_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    """What a kernel defines as it runs, as compilers do, is looked for in its own file."""
    kernels = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "kernel.py"
        path.write_text(f"import sys\n\ndef where():\n    return sys.modules[__name__].FOLDER\n\nFOLDER = {folder!r}\n")
        kernels.append(import_object(f"{path}:where"))
    assert [where() for where in kernels] == ["a", "b"]
