"""The ledger: a bug is one entry however often it is found, says what became of it, and is run again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from commandline import Run, sentence
from in_turn import InThisProcess

from attn_fuzz.backends import known, registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.limits import LIMITS
from attn_fuzz.campaign.retest import keep_script, place_of
from attn_fuzz.cli.campaigns import Keeper
from attn_fuzz.findings.entry import FOUND_BY, Answer, Entry, LedgerError, merged
from attn_fuzz.findings.finding import Finding, summarise
from attn_fuzz.findings.ledger import Ledger, entry_of
from attn_fuzz.findings.signature import Signature
from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.case_format import NewerVersion
from results.render import backend_tables

ROOT = Path(__file__).resolve().parent.parent
RIGHT = (ROOT / "examples" / "my_kernel.py").read_text()
WRONG = RIGHT.replace("mask.tril(ke - kb - (qe - qb))", "mask.tril()")
OTHERWISE = RIGHT.replace("return torch.cat(out)", "return 2 * torch.cat(out) - torch.cat(out).detach()")
SMALL = Case(level="kernel", lengths=(1,), key_lengths=(3,))
DRAWN = Case(level="kernel", lengths=(4, 7), key_lengths=(9, 7), seed=3)


def finding(case: Case = SMALL, **changes: Any) -> Finding:
    """One on a kernel whose mask is aligned top-left."""
    symptom = {"symptom": "WrongOutput", "check": "budget", "tensor": "out", "got": 1.0, "failing": {"rows": "some"}}
    plain = Finding(
        backend="kernel.py:kernel",
        device="cpu",
        symptom="WrongOutput",
        checks=("budget",),
        messages=("WrongOutput [budget] out: wrong",),
        symptoms=(symptom,),
        case=case,
        original_case=DRAWN,
        cases_to_find=17,
        seconds_to_find=0.5,
        environment={"date": "2026-11-29", "device": "a CPU"},
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store beside a wrong kernel, with the finding on it."""
    monkeypatch.chdir(tmp_path)
    Path("kernel.py").write_text(WRONG)
    made = Store(Path("store"))
    made.prepare()
    made.save(made.placed(finding()))
    return made


# Signatures.


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"case": Case(level="kernel", lengths=(2,), key_lengths=(5,), seed=9)}, True),
        ({"case": Case(lengths=(2,), cuts=(1,))}, True),
        ({"original_case": SMALL, "cases_to_find": 3, "environment": {}, "device": "cuda:1"}, True),
        ({"case": SMALL.replace(dtype="bf16")}, False),
        ({"case": Case(level="kernel", lengths=(3,))}, False),
        ({"case": SMALL.replace(window=(1, -1))}, False),
        ({"backend": "flash"}, False),
        ({"symptom": "WrongGradK"}, False),
        ({"symptoms": ({"tensor": "dq"},)}, False),
        ({"symptoms": ({"tensor": "out", "got": "nan", "failing": {"rows": "some"}},)}, False),
        ({"symptoms": ({"tensor": "out", "failing": {"rows": "all"}},)}, False),
        ({"symptoms": ({"tensor": "out", "failing": {"rows": "some", "heads": "all"}},)}, True),
        ({"sequence": {"case": {}}}, False),
    ],
)
def test_a_signature_is_the_bugs_and_not_the_cases(changes: dict[str, Any], same: bool) -> None:
    assert (Signature.of(finding(**changes)).id == Signature.of(finding()).id) is same


def test_a_signature_reads() -> None:
    case = SMALL.replace(dtype="bf16", window=(1, -1), causal=False)
    words = "WrongOutput on kernel.py:kernel: out, some rows; needs past, not causal, window, dtype bf16"
    assert str(Signature.of(finding(case))) == words
    assert (
        str(Signature.of(finding(symptoms=()))) == "WrongOutput on kernel.py:kernel: nowhere in particular; needs past"
    )


