"""Functions of the package are short, and are told few things."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("attn_fuzz", "reference", "backends")
MOST_PARAMETERS, MOST_LINES = 7, 60

EXCUSED = {
    "attn_fuzz/api.py assert_attention": "a public signature: a call's tensors by the names that kernels have for them",
    "attn_fuzz/cli/fuzz.py run": "a typer command: a parameter for each option",
    "attn_fuzz/cli/night.py campaign": "a typer command",
    "attn_fuzz/cli/fuzz.py check": "a typer command",
    "attn_fuzz/cli/fuzz.py check_layer": "a typer command",
    "attn_fuzz/cli/ledger.py ledger": "a typer command",
    "attn_fuzz/nights/soak_kernels.py kernel": "the signature that varlen kernels have",
    "reference/fused_answer_kernels.py compare_kernel": "a Triton kernel",
    "reference/fused_answer_kernels.py rows_kernel": "a Triton kernel",
    "reference/fused_answer_kernels.py keys_kernel": "a Triton kernel",
    "reference/fused_answer_terms.py scores_of": "a Triton kernel",
    "reference/fused_answer_terms.py ds_of": "a Triton kernel",
    "reference/fused_values.py draw": "tensors and keys of a stream, handed to a Triton kernel one by one",
    "reference/fused_values.py draw_kernel": "a Triton kernel",
}
"""Functions beyond a limit, each with the reason for it."""


def too_much(path: str, source: str) -> Iterator[str]:
    """Functions of a source text that are beyond a limit; ``self`` and ``cls`` are no parameters."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            told = node.args
            every = [*told.posonlyargs, *told.args, *told.kwonlyargs, *filter(None, (told.vararg, told.kwarg))]
            parameters = [argument for argument in every if argument.arg not in ("self", "cls")]
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if len(parameters) > MOST_PARAMETERS or lines > MOST_LINES:
                yield f"{path} {node.name}"


def test_functions_are_short_and_told_few_things() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {name for path in paths for name in too_much(str(path.relative_to(ROOT)), path.read_text())}
    assert found == set(EXCUSED), "mend it, or take out of EXCUSED what is mended"


LONG = "def f():\n" + "    pass\n" * MOST_LINES


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("def f(a, b, c, d, e, f, g): ...", False),
        ("def f(a, b, c, d, e, f, g, h): ...", True),
        ("def f(a, b, c, d, e, f, g, *, h): ...", True),
        ("def f(a, b, c, d, e, f, *g, **h): ...", True),
        ("class C:\n    def f(self, a, b, c, d, e, f, g): ...", False),
        ("class C:\n    async def f(self, a, b, c, d, e, f, g, h): ...", True),
        (LONG, True),
        (LONG.removesuffix("    pass\n"), False),
    ],
)
def test_the_rule_sees_what_is_too_much(source: str, seen: bool) -> None:
    assert bool(list(too_much("module", source))) is seen
