"""A finding on a kernel of one's own replays from any folder: by its id, as a script, and as a saved case."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from commandline import Run, sentence

from attn_fuzz.backends.registry import found_from, users
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.regression_cases import read_regression_case
from attn_fuzz.findings.store import Store
from attn_fuzz.reference.case import Case

EXAMPLE = (Path(__file__).resolve().parent.parent / "examples" / "my_kernel.py").read_text()
CASE = Case(level="kernel", lengths=(2,), head_dim=2)
BROKEN = f"""{EXAMPLE}
right = kernel


def kernel(*arguments, softmax_scale=None, causal=False):
    return 1.5 * right(*arguments, softmax_scale=softmax_scale, causal=causal)


kernel.capabilities = right.capabilities
"""


def finding(backend: str) -> Finding:
    return Finding(
        backend=backend,
        device="cpu",
        symptom="WrongOutput",
        checks=("budget",),
        messages=("WrongOutput [budget] out: wrong",),
        case=CASE,
        original_case=CASE,
        cases_to_find=1,
        seconds_to_find=1.0,
    )


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a broken kernel and a finding on it, made in its root."""
    root = tmp_path / "repository"
    (root / "kernels").mkdir(parents=True)
    (root / "kernels" / "my.py").write_text(BROKEN)
    monkeypatch.chdir(root)
    store = Store(Path(".attn-fuzz") / "findings")
    store.prepare()
    store.save(store.placed(finding("kernels/my.py:kernel")))
    return root


def elsewhere(repository: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """From another folder: the finding's id, and where its store is."""
    other = repository.parent / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    return finding("kernels/my.py:kernel").id, "--store", str(repository / ".attn-fuzz" / "findings")


def test_the_folder_is_kept_from_the_store_on(repository: Path) -> None:
    (path,) = (repository / ".attn-fuzz" / "findings").glob("*.json")
    assert json.loads(path.read_text())["root"] == "../.."
    assert json.loads(path.read_text())["backend"] == "kernels/my.py:kernel"


def test_a_finding_replays_from_anywhere(repository: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    where = elsewhere(repository, monkeypatch)
    done = attn_fuzz("replay", *where, "--device", "cpu", "--json")
    assert done.status == 1, done.err
    assert done.json["backends"][0]["name"] == f"{repository / 'kernels' / 'my.py'}:kernel"
    path = Path(where[2]) / f"{where[0]}.json"
    assert attn_fuzz("replay", str(path), "--device", "cpu").status == 1


def test_a_repository_may_move(repository: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = repository.rename(repository.parent / "moved")
    where = elsewhere(moved, monkeypatch)
    assert attn_fuzz("replay", *where, "--device", "cpu").status == 1


def test_its_script_runs_from_anywhere(repository: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = attn_fuzz("script", *elsewhere(repository, monkeypatch), "--device", "cpu")
    assert done.status == 0, done.err
    try:
        with pytest.raises(SystemExit) as ended:
            exec(compile(done.out, "script", "exec"), {"__name__": "__main__"})
    finally:
        # A script is a process of its own, and sets what it likes.
        torch.use_deterministic_algorithms(False)
    assert ended.value.code == 1


def test_a_saved_case_says_where_its_kernel_is(
    repository: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, folder = elsewhere(repository, monkeypatch), repository / "tests" / "regressions"
    assert attn_fuzz("save", where[0], "kept", *where[1:], "--folder", str(folder)).status == 0
    assert json.loads((folder / "kept.json").read_text())["root"] == "../.."
    assert read_regression_case(folder / "kept.json").root == repository
    assert attn_fuzz("replay", str(folder / "kept.json"), "--device", "cpu").status == 1


def test_another_folder_may_be_named(repository: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finding of a version that did not say it, or a kernel that has moved."""
    where = elsewhere(repository, monkeypatch)
    path = Path(where[2]) / f"{where[0]}.json"
    data = json.loads(path.read_text())
    del data["root"]
    path.write_text(json.dumps(data))
    assert "there is no file kernels/my.py" in sentence(attn_fuzz("replay", *where, "--device", "cpu"))
    assert attn_fuzz("replay", *where, "--device", "cpu", "--root", str(repository)).status == 1


def test_a_module_is_imported_from_that_folder(
    repository: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (repository / "kernel_of_this_test.py").write_text(BROKEN)
    monkeypatch.chdir(repository)
    store = Store(repository / ".attn-fuzz" / "findings")
    mine = store.placed(finding("kernel_of_this_test:kernel"))
    store.save(mine)
    where = elsewhere(repository, monkeypatch)
    assert attn_fuzz("replay", mine.id, *where[1:], "--device", "cpu").status == 1


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("loop", "loop"),
        ("legacy:loop", "legacy:loop"),
        ("fault:M18", "fault:M18"),
        ("trigger:3,4:loop", "trigger:3,4:loop"),
        ("a/b.py:kernel", "/root/a/b.py:kernel"),
        ("/a/b.py:kernel", "/a/b.py:kernel"),
        ("layer:b.py:Layer", "layer:/root/b.py:Layer"),
        ("unrestricted:b.py:kernel", "unrestricted:/root/b.py:kernel"),
        ("trigger:3,4:b.py:kernel", "trigger:3,4:/root/b.py:kernel"),
        ("package.module:kernel", "package.module:kernel"),
    ],
)
def test_names_from_elsewhere(name: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert found_from(name, Path("/root")) == found
    assert (users(name) is None) == (":" not in name or name.startswith(("legacy", "fault", "trigger:3,4:loop")))