def test_how_far_wrong_elements_reach_is_data(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(WRONG)
    case = Case(level="kernel", lengths=(2, 2), key_lengths=(2, 4), heads=2, head_dim=4)
    verdict = examine(case, registry.load(f"{tmp_path / 'kernel.py'}:kernel"), "cpu")
    by_budget = {each["tensor"]: each["failing"] for each in summarise(verdict)["symptoms"] if "failing" in each}
    assert by_budget["out"] == {"documents": "one", "rows": "all", "heads": "all", "channels": "all"}
    assert by_budget["dk"]["documents"] == "one"


# Entries.


def test_an_entry_is_a_file_that_reads_line_by_line() -> None:
    matrix = {"torch 2.13": {"a CPU": Answer(answer="wrong", why="so", date="2026-11-29")}}
    entry = dataclasses.replace(entry_of(finding()), notes=("one", "two"), matrix=matrix)
    assert Entry.from_json(entry.to_json()) == entry
    lines = entry.to_json().splitlines()
    assert '  "case": {"level": "kernel", "lengths": [1], "key_lengths": [3]},' in lines
    assert '    "one",' in lines
    assert entry.state == "reduced"
    assert entry_of(finding(original_case=SMALL)).state == "new"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "forgotten"}, "unknown state 'forgotten'; use new, reduced"),
        ({"found_by": "luck"}, "unknown found by 'luck'"),
        ({"state": "fixed"}, "fixed is so in a version"),
        ({"version": "2.14"}, "fixed is so in a version"),
        ({"state": "duplicate"}, "of another entry"),
    ],
)
def test_an_entry_that_makes_no_sense_is_one_sentence(changes: dict[str, str], said: str) -> None:
    with pytest.raises(LedgerError, match=said):
        dataclasses.replace(entry_of(finding()), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": 3}', '{"format": []}', "nonsense"])
def test_what_is_no_entry_is_one_sentence(text: str) -> None:
    with pytest.raises(LedgerError, match="no entry of a ledger"):
        Entry.from_json(text)


def test_what_a_newer_version_wrote_is_said_to_be_newer() -> None:
    data = json.loads(entry_of(finding()).to_json())
    for newer in ({**data, "format": 2}, {**data, "colour": "red"}):
        with pytest.raises(NewerVersion, match="newer version"):
            Entry.from_json(json.dumps(newer))


def test_two_stores_entries_are_merged() -> None:
    here, there = entry_of(finding()), entry_of(finding(cases_to_find=2))
    old, young = (Answer(answer=word, date=date) for word, date in (("wrong", "2026-11-28"), ("right", "2026-11-29")))
    here = dataclasses.replace(here, state="reported", matrix={"a": {"x": old}}, notes=("mine",))
    there = dataclasses.replace(there, matrix={"a": {"x": young, "y": old}}, link="a link", notes=("theirs",))
    both = merged(here, there)
    assert both == dataclasses.replace(merged(there, here), notes=both.notes)
    assert (both.state, both.link, both.notes, len(both.seen)) == ("reported", "a link", ("mine", "theirs"), 2)
    assert both.matrix == {"a": {"x": young, "y": old}}
    assert merged(both, there) == both


# The ledger.


def test_the_same_bug_counts_up(store: Store) -> None:
    ledger = Ledger(store.folder)
    first = ledger.note(finding())
    assert ledger.note(finding()) == first
    larger = finding(Case(level="kernel", lengths=(2,), key_lengths=(5,)), cases_to_find=9)
    assert len(ledger.note(larger).seen) == 2
    # A smaller one of the same campaign comes in its place.
    assert len(ledger.note(finding(cases_to_find=11), instead_of=larger).seen) == 2
    assert list(ledger.written()) == [first.id]
    # What people wrote stays.
    ledger.write(dataclasses.replace(ledger.entry(first.id), state="confirmed", link="a link"))
    assert (ledger.note(larger).state, ledger.entry(first.id).link) == ("confirmed", "a link")


def test_findings_of_the_store_are_counted_once_each(store: Store) -> None:
    store.save(finding(Case(level="kernel", lengths=(5,)), same_as="0123456789"))
    ledger = Ledger(store.folder)
    for _ in range(2):
        ledger.note_all()
    assert [len(entry.seen) for entry in ledger.written().values()] == [1]
    # A folder in the store is none of its findings.
    assert len(store.identifiers()) == 2


def test_known_issues_and_limits_are_entries_without_files(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    entries = ledger.entries()
    assert set(entries) == {*(issue.id for issue in known.KNOWN), *(limit.id for limit in LIMITS)}
    assert {entry.found_by for entry in entries.values()} <= set(FOUND_BY)
    issue = known.KNOWN[0]
    entry = ledger.answered(issue.id, "torch 2.14", "a GPU", Answer(answer="right", date="2026-11-29"))
    # What the project says is said in one place, whatever a file has.
    stale = dataclasses.replace(entry, about="something old", state="fixed", version="9.20", notes=("mine",))
    ledger.write(stale)
    now = Ledger(tmp_path).entry(issue.id)
    assert (now.about, now.state_in_words, now.notes) == (issue.about, "fixed in 9.20", ("mine",))
    assert now.matrix["torch 2.14"]["a GPU"].answer == "right"
    assert {name: each for name, each in Ledger(tmp_path).entries().items() if name != issue.id} == {
        name: each for name, each in entries.items() if name != issue.id
    }


def test_what_the_project_knows_says_how_it_was_found_and_has_a_script(tmp_path: Path) -> None:
    for each in (*known.KNOWN, *LIMITS):
        assert each.found_by in set(FOUND_BY) - {"not recorded"}, each.id
        if each.script:
            assert (ROOT / "upstream" / "scripts" / each.script).is_file(), each.id
            assert Ledger(tmp_path).entry(each.id).link.endswith(f"; script: upstream/scripts/{each.script}")


def test_the_page_of_backends_has_what_the_code_says() -> None:
    assert backend_tables.page(backend_tables.PAGE.read_text()) == backend_tables.PAGE.read_text()


def test_a_script_of_a_limit_makes_the_call_as_people_write_it() -> None:
    free = registry.load("unrestricted:flash").kernel
    assert free.call_source == registry.load("flash").kernel.call_source != ""


def test_every_limit_is_of_a_backend_and_refused_there() -> None:
    for limit in LIMITS:
        backend = registry.load(limit.backend.removeprefix("unrestricted:"))
        # Or asked otherwise: with numbers in rows that are no document's.
        finite = backend.kernel.capabilities_on(limit.device).finite_rest
        refused = backend.refusal(limit.minimal, limit.device)
        assert finite or refused is not None, limit.id
        # For what the limit is about, and not for what the case has besides.
        assert ("kv_heads" in str(refused)) == ("grouped" in limit.id), (limit.id, refused)
        try:
            free = registry.load(limit.backend)
        except BackendUnavailable:
            continue
        assert free.refusal(limit.minimal, limit.device) is None, limit.id
        assert not free.kernel.capabilities_on(limit.device).finite_rest


def test_a_damaged_ledger_is_one_sentence_and_loses_nothing(store: Store) -> None:
    ledger = Ledger(store.folder)
    entry = ledger.note(finding())
    path = ledger.folder / f"{entry.id}.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(LedgerError, match=r"is damaged .*; delete it or restore it from a copy"):
        ledger.entries()
    with pytest.raises(StoreError, match="is damaged"):
        ledger.note(finding(cases_to_find=4))
    assert len(path.read_text()) == 50


# Commands.


def test_entries_are_edited_and_listed(store: Store, attn_fuzz: Run) -> None:
    identifier = Signature.of(finding()).id
    edits = ("--state", "fixed", "--version", "2.14", "--link", "https://example.org/1", "--note", "a word")
    done = attn_fuzz("ledger", identifier[:6], *edits, "--store", "store", "--json")
    assert done.status == 0, done.err
    entry = done.json
    assert (entry["state"], entry["version"], entry["link"]) == ("fixed", "2.14", "https://example.org/1")
    assert entry["notes"][0].endswith(": a word")
    listed = attn_fuzz("ledger", "--store", "store")
    assert "fixed in 2.14" in listed.out
    assert "known issue of" in listed.out
    assert "torch_efficient" in listed.out
    shown = attn_fuzz("ledger", identifier, "--store", "store")
    assert "link: https://example.org/1" in shown.out
    # Another state has no version.
    assert attn_fuzz("ledger", identifier, "--state", "confirmed", "--store", "store", "--json").json["version"] == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--state", "new"), "which entry"),
        (("nobody",), "no entry nobody"),
        (("limit", "--note", "a word"), "begins the ids of"),
        (("cudnn-masked", "--link", "elsewhere"), "known issue"),
        (("--take", "nowhere"), "no store nowhere"),
    ],
)
def test_a_ledger_asked_for_what_cannot_be_says_so(
    arguments: tuple[str, ...], said: str, store: Store, attn_fuzz: Run
) -> None:
    assert said in sentence(attn_fuzz("ledger", *arguments, "--store", "store"))


