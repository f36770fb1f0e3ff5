"""Fast-LLM's layer of the docs: refused in one sentence without the package; with it, judged by what its tree has."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commandline import Run, sentence
from devices import needs_cuda

from attn_fuzz.backends.user import user_layer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "fast_llm_layer.py"
ANYWHERE, ON_GPU = ("LayerBackup", "LayerSdpaDense"), ("LayerSdpaNested", "LayerFlash")

PACKAGE = importlib.util.find_spec("fast_llm")
needs_fast_llm = pytest.mark.skipif(PACKAGE is None, reason="needs the package fast_llm")


def check_layer(name: str, store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attn_fuzz", "check-layer", f"{EXAMPLE}:{name}", *arguments]
    command += ["--json", "--workers", "1", "--store", str(store)]
    # Warnings of packages, about numpy for one, are not the command's own words.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# Anywhere.


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        ("ModuleNotFoundError(\"No module named 'fast_llm'\")", "No module named 'fast_llm'"),
        ("SyntaxError('invalid syntax')", "invalid syntax"),
    ],
    ids=["absent", "too new for this Python"],
)
def test_without_the_package_one_sentence_says_what_is_missing(
    raised: str, reason: str, attn_fuzz: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before any that is installed.
    (tmp_path / "fast_llm.py").write_text(f"raise {raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fast_llm", raising=False)
    line = sentence(attn_fuzz("check-layer", f"{EXAMPLE}:LayerBackup", "--device", "cpu", "--cases", "1", "--json"))
    assert line.startswith(f"attn-fuzz: {EXAMPLE} cannot be imported: ImportError: Fast-LLM is needed ({reason}): ")
    assert "github.com/ServiceNow/Fast-LLM" in line
    assert "Python 3.12" in line


class Stub(ModuleType):
    """A module that has everything, as empty classes with the one method whose signature is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"_get_model_input": lambda self, begin, end, config: None})


@pytest.mark.parametrize("name", [*ANYWHERE, *ON_GPU])
def test_each_class_is_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = [node.module for node in ast.walk(ast.parse(EXAMPLE.read_text())) if isinstance(node, ast.ImportFrom)]
    assert len(imported) > 5
    for module in imported:
        monkeypatch.setitem(sys.modules, str(module), Stub(str(module)))
    # It would have this process compile nothing from here on.
    monkeypatch.setenv("FAST_LLM_COMPILED", "1")
    layer, *_ = user_layer(f"{EXAMPLE}:{name}")
    assert layer.capabilities.softcap is False
    assert layer.capabilities.devices == (("cpu", "cuda") if name in ANYWHERE else ("cuda",))


# Where the package is.


def is_fixed() -> bool:
    """Whether the tree keeps keys and values in one buffer, whose prefix sums begin at 0."""
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return "class _KVCacheSlot" in (Path(PACKAGE.origin).parent / "layers/attention/attention.py").read_text()


@needs_fast_llm
@pytest.mark.parametrize("name", ANYWHERE)
def test_implementations_with_a_mask_are_clean_before_and_after_the_fix(name: str, tmp_path: Path) -> None:
    done = check_layer(name, tmp_path, "--device", "cpu", "--cases", "16")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (mine,) = told["backends"].values()
    assert (told["findings"], told["cases"], mine["refused"]) == ([], 16, 0)
    assert mine["straddling"] > 0


def on_gpu(name: str, *packages: str) -> Any:
    """A layer with its marks. A machine that must run all that is marked ``cuda`` need not have Fast-LLM."""
    if absent := [package for package in packages if importlib.util.find_spec(package) is None]:
        return pytest.param(name, marks=pytest.mark.skip(reason=f"needs the package {absent[0]}"))
    return pytest.param(name, marks=[pytest.mark.cuda, needs_cuda])


@pytest.mark.parametrize(
    "name", [on_gpu("LayerSdpaNested", "fast_llm"), on_gpu("LayerFlash", "fast_llm", "flash_attn")]
)
def test_prefix_sums_that_do_not_begin_at_0_are_convicted_and_the_fix_is_clean(name: str, tmp_path: Path) -> None:
    done = check_layer(name, tmp_path, "--device", "cuda", "--cases", "40", "--first")
    told = json.loads(done.stdout)
    assert told["troubles"] == []
    if is_fixed():
        assert (done.returncode, told["findings"], told["cases"]) == (0, [], 40)
        return
    assert done.returncode == 1
    (finding,) = told["findings"]
    # Documents of a micro-sequence are a past document's keys away from where they should be.
    assert len(finding["case"]["lengths"]) <= 3
    assert finding["case"]["cuts"]
    assert finding["symptom"] != "Crashed"
