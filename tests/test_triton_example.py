"""The Triton kernel of the docs: clean as it is, convicted when one line of it is broken."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from devices import needs_cuda

EXAMPLE = Path(__file__).parent.parent / "examples" / "triton_varlen.py"

BREAKAGES = {
    "top-left alignment": ("row[:, None] + keys - queries", "row[:, None]"),
    "one head of the group": ("for member in range(GROUP)", "for member in range(1)"),
    "scale left out of dK": ("(dk_sums * scale)", "dk_sums"),
    "maximum not carried": ("sums * shrink[:, None]", "sums"),
}


SECONDS = 25
"""Every new head dimension, dtype and mask is compiled, for one to three seconds: cases have no bound in time."""


def check(path: Path, store: Path) -> tuple[int, dict[str, object]]:
    # Not ``check``, which compiles far more to find out first what the kernel takes.
    command = [
        sys.executable,
        "-m",
        "attn_fuzz",
        "run",
        "-b",
        f"{path}:kernel",
        "--device",
        "cuda",
        "--first",
        "--json",
    ]
    command += ["--seconds", str(SECONDS), "--workers", "1", "--mode", "case", "--level", "kernel", "--dtype", "fp16"]
    command += ["--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("old", [old for old, _ in BREAKAGES.values()], ids=list(BREAKAGES))
def test_what_is_broken_is_there(old: str) -> None:
    assert EXAMPLE.read_text().count(old) == 1


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@needs_cuda
def test_the_example_is_clean(tmp_path: Path) -> None:
    status, result = check(EXAMPLE, tmp_path)
    assert result["findings"] == []
    assert result["cases"]
    assert status == 0


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@needs_cuda
@pytest.mark.parametrize("name", BREAKAGES)
def test_one_broken_line_is_convicted(name: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(EXAMPLE.read_text().replace(*BREAKAGES[name]))
    status, result = check(broken, tmp_path / "store")
    assert status == 1
    assert result["findings"]
