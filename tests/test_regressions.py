"""Every saved case under tests/regressions: clean on every backend here, failing where failures are expected."""

from __future__ import annotations

from pathlib import Path

import pytest
from devices import but_forced_slow

from attn_fuzz.backends import registry
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign.replay import verdict_on
from attn_fuzz.findings.regression_cases import RegressionCase, regression_cases
from attn_fuzz.pytest_plugin import suite_backends
from attn_fuzz.reference.case import Case

SAVED = regression_cases(Path(__file__).parent / "regressions")


def available(name: str, device: str) -> Backend:
    """A backend that runs here; skips where it does not."""
    backend = registry.load(name)
    if (reason := backend.kernel.why_unavailable(device.partition(":")[0])) is not None:
        pytest.skip(f"{name}: {reason}")
    return backend


def symptoms_of(saved: RegressionCase, backend: Backend, device: str) -> set[str] | None:
    """Names of what a backend shows in a saved case; None where it refuses it."""
    verdict = verdict_on(saved, backend.name, device)
    return None if isinstance(verdict, str) else {type(symptom).__name__ for symptom in verdict.symptoms}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The backends that the suite is asked for, all but a few of them when an edit is checked."""
    if "each_backend" in metafunc.fixturenames:
        metafunc.parametrize("each_backend", but_forced_slow(suite_backends(metafunc.config)))


@pytest.mark.slow
def test_saved_cases_are_clean(each_backend: str, attn_device: str) -> None:
    backend = available(each_backend, attn_device)
    found = {saved.name: symptoms_of(saved, backend, attn_device) for saved in SAVED}
    assert {name: symptoms for name, symptoms in found.items() if symptoms} == {}
    if all(symptoms is None for symptoms in found.values()):
        pytest.skip(f"{each_backend} takes none of them")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "name"),
    [
        pytest.param(saved, name, id=f"{saved.name}-{name}")
        for saved in SAVED
        for name in sorted({name for names in saved.expected_failures.values() for name in names})
    ],
)
def test_a_saved_case_fails_where_that_is_expected(saved: RegressionCase, name: str, attn_device: str) -> None:
    if name not in saved.expected_failures.get(attn_device.partition(":")[0], ()):
        pytest.skip(f"{name} need not fail on {attn_device}")
    found = symptoms_of(saved, available(name, attn_device), attn_device)
    assert found
    assert not saved.symptom or saved.symptom in found


DIES = """
import os

def kernel(*arguments, **options):
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("fault", "case", "symptom"),
    [
        ("X06", '{"level": "kernel", "lengths": [1], "head_dim": 8}', "WrongOutput"),
        ("M51-swapped", '{"level": "layer", "lengths": [1], "head_dim": 1, "hidden": 1}', ""),
    ],
)
def test_a_case_saved_for_any_check_is_asked(fault: str, case: str, symptom: str) -> None:
    """Not only those of the known-bad layer, whose gradients of dead rows are not zero."""
    saved = RegressionCase("saved", Case.from_json(case), symptom=symptom)
    found = symptoms_of(saved, registry.load(f"fault:{fault}"), "cpu")
    assert found
    assert not symptom or symptom in found


@pytest.mark.slow
def test_a_case_that_ends_its_process_ends_another(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    saved = RegressionCase("saved", Case(level="kernel", lengths=(2,)), symptom="Crashed")
    assert symptoms_of(saved, registry.load(f"{tmp_path / 'dies.py'}:kernel"), "cpu") == {"Crashed"}
