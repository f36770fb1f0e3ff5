"""Tables of docs/backends.md from what `backends --probe` said."""

from __future__ import annotations

from typing import Any

from attn_fuzz.campaign.limit_questions import GROUPED_VALUES
from attn_fuzz.evaluation.capability_probe import GROUPS, RIGHT, VALUE_DIMS
from results.render.backend_tables import capability_lines, difference_lines, undeclared_lines

WRONG = "wrong: WrongOutput"


def probed(answers: dict[str, tuple[bool, str]]) -> dict[str, Any]:
    """A file with one backend; answers are (whether it is declared, what was measured)."""
    probes = [{"probe": name, "stated": stated, "measured": said} for name, (stated, said) in answers.items()]
    environment = {"device": "GPU", "torch": "2.0", "commit": "abc", "date": "2026-11-30"}
    return {"device": "cuda", "environment": environment, "backends": [{"name": "mine", "probes": probes}]}


def row(lines: list[str]) -> list[str]:
    (line,) = [each for each in lines if each.startswith("| `mine`")]
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def test_a_head_dim_is_no_pair_of_them() -> None:
    result = probed(
        {"head_dim 64": (True, RIGHT), "head_dim 64, values 32": (True, RIGHT), "head_dim 8": (False, "refused: 8")}
    )
    lines = capability_lines([result])
    heads = [each.strip() for each in lines[2].strip("| ").split("|")]
    cells = dict(zip(heads, row(lines), strict=True))
    assert {"many heads", "values", "LSE gradient", "2^31", "loose", "gaps"} <= set(heads)
    # Of what was not asked there is nothing to say.
    assert {name: cell for name, cell in cells.items() if cell} == {
        "backend": "`mine`",
        "dtypes": "-",
        "head_dim": "64",
        "values": "yes",
    }


def test_of_several_questions_all_have_to_be_right() -> None:
    answers = {f"head_dim {dim}, values {other}": (True, RIGHT) for dim, other in VALUE_DIMS}
    answers |= {GROUPED_VALUES: (False, WRONG)}
    answers |= {f"{heads} heads over {kv_heads}": (True, WRONG) for heads, kv_heads in GROUPS}
    cells = row(capability_lines([probed(answers)]))
    assert "part" in cells
    assert "**wrong**" in cells


def test_what_differs_from_a_declaration_is_listed_by_which_way() -> None:
    right = {"causal": (True, RIGHT)}
    result = probed(
        {"softcap": (False, RIGHT), "window, causal": (False, RIGHT), "scale": (True, WRONG), **right},
    )
    assert row(difference_lines([result])) == ["`mine` (cuda)", "scale", WRONG]
    assert row(undeclared_lines([result])) == ["`mine` (cuda)", "softcap; window, causal"]
    assert undeclared_lines([probed(right)])[2:] == []
