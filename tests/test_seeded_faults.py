"""Seeded faults, the published rules, and the power of the probes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commandline import Run, sentence
from hunts import finding_of

from attn_fuzz.backends import registry
from attn_fuzz.backends.faults.fault import faults
from attn_fuzz.evaluation import seeded_faults
from attn_fuzz.evaluation.power import power
from attn_fuzz.evaluation.published_tolerances import failing
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reference.case import Case
from results.render import tables as results

ROOT = Path(__file__).resolve().parent.parent


def test_there_are_faults_of_many_kinds() -> None:
    planted = faults()
    assert len(planted) >= 48
    assert all(fault.about().endswith(".") for fault in planted.values())
    assert sum(bool(fault.reports) for fault in planted.values()) >= 48


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["M51-swapped", "M01", "X07"])
def test_a_fault_is_found_and_minimal(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Hypothesis need not shrink what is shrunk after it.
    monkeypatch.setattr("attn_fuzz.campaign.worker._SHRINK_SECONDS", 0.5)
    mark = seeded_faults.find_fault(fault, seed=5)
    assert mark.finding is not None
    assert mark.cases <= 500
    assert mark.minimal
    assert len(mark.finding.case.packed_lengths) <= 3
    row = seeded_faults.row(fault, [mark, seeded_faults.MutantResult(fault, 6, None, 2000, 0.0, None)], {"rms"})
    assert (row["caught"], row["cases_by_seed"], row["rules"]) == (False, [mark.cases, 2000], ["rms"])


def test_what_could_be_shorter_is_not_minimal() -> None:
    backend = "fault:M51-swapped"
    for lengths, minimal in (((1,), True), ((4, 3), False)):
        case = Case(level="kernel", lengths=lengths, head_dim=4)
        finding = finding_of(backend, case, examine(case, registry.load(backend), "cpu"))
        assert seeded_faults.is_minimal(finding) is minimal


@pytest.mark.slow
def test_published_rules_see_gross_faults_and_miss_dead_rows() -> None:
    assert seeded_faults.rules_on("M51-swapped", count=15) == {"2x/3x", "1e-2", "rms"}
    assert seeded_faults.rules_on("M02-dk", count=15) == set()


def test_rules_judge_whole_tensors() -> None:
    reference = torch.ones(100, dtype=torch.float64)
    wrong = reference.clone()
    wrong[3] += 0.04
    own = reference + 0.015
    assert failing({"out": wrong}, {"out": reference}, {"out": own}) == {"2x/3x", "1e-2"}
    assert failing({"out": reference}, {"out": reference}, {"out": own}) == set()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_one_wrong_key_in_a_long_row_is_seen(dtype: str) -> None:
    seen = power(2048, dtype, placements=5)["seen"]
    for way in ("forward", "backward"):
        assert seen[f"{way} none"] == 0
        assert [seen[f"{way} {kind}"] for kind in ("dropped", "extra", "swapped")] == [5, 5, 5]


@pytest.mark.slow
def test_the_command_prints_one_object(attn_fuzz: Run) -> None:
    done = attn_fuzz("faults", "--only", "M51-swapped", "--no-rules", "--workers", "1", "--json")
    assert done.status == 0, done.err
    (row,) = done.json["faults"]
    assert (row["id"], row["caught"], row["rules"]) == ("M51-swapped", True, None)


def test_what_is_not_hunted_is_told(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hunted: list[str] = []
    monkeypatch.setattr(
        "attn_fuzz.cli.faults._done", lambda work, *_: iter(hunted.extend(name for name, _ in work) or ())
    )
    done = attn_fuzz("faults", "--no-rules", "--workers", "1")
    assert "P14 is hunted with --only: of cases one in 220" in " ".join(done.err.split())
    assert {"P14", "P15"} & set(hunted) == set()
    assert {"P13", "R02"} <= set(hunted)


def test_an_unknown_fault_is_one_sentence(attn_fuzz: Run) -> None:
    assert "unknown fault 'nothing'" in sentence(attn_fuzz("faults", "--only", "nothing"))


LONG = {"X42": 2049, "X43": 2049, "D09": 2049, "D10": 2049}
"""Tokens: four need a row beyond the 2,048th."""


def test_the_committed_table_covers_every_fault() -> None:
    rows = {row["id"]: row for row in results.fault_rows(results.load())}
    # tests/test_placement.py convicts both of the others, on one call.
    not_hunted = {name for name, fault in faults().items() if fault.why_not_hunted}
    assert not_hunted == {"P14", "P15"}
    assert set(rows) | not_hunted == set(faults())
    for name, row in rows.items():
        assert row["caught"], name
        assert row["minimal"], name
        assert len(row["cases_by_seed"]) == 3
        assert row["documents"] <= 3, name
        assert row["tokens"] <= LONG.get(name, 40), name


OF_OTHER_CALLS = {"M35-window", "X36", "X08"}
"""What they do depends on calls before, or comes and goes, so that one case alone does not show it."""

COMMITTED = {row["id"]: row for row in results.fault_rows(results.load())}

ALONE = [name for name in COMMITTED if Case.from_dict(COMMITTED[name]["case"]).all_ranks == 1]
"""Those over ranks take processes."""


@pytest.mark.parametrize("name", sorted(set(ALONE) - OF_OTHER_CALLS))
def test_a_committed_case_still_shows_its_fault(name: str) -> None:
    """A fault that hooks into what has moved since does nothing any more, and nobody hears of it."""
    row = COMMITTED[name]
    first = examine(Case.from_dict(row["case"]), registry.load(f"fault:{name}"), "cpu").first
    assert type(first).__name__ in row["symptoms"]
