"""``init``: what it writes into a repository, and that it loses nothing there; test_wheel.py runs what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import Run, sentence

from attn_fuzz.cli.init import TEST_FILE, WORKFLOW

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = (ROOT / "examples" / "my_kernel.py").read_text()
KERNEL = "my_kernel.py:kernel"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / ".git").mkdir()
    (tmp_path / "my_kernel.py").write_text(EXAMPLE)
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    """Everything there, by path."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_it_says_what_it_writes(attn_fuzz: Run, repository: Path) -> None:
    before = files(repository)
    done = attn_fuzz("init", KERNEL)
    assert done.status == 0, done.err
    written = files(repository)
    assert set(written) - set(before) == {str(TEST_FILE), str(WORKFLOW), ".gitignore", "tests/regressions/.gitkeep"}
    assert {name: written[name] for name in before} == before
    assert written[".gitignore"] == "/.attn-fuzz/\n"
    lines = done.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"wrote {TEST_FILE}",
        f"wrote {WORKFLOW}",
        "added to .gitignore",
        "wrote tests/regressions/.gitkeep",
        "next",
    ]


def test_a_dry_run_writes_nothing(attn_fuzz: Run, repository: Path) -> None:
    before = files(repository)
    done = attn_fuzz("init", KERNEL, "--dry-run")
    assert done.status == 0
    assert f"would write {TEST_FILE}" in done.out
    assert "would add to .gitignore" in done.out
    assert files(repository) == before


def test_what_is_there_stays(attn_fuzz: Run, repository: Path) -> None:
    (repository / "tests" / "regressions").mkdir(parents=True)
    (repository / TEST_FILE).write_text("# mine\n")
    (repository / ".gitignore").write_text("*.pyc")
    before = files(repository)
    told = sentence(attn_fuzz("init", KERNEL))
    assert str(TEST_FILE) in told
    assert "--force" in told
    assert files(repository) == before
    assert attn_fuzz("init", KERNEL, "--force").status == 0
    after = files(repository)
    assert "attn_fuzz" in after[str(TEST_FILE)]
    assert after[".gitignore"] == "*.pyc\n/.attn-fuzz/\n"
    assert "tests/regressions/.gitkeep" not in after
    # A second time there is nothing to add.
    assert attn_fuzz("init", KERNEL, "--force").status == 0
    assert files(repository) == after


def test_the_workflow_is_one(attn_fuzz: Run, repository: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML, of the extra dev")
    assert attn_fuzz("init", KERNEL, "--device", "cuda", "--action", "me/mine@main").status == 0
    workflow = yaml.safe_load((repository / WORKFLOW).read_text())
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    (used,) = [step for step in job["steps"] if step.get("uses") == "me/mine@main"]
    assert used["with"] == {"kernel": KERNEL, "device": "cuda", "seconds": "60"}
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    assert set(used["with"]) <= set(inputs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["my_kernel"], "names no function"),
        (["my_kernel.py:a b"], "names no function"),
        (['"; import os":kernel'], "names no function"),
        (["other.py:kernel"], "there is no file other.py here"),
        (["none_such.kernels:varlen"], "there is no module 'none_such' here"),
        ([KERNEL, "--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: list[str], said: str, attn_fuzz: Run, repository: Path) -> None:
    before = files(repository)
    assert said in sentence(attn_fuzz("init", *arguments))
    assert files(repository) == before


def test_it_is_for_roots_of_repositories(attn_fuzz: Run, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "inside").mkdir()
    (repository / "inside" / "k.py").write_text(EXAMPLE)
    monkeypatch.chdir(repository / "inside")
    assert f"run init in the root of the repository, {repository}" in sentence(attn_fuzz("init", "k.py:kernel"))


def test_a_module_of_the_repository_is_found_and_not_imported(attn_fuzz: Run, repository: Path) -> None:
    (repository / "of_theirs.py").write_text("raise RuntimeError('there is no GPU')\n")
    assert attn_fuzz("init", "of_theirs:kernel", "--dry-run").status == 0
