"""The command line: help, and one sentence for what cannot be done."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import CASE, SWAPPED, Run, sentence, write

import attn_fuzz as package
from attn_fuzz.cli.app import COMMANDS, function_of

ROOT = Path(__file__).resolve().parent.parent

# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, attn_fuzz: Run) -> None:
    done = attn_fuzz(command, "--help")
    assert (done.status, done.err) == (0, "")
    assert f"attn-fuzz {command}" in done.out


# Bad input.


KERNEL = "def kernel(q, k, v, cu_q, cu_k, max_q, max_k):\n    return q\n\n\n"

BAD_USAGE = {
    "no such command": (("dance",), "dance"),
    "no such option": (("run", "--quickly"), "--quickly"),
    "no argument": (("check",), "MODULE:FUNCTION"),
    "seconds and cases": (("run", "--seconds", "1", "--cases", "1"), "--seconds and --cases"),
    "no seconds": (("run", "--seconds", "0"), "--seconds"),
    "seconds that never end": (("run", "--backend", "loop", "--seconds", "nan"), "--seconds"),
    "seconds in words": (("run", "--seconds", "many"), "--seconds"),
    "no cases": (("run", "--cases", "0"), "--cases"),
    "negative seed": (("run", "--seed", "-1"), "--seed"),
    "backend": (("run", "--backend", "flesh"), "known backends are"),
    "fault": (("run", "--backend", "fault:M999"), "known faults are"),
    "seeded fault": (("faults", "--only", "M999"), "M999"),
    "dtype": (("run", "--dtype", "fp8"), "fp32, bf16, fp16"),
    "level": (("run", "--level", "model"), "kernel, layer"),
    "poison": (("run", "--poison", "arsenic"), "nan, finite, none"),
    "device": (("run", "--device", "tpu"), "use cpu, cuda or cuda:N"),
    "device of the catalogue": (("backends", "--device", "tpu"), "use cpu or cuda"),
    "level that a backend lacks": (("run", "-b", "legacy:loop", "--level", "kernel", "--cases", "1"), "layer"),
    "kernel without a module": (("check", "kernel"), "MODULE:FUNCTION"),
    "layer without a module": (("check-layer", "Layer"), "MODULE:CLASS"),
    "module": (("check", "no_such_module:kernel"), "no_such_module"),
    "file": (("check", "nothing.py:kernel"), "there is no file nothing.py"),
    "function in the file": (("check", "kernel.py:colonel"), "'colonel'"),
    "no function": (("check", "kernel.py:number"), "is no function but of type int; name a function that returns out"),
    "file that is no Python": (("check", "broken.py:kernel"), "SyntaxError"),
    "file that ends the process": (("check", "exits.py:kernel"), "SystemExit"),
    "function without a signature": (("check", "torch:addmm"), "signature"),
    "capability": (("check", "kernel.py:unknown"), "colour"),
    "capability of a wrong type": (("check", "kernel.py:text"), "dtypes"),
    "capability of a wrong dtype": (("check", "kernel.py:int8"), "int8"),
    "capability that is no number": (("check", "kernel.py:wide"), "max_head_dim"),
    "dtype that a kernel lacks": (("check", "kernel.py:half", "--dtype", "fp32", "--device", "cpu"), "takes bf16"),
}


@pytest.mark.parametrize("name", BAD_USAGE)
def test_bad_usage_is_one_sentence(name: str, attn_fuzz: Run) -> None:
    write(
        "kernel.py",
        "import functools\nnumber = 3\n\n\n"
        + "".join(
            KERNEL.replace("kernel", kernel) + f"{kernel}.capabilities = {capabilities}\n\n\n"
            for kernel, capabilities in {
                "unknown": '{"colour": 1}',
                "text": '{"dtypes": "bf16"}',
                "int8": '{"dtypes": ["int8"]}',
                "wide": '{"max_head_dim": "wide"}',
                "half": '{"dtypes": ("bf16",)}',
            }.items()
        ),
    )
    write("broken.py", "def kernel(:\n")
    write("exits.py", KERNEL + "raise SystemExit(0)\n")
    arguments, told = BAD_USAGE[name]
    assert told in sentence(attn_fuzz(*arguments))


BAD_CASES = {
    "malformed": '{"lengths": [1}',
    "nested beyond reason": "[" * 100_000,
    "not an object": "[1, 2]",
    "unknown key": '{"length": [1]}',
    "wrong type": '{"lengths": "many"}',
    "wrong dtype": '{"lengths": [1], "dtype": "fp64"}',
    "impossible": '{"lengths": [2], "cuts": [5]}',
    "no number": '{"lengths": [1], "scale": NaN}',
    "not text": b"\xff\xfe\x00",
    "empty": "",
}


@pytest.mark.parametrize("command", ["replay", "script", "save"])
@pytest.mark.parametrize("name", BAD_CASES)
def test_a_bad_case_file_is_one_sentence(command: str, name: str, attn_fuzz: Run) -> None:
    write("case.json", BAD_CASES[name])
    more = ("kept",) if command == "save" else ()
    assert "case.json" in sentence(attn_fuzz(command, "case.json", *more))
    assert not Path("tests").exists()


@pytest.mark.parametrize("command", ["replay", "script"])
def test_a_case_may_be_given_as_text(command: str, attn_fuzz: Run) -> None:
    done = attn_fuzz(command, CASE, "--backend", SWAPPED, "--device", "cpu")
    assert done.status == (1 if command == "replay" else 0), done.err
    assert "not valid JSON" in sentence(attn_fuzz(command, CASE[:-1], "--backend", SWAPPED))


@pytest.mark.parametrize("name", ["missing.json", "folder.json", "0123456789", "x" * 5000])
def test_a_missing_case_is_one_sentence(name: str, attn_fuzz: Run) -> None:
    Path("folder.json").mkdir()
    assert name[:50] in sentence(attn_fuzz("replay", name))


def test_a_script_needs_a_backend(attn_fuzz: Run) -> None:
    assert "--backend" in sentence(attn_fuzz("script", CASE))


def test_what_every_backend_refuses_is_one_sentence(attn_fuzz: Run) -> None:
    assert "does not take" in sentence(attn_fuzz("replay", CASE, "-b", "legacy:loop", "--device", "cpu"))


@pytest.mark.parametrize("arguments", [("run",), ("check", "kernel.py:kernel"), ("replay", CASE), ("script", CASE)])
def test_cuda_without_a_gpu_is_one_sentence(
    arguments: tuple[str, ...], attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write("kernel.py", KERNEL)
    assert "use --device cpu" in sentence(attn_fuzz(*arguments, "--device", "cuda"))


# What answers at once.

LIGHT = "import sys; from attn_fuzz.cli.app import main\ntry: main()\nfinally: print('torch' in sys.modules)"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_and_version_need_no_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert done.stderr == ""
    assert done.returncode == (0 if arguments else 2)


def test_help_names_every_command(attn_fuzz: Run) -> None:
    done = attn_fuzz("--help")
    assert done.status == 0
    text = done.out
    assert all(f" {name} " in text for name in COMMANDS)
    for name, (module, _) in COMMANDS.items():
        assert callable(function_of(importlib.import_module(f"attn_fuzz.cli.{module}"), name))


def test_a_command_says_its_options(attn_fuzz: Run) -> None:
    assert "--seconds" in attn_fuzz("check", "--help").out


def test_version(attn_fuzz: Run) -> None:
    said = attn_fuzz("--version").out
    assert said.startswith(f"attn-fuzz {package.__version__}, torch {torch.__version__.partition('+')[0]}")


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, attn_fuzz; print([name for name in ('torch', 'typer', 'hypothesis') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