def test_another_stores_ledger_is_taken(store: Store, attn_fuzz: Run) -> None:
    other = Ledger(Path("other"))
    other.note(finding(cases_to_find=5))
    other.note(finding(backend="another"))
    done = attn_fuzz("ledger", "--take", "other", "--store", "store", "--json")
    seen = {each["signature"]["backend"]: len(each["seen"]) for each in done.json["entries"] if each["seen"]}
    assert seen == {"kernel.py:kernel": 2, "another": 1}


def test_entries_are_run_again(store: Store, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_fuzz.campaign.retest.Isolated", InThisProcess)
    done = attn_fuzz("retest", "--store", "store", "--device", "cpu", "--json")
    assert done.status == 1, done.err
    answers = {each["id"]: each for each in done.json["entries"]}
    identifier = Signature.of(finding()).id
    assert answers.pop(identifier)["answer"] == "wrong"
    assert {each["answer"] for each in answers.values()} == {"not run"}
    # No file for what did not run.
    assert list(Ledger(store.folder).written()) == [identifier]
    attn_fuzz("ledger", identifier, "--state", "fixed", "--version", "1", "--store", "store")
    again = attn_fuzz("retest", identifier, "--store", "store", "--device", "cpu")
    assert "was fixed in 1, and is wrong again" in again.err
    assert again.out.count("otherwise") == 0
    Path("kernel.py").write_text(OTHERWISE)
    (other,) = attn_fuzz("retest", identifier, "--store", "store", "--device", "cpu", "--json").json["entries"]
    assert other["answer"] == "wrong"
    assert other["why"].startswith("otherwise than it did (")
    Path("kernel.py").write_text(RIGHT)
    attn_fuzz("ledger", identifier, "--state", "reported", "--store", "store")
    mended = attn_fuzz("retest", identifier, "--store", "store", "--device", "cpu")
    assert (mended.status, "is right here" in mended.err) == (0, True)
    ((answer,),) = (devices.values() for devices in Ledger(store.folder).entry(identifier).matrix.values())
    assert answer.answer == "right"
    Path("kernel.py").unlink()
    gone = attn_fuzz("retest", identifier, "--store", "store", "--device", "cpu", "--json")
    assert gone.status == 3
    assert gone.json["entries"][0]["answer"] == "not run"
    # What did not run says nothing against what did.
    assert Ledger(store.folder).entry(identifier).matrix


def test_an_interruption_tells_what_was_answered(store: Store, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[str] = []

    def once(entry: Entry, *rest: object) -> Answer:
        if answered:
            raise KeyboardInterrupt
        answered.append(entry.id)
        return Answer(answer="wrong", date="2026-11-30")

    monkeypatch.setattr("attn_fuzz.campaign.retest.retested", once)
    monkeypatch.setattr("attn_fuzz.campaign.retest.place_of", lambda *_: "cpu")
    done = attn_fuzz("retest", "--store", "store", "--device", "cpu", "--json")
    assert done.status == 130
    assert [each["id"] for each in done.json["entries"]] == answered
    assert "interrupted: " in done.err
    assert Ledger(store.folder).entry(answered[0]).matrix


@pytest.mark.slow
def test_scripts_are_kept_and_run_again(
    store: Store, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("attn_fuzz.campaign.retest.Isolated", InThisProcess)
    identifier = Signature.of(finding()).id
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    command = ("retest", identifier, "--scripts", "--store", "../store", "--device", "cpu", "--json")
    assert attn_fuzz(*command).json["entries"][0]["script"] == "wrong"
    script = (tmp_path / "store" / "ledger" / f"{identifier}.py").read_text()
    assert 'runpy.run_path("kernel.py")' in script
    assert str(tmp_path) not in script


def test_a_script_is_kept_where_there_is_no_ledger_yet(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(WRONG)
    path = keep_script(entry_of(finding(backend=f"{tmp_path}/kernel.py:kernel")), tmp_path / "new", "cpu")
    assert path is not None
    assert "the fault is" in path.read_text()


@pytest.mark.parametrize(
    ("found_on", "asked", "place"),
    [("cpu", None, "cpu"), ("cpu", "cpu", "cpu"), ("cpu", "cuda", None), ("cuda", "cpu", None), ("cuda", None, None)],
)
def test_an_entry_is_run_where_it_was_found(
    found_on: str, asked: str | None, place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert place_of(entry_of(finding(device=found_on)), asked) == place
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert place_of(entry_of(finding(device="cuda:1")), "cuda:1") == "cuda:1"


def test_a_campaign_counts_what_it_keeps(store: Store) -> None:
    """Once, also where a smaller case comes in the place of a larger one."""
    keeper = Keeper(store)
    keeper.keep(finding(Case(level="kernel", lengths=(2,), key_lengths=(5,)), cases_to_find=9))
    keeper.keep(finding(cases_to_find=11))
    (entry,) = Ledger(store.folder).written().values()
    assert [time.rpartition(": ")[2] for time in entry.seen] == [f"{finding().id} after 11 cases and 0.5 s"]
