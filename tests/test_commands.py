"""What commands print, keep and end with when they can do what was asked, and when the store cannot."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from commandline import CASE, FOUND, SWAPPED, Run, sentence, write

from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.pool import Outcome
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.store import Store
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.case_format import FORMAT

FINDING = dataclasses.replace(FOUND, original_case=Case(level="kernel", lengths=(3, 4)), environment={})


# Results.

NOISY = """
import torch

print("imported")


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    print("called")
    return q * 1.0


kernel.capabilities = {"gqa": False, "dtypes": ["fp32"]}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_campaign_without_findings_ends_with_0(attn_fuzz: Run) -> None:
    options = ("--device", "cpu", "--cases", "4", "--level", "kernel", "--dtype", "fp32", "--workers", "1", "--json")
    done = attn_fuzz("run", "--backend", "loop", "--mode", "case", *options)
    assert done.status == 0, done.err
    assert done.json["cases"] == 4
    assert done.json["documents"] >= 4
    assert done.json["seconds"] > 0
    assert done.json["findings"] == []
    assert done.json["backends"]["loop"]["by_kind"] == {"kernel fp32": 4}


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_after_a_clean_campaign_the_next_step_is_named(attn_fuzz: Run) -> None:
    options = ("--device", "cpu", "--cases", "2", "--level", "kernel", "--dtype", "fp32", "--workers", "1")
    done = attn_fuzz("run", "--backend", "loop", "--mode", "case", *options)
    assert done.status == 0, done.err
    assert "next: attn-fuzz check FILE.py:FUNCTION" in done.out


@pytest.mark.slow
def test_a_finding_ends_with_1_and_is_stored(attn_fuzz: Run) -> None:
    """The kernel prints, too: nothing of that may come between the command and a reader of its JSON."""
    write("noisy.py", NOISY)
    options = ("--device", "cpu", "--cases", "10", "--level", "kernel", "--workers", "1", "--first", "--json")
    done = attn_fuzz("check", "noisy.py:kernel", "--mode", "case", *options)
    assert done.status == 1, done.err
    assert "called" in done.err
    (finding,) = done.json["findings"]
    assert finding["backend"] == "noisy.py:kernel"
    assert finding["checks"]
    assert Case.from_dict(finding["case"]).tokens <= Case.from_dict(finding["original_case"]).tokens
    assert 1 <= finding["cases_to_find"] <= 10
    assert finding["seconds_to_find"] >= 0
    assert Store(Path(".attn-fuzz/findings")).load(finding["id"]).to_dict() == finding
    replayed = attn_fuzz("replay", finding["id"], "--json")
    assert replayed.status == 1
    assert replayed.json["case"] == finding["case"]
    assert replayed.json["backends"][0]["checks"] == finding["checks"]


