"""The store: whole findings or none, also on a disk that is full, and nothing lost that was there."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest

from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.reference.case import Case

FINDING = Finding(
    backend="loop",
    device="cpu",
    symptom="WrongGradK",
    checks=("budget",),
    messages=("first",),
    case=Case(level="kernel", lengths=(2,)),
    original_case=Case(level="kernel", lengths=(3, 4)),
    cases_to_find=17,
    seconds_to_find=0.125,
)
OTHER = dataclasses.replace(FINDING, backend="flash")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store, ready to be written to."""
    made = Store(tmp_path / "a" / "store")
    made.prepare()
    return made


def files(store: Store) -> dict[str, str]:
    """All that lies in the folder, hidden and temporary files included."""
    return {path.name: path.read_text() for path in store.folder.iterdir()}


def test_findings_are_kept_by_id(store: Store) -> None:
    assert files(store) == {}
    assert store.save(FINDING) == store.folder / f"{FINDING.id}.json"
    store.save(OTHER)
    assert store.identifiers() == tuple(sorted([FINDING.id, OTHER.id]))
    assert (store.load(FINDING.id), store.load(OTHER.id)) == (FINDING, OTHER)
    assert set(files(store)) == {f"{FINDING.id}.json", f"{OTHER.id}.json"}


def test_the_same_finding_again_takes_the_place_of_the_first(store: Store) -> None:
    store.save(FINDING)
    again = dataclasses.replace(FINDING, cases_to_find=3)
    store.save(again)
    assert store.load(FINDING.id) == again
    assert len(files(store)) == 1


def test_a_file_is_read_again_where_it_is_another_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(FINDING)
    read: list[object] = []
    from_dict = Finding.from_dict
    monkeypatch.setattr(Finding, "from_dict", lambda data: read.append(data) or from_dict(data))
    assert [store.load(FINDING.id) for _ in range(3)] == [FINDING] * 3
    assert len(read) == 1
    # By another process, say.
    changed = dataclasses.replace(FINDING, cases_to_find=1234)
    Store(store.folder).save(changed)
    assert store.load(FINDING.id) == changed
    assert len(read) == 2


def test_stores_merge_by_copying(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    other.prepare()
    store.save(FINDING)
    other.save(OTHER)
    shutil.copytree(other.folder, store.folder, dirs_exist_ok=True)
    assert store.load(OTHER.id) == OTHER
    assert len(store.identifiers()) == 2


# Reading.


def test_reading_makes_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store on a medium that cannot be written to, or that is not there, can be asked."""

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    folder = tmp_path / "store"
    folder.mkdir()
    (folder / f"{FINDING.id}.json").write_text(json.dumps(FINDING.to_dict()))
    for name in ("mkdir", "write_text", "touch", "unlink"):
        monkeypatch.setattr(Path, name, read_only)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", read_only)
    assert Store(folder).load(FINDING.id) == FINDING
    with pytest.raises(StoreError, match="it holds none"):
        Store(tmp_path / "missing").load(FINDING.id)
    assert not (tmp_path / "missing").exists()


def test_an_unknown_finding_is_told_beside_those_there_are(store: Store) -> None:
    store.save(FINDING)
    with pytest.raises(StoreError, match=rf"no finding 0123456789 in .*; it holds {FINDING.id}$"):
        store.load("0123456789")
    for number in range(12):
        store.save(dataclasses.replace(FINDING, backend=f"loop{number}"))
    with pytest.raises(StoreError, match=r"\.\.\.$") as refused:
        store.load("0123456789")
    assert str(refused.value).count(", ") == 9


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b'{"id": 3}', b"\xff\xfe", b"[" * 100_000, b'{"case": {"lengths": []}}'],
    ids=["empty", "cut off", "null", "list", "another object", "not text", "too deep", "impossible"],
)
def test_a_damaged_finding_is_one_sentence_that_says_what_to_do(store: Store, text: bytes) -> None:
    store.save(OTHER)
    (store.folder / f"{FINDING.id}.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"is damaged .*; delete it or restore it from a copy"):
        store.load(FINDING.id)
    assert store.load(OTHER.id) == OTHER


def test_a_finding_cut_off_anywhere_is_damaged_and_never_another(store: Store) -> None:
    path = store.save(FINDING)
    text = path.read_text()
    for length in range(0, len(text.rstrip()), 7):
        path.write_text(text[:length])
        with pytest.raises(StoreError, match="is damaged"):
            store.load(FINDING.id)


# Writing.


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path, below: str) -> None:
    path = tmp_path / "store"
    path.write_text("mine")
    with pytest.raises(StoreError, match=r"cannot be written to .*; choose another with --store"):
        Store(path / below).prepare()
    assert path.read_text() == "mine"


def test_a_full_disk_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    with pytest.raises(StoreError, match="No space left on device"):
        Store(tmp_path).prepare()


@pytest.mark.parametrize("step", ["write_text", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_leaves_everything_as_it_was(
    store: Store, step: str, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the new finding may have been written; on a disk that became read-only it cannot even be removed."""
    store.save(FINDING)
    store.save(OTHER)
    before = files(store)
    write = Path.write_text

    def fail(path: Path, content: object) -> None:
        if step == "write_text":
            write(path, str(content)[:40])
        raise OSError(error, "the disk fails")

    def stuck(path: Path, missing_ok: bool = False) -> None:
        raise OSError(error, "the disk fails")

    monkeypatch.setattr(Path, step, fail)
    if error == errno.EROFS:
        monkeypatch.setattr(Path, "unlink", stuck)
    with pytest.raises(StoreError, match=rf"finding {FINDING.id} could not be written to .* \(the disk fails\)"):
        store.save(dataclasses.replace(FINDING, cases_to_find=1))
    monkeypatch.undo()
    assert {name: text for name, text in files(store).items() if error != errno.EROFS or name in before} == before
    assert store.identifiers() == tuple(sorted([FINDING.id, OTHER.id]))
    assert store.load(FINDING.id) == FINDING


def test_a_folder_that_vanishes_meanwhile_is_told(store: Store) -> None:
    shutil.rmtree(store.folder)
    with pytest.raises(StoreError, match="could not be written"):
        store.save(FINDING)
    store.folder.write_text("a file now")
    with pytest.raises(StoreError, match="could not be written"):
        store.save(FINDING)
