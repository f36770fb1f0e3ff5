"""Whatever is corrupted, a command says so in a sentence and ends with 2, and touches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from corruptions import ENTRY, Corruption, all_of, copied, make
from wrong_inputs import command, scratch

COUNT, AT_ONCE, SEED = 300, 30, 22


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by name; of a link where it leads to."""
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which everything is right, and the id of its entry."""
    folder = tmp_path_factory.mktemp("sound") / "base"
    folder.mkdir()
    return folder, make(folder)


EVERY = all_of(SEED, COUNT)


def complaint(corruption: Corruption, base: tuple[Path, str]) -> str | None:
    """What does not hold of one; None for nothing."""
    folder, entry = base

    def named(word: str) -> str:
        return word.replace(ENTRY, entry) if word == ENTRY or "/" in word else word

    with scratch() as empty:
        here = empty / "here"
        copied(folder, here)
        path = here / named(corruption.path)
        if corruption.path:
            corruption.spoil(path)
        before = contents(here)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            patch.setattr("attn_fuzz.nights.supervisor.RoundPool", None)
            patch.setattr("attn_fuzz.campaign.new_process.prepare", lambda: None)
            try:
                status, _, err = command(*map(named, corruption.words))
            except BaseException as error:
                return f"{type(error).__name__}: {error}"
        after = contents(here)
    said = [line for line in err.splitlines() if line.startswith("attn-fuzz: ")]
    if status != 2 or len(said) != 1 or "Traceback" in err or len(said[0]) < 30:
        return f"status {status}, {said}"
    changed = [name for name, data in before.items() if after.get(name) != data]
    return f"{changed} changed" if changed else None


def test_everything_is_right_before_it_is_corrupted(base: tuple[Path, str]) -> None:
    folder, entry = base
    with scratch() as empty, pytest.MonkeyPatch.context() as patch:
        copied(folder, empty / "here")
        patch.chdir(empty / "here")
        for words in (
            "list --store store",
            f"ledger {entry} --store store",
            "coverage --store store",
            "report --repeat 0 --store store",
            "summary store",
            "save case.json another",
        ):
            assert command(*words.split())[0] == 0, words


@pytest.mark.parametrize("first", range(0, COUNT, AT_ONCE))
def test_what_is_corrupted_is_said_and_nothing_is_lost(first: int, base: tuple[Path, str]) -> None:
    some = EVERY[first : first + AT_ONCE]
    found = [(each.words, each.what, each.path, complaint(each, base)) for each in some]
    assert [each for each in found if each[-1] is not None] == []


def test_there_are_three_hundred_and_each_is_another() -> None:
    assert len(EVERY) == COUNT
    assert {each.path.partition("/")[0] for each in EVERY} == {"", "case.json", "tests", "store", "store.sqlite"}
    assert len({each.words for each in EVERY if not each.path}) == sum(not each.path for each in EVERY)