def test_what_was_found_on_a_cpu_is_replayed_there(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("findings").mkdir()
    Store(Path("findings")).save(FINDING)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    done = attn_fuzz("replay", FINDING.id, "--store", "findings", "--json")
    assert done.status == 1
    assert done.json["device"] == "cpu"
    assert [told["name"] for told in done.json["backends"]] == [SWAPPED]


def test_a_clean_replay_ends_with_0(attn_fuzz: Run) -> None:
    done = attn_fuzz("replay", CASE, "--backend", "loop", "--device", "cpu", "--json")
    assert done.status == 0
    (verdict,) = done.json["backends"]
    assert (verdict["name"], verdict["checks"], verdict["messages"]) == ("loop", [], [])


def test_refusals_beside_verdicts_are_told(attn_fuzz: Run) -> None:
    done = attn_fuzz("replay", CASE, "-b", "legacy:loop", "-b", "loop", "--device", "cpu", "--json")
    assert done.status == 0
    assert "kernel cases" in done.json["backends"][0]["refused"]


def test_backends_are_json(attn_fuzz: Run) -> None:
    listed = {backend["name"]: backend for backend in attn_fuzz("backends", "--json").json["backends"]}
    assert listed["loop"]["available"]
    assert listed["loop"]["reason"] is None
    flash = next(b for b in attn_fuzz("backends", "--device", "cpu", "--json").json["backends"] if b["name"] == "flash")
    assert not flash["available"]
    assert "cuda" in flash["reason"]


def test_a_script_is_all_that_is_printed(attn_fuzz: Run) -> None:
    done = attn_fuzz("script", CASE, "--backend", SWAPPED, "--device", "cpu")
    compile(done.out, "script", "exec")


@pytest.mark.slow
def test_a_finding_that_ends_its_process_is_replayed_in_another(attn_fuzz: Run) -> None:
    write("dies.py", "import os\n" + NOISY.replace('print("called")', "os._exit(0)"))
    store = Store(Path("store"))
    store.prepare()
    case = FINDING.case.replace(causal=False)
    died = dataclasses.replace(FINDING, backend="dies.py:kernel", symptom="Crashed", case=case)
    store.save(died)
    done = attn_fuzz("replay", died.id, "--store", "store", "--device", "cpu", "--json")
    assert done.status == 1, done.err
    (verdict,) = done.json["backends"]
    assert verdict["checks"] == ["runs"]
    assert "the process died" in verdict["messages"][0]
    # Kept, it is known to do that, and a script of it is refused.
    assert attn_fuzz("save", died.id, "dead", "--store", "store").status == 0
    assert json.loads(Path("tests/regressions/dead.json").read_text())["symptom"] == "Crashed"
    kept = attn_fuzz("replay", "dead", "--device", "cpu", "--json")
    assert kept.status == 1, kept.err
    assert kept.json["backends"] == done.json["backends"]
    for name in (died.id, "dead"):
        printed = attn_fuzz("script", name, "--store", "store", "--device", "cpu")
        assert printed.status == 0, printed.err
        compile(printed.out, "script", "exec")
        assert "Crashed" in printed.out


# Seeds.


def test_a_finding_becomes_a_seed_that_convicts(attn_fuzz: Run) -> None:
    store = Store(Path("store"))
    store.prepare()
    store.save(FINDING)
    assert attn_fuzz("save", FINDING.id, "swapped", "--about", "why", "--store", "store").status == 0
    assert json.loads(Path("tests/regressions/swapped.json").read_text()) == {
        "format": FORMAT,
        "about": "why",
        "case": FINDING.case.to_dict(),
        "backend": SWAPPED,
        "device": "cpu",
        "symptom": FINDING.symptom,
    }
    assert attn_fuzz("replay", "swapped", "--device", "cpu").status == 1
    assert "choose another name" in sentence(attn_fuzz("save", CASE, "swapped"))


def test_a_seed_convicts_no_backend_that_does_not_exist(attn_fuzz: Run) -> None:
    assert "unknown backend 'flesh'" in sentence(attn_fuzz("save", CASE, "kept", "--expect-failure", "flesh"))
    assert not Path("tests").exists()


# The store.


def test_an_unknown_finding_makes_no_store(attn_fuzz: Run) -> None:
    assert "it holds none" in sentence(attn_fuzz("replay", "0123456789", "--store", "mistyped"))
    assert not Path("mistyped").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"case": {}', "[" * 100_000, '{"backend": "loop"}'])
def test_a_damaged_finding_is_one_sentence(text: str, attn_fuzz: Run) -> None:
    Path("store").mkdir()
    write("store/0123456789.json", text)
    assert "is damaged" in sentence(attn_fuzz("replay", "0123456789", "--store", "store"))


def test_a_file_in_the_place_of_the_store_is_one_sentence(attn_fuzz: Run) -> None:
    write("store", "mine")
    assert "choose another with --store" in sentence(attn_fuzz("run", "-b", "loop", "--cases", "1", "--store", "store"))
    assert Path("store").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_full_store_loses_nothing(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store fills up while the campaign runs: what it held stays, and what was found is printed."""
    store = Store(Path("store"))
    store.prepare()
    before = store.save(FINDING).read_text()

    def full(path: Path, text: str) -> int:
        path.open("w").write(text[: math.ceil(len(text) / 2)])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    options = ("--device", "cpu", "--cases", "20", "--level", "kernel", "--workers", "1", "--first", "--json")
    done = attn_fuzz("run", "-b", SWAPPED, *options, "--store", "store")
    assert done.status == 2
    assert done.json["findings"]
    assert "No space left on device" in done.err.splitlines()[-1]
    assert [path.name for path in Path("store").iterdir()] == [f"{FINDING.id}.json"]
    assert store.load(FINDING.id) == FINDING
    assert (Path("store") / f"{FINDING.id}.json").read_text() == before


def stored(*findings: Finding) -> None:
    store = Store(Path("store"))
    store.prepare()
    for age, finding in enumerate(findings):
        os.utime(store.save(finding), (1e9 - age, 1e9 - age))


OTHER = dataclasses.replace(FINDING, symptom="WrongOutput")


def test_findings_are_listed_newest_first(attn_fuzz: Run) -> None:
    stored(OTHER, FINDING)
    done = attn_fuzz("list", "--store", "store", "--json")
    assert done.status == 0
    assert [finding["id"] for finding in done.json["findings"]] == [OTHER.id, FINDING.id]
    text = attn_fuzz("list", "--store", "store").out
    assert text.index(OTHER.id) < text.index(FINDING.id)
    assert "there is no store elsewhere" in sentence(attn_fuzz("list", "--store", "elsewhere"))


def test_what_cannot_be_read_is_said_beside_the_rest(attn_fuzz: Run) -> None:
    stored(FINDING)
    write("store/0123456789.json", "{}")
    done = attn_fuzz("list", "--store", "store", "--json")
    assert done.status == 2
    assert [finding["id"] for finding in done.json["findings"]] == [FINDING.id]
    assert "0123456789.json is damaged" in done.err


def test_a_finding_is_shown_by_the_beginning_of_its_id(attn_fuzz: Run) -> None:
    stored(FINDING, OTHER)
    done = attn_fuzz("show", FINDING.id[:6], "--store", "store", "--json")
    assert done.json == FINDING.to_dict()
    text = attn_fuzz("show", FINDING.id[:6], "--store", "store").out
    assert "WrongGradK [budget] dk: wrong" in text
    assert f"drawn as: {FINDING.original_case.to_json()}" in text
    assert "it holds" in sentence(attn_fuzz("show", "nothing", "--store", "store"))


def test_a_beginning_of_several_ids_names_none(attn_fuzz: Run) -> None:
    stored(FINDING)
    write(f"store/{FINDING.id[:6]}0000.json", "{}")
    assert "begins the ids of 2 findings" in sentence(attn_fuzz("show", FINDING.id[:6], "--store", "store"))


def test_a_finding_of_a_newer_version_is_not_called_damaged(attn_fuzz: Run) -> None:
    stored(FINDING)
    write(f"store/{FINDING.id}.json", json.dumps(FINDING.to_dict() | {"colour": "red"}))
    said = sentence(attn_fuzz("show", FINDING.id, "--store", "store"))
    assert "the finding was written by a newer version (it has 'colour'); upgrade attn-fuzz" in said


# Nothing tested is no pass.

QUICK = ("--device", "cpu", "--workers", "1", "--level", "kernel")


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_too_few_cases_are_no_pass(attn_fuzz: Run) -> None:
    done = attn_fuzz("run", "-b", "loop", "--mode", "case", "--cases", "2", "--min-cases", "3", *QUICK, "--json")
    assert done.status == 3
    assert done.json["findings"] == []
    assert done.err.splitlines()[-1] == "attn-fuzz: loop was tested with 2 cases, fewer than the 3 of --min-cases"


def test_an_interrupted_campaign_is_no_pass(attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(tallies={"loop": Tally(cases=7)}, findings=[], seconds=1.0, interrupted=True, troubles=())
    monkeypatch.setattr("attn_fuzz.cli.campaigns.Pool", lambda *_: SimpleNamespace(run=lambda: outcome))
    done = attn_fuzz("run", "-b", "loop", "--cases", "9", *QUICK, "--json")
    assert done.status == 3
    assert done.err.splitlines()[-1] == "attn-fuzz: interrupted after 7 cases, so the campaign is no pass"


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_what_was_named_and_could_not_be_asked_is_no_pass(attn_fuzz: Run) -> None:
    kernels = ("--cases", "12", *QUICK)
    done = attn_fuzz("run", "-b", "loop", "--ask", "compiled-alike", *kernels)
    assert done.status == 3
    assert "no case that was drawn could be asked compiled-alike" in done.err
    # Without an LSE there is nothing to merge by.
    done = attn_fuzz("run", "-b", "backup", "--ask", "parts-merge", *kernels)
    assert done.status == 3
    assert "no case that was drawn could be asked parts-merge" in done.err
    assert attn_fuzz("run", "-b", "loop", "--ask", "parts-merge", *kernels).status == 0
    assert attn_fuzz("run", "-b", "loop", "--ask", "same-in-company", "--ask", "rows-counted", *kernels).status == 0
