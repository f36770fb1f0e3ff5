"""Reports: one file with everything in it; pictures mark what is wrong, near misses say what passes."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Run, sentence
from in_turn import InThisProcess

from attn_fuzz.backends import registry
from attn_fuzz.findings.entry import Answer
from attn_fuzz.findings.finding import Finding, FindingError
from attn_fuzz.findings.ledger import Ledger, entry_of
from attn_fuzz.findings.store import Store
from attn_fuzz.reference.case import Case
from attn_fuzz.reports import pictures
from attn_fuzz.reports.failing_set import FailingSet, failing_set
from attn_fuzz.reports.measured import Counted, Measured, Piece, of_verdicts
from attn_fuzz.reports.near_misses import answered, neighbours
from attn_fuzz.reports.page import page
from attn_fuzz.reports.told import Told

ROOT = Path(__file__).resolve().parent.parent
KERNEL = (ROOT / "examples" / "my_kernel.py").read_text()
WRONG = KERNEL.replace("mask.tril(ke - kb - (qe - qb))", "mask.tril()")
CASE = Case(level="kernel", lengths=(2, 2), key_lengths=(2, 3), heads=2, head_dim=4)


class Page(HTMLParser):
    """What of a page a browser would fetch, and whether its tags close."""

    EMPTY = frozenset({"meta", "br", "rect", "line", "polyline", "text"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fetched += [str(given[name]) for name in ("src", "srcset", "data") if name in given]
        self.fetched += [str(given["href"]) for _ in "l" if tag == "link"]
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def finding(**changes: Any) -> Finding:
    plain = Finding(
        backend="kernel.py:kernel",
        device="cpu",
        symptom="WrongOutput",
        checks=("budget",),
        messages=("WrongOutput [budget] out: <b>wrong</b>",),
        symptoms=({"symptom": "WrongOutput", "check": "budget", "tensor": "out"},),
        case=Case(level="kernel", lengths=(1,), key_lengths=(2,), head_dim=1),
        original_case=Case(level="kernel", lengths=(5, 7), key_lengths=(9, 7), head_dim=8, seed=4),
        cases_to_find=17,
        seconds_to_find=0.5,
    )
    return dataclasses.replace(plain, **changes)


MEASURED = Measured(
    (Counted("loop", 10, 20, 1, 2, 4.5, "kernel fp32 dq", {"kernel fp32": 10}),),
    {("loop", "fp32 dq"): [40, 10, 3, *[0] * 20, 1]},
    {"loop": {(0, 1): 3, (1, 1): 5, (1024, 2048): 1}},
    (Piece(0.0, 5.0, "loop", 100), Piece(4.0, 6.0, "flash", 30)),
    12.5,
    ("device a CPU",),
)


def test_the_failing_set_is_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(WRONG)
    found = failing_set(CASE, registry.load(f"{tmp_path / 'kernel.py'}:kernel"), torch.device("cpu"))
    assert found is not None
    # Top-left and bottom-right are the same where there is no past.
    assert found.wrong["out"].flatten(1).any(1).tolist() == [False, False, True, True]
    assert found.wrong["dv"].flatten(1).any(1).tolist() == [False, False, True, True, True]
    assert found.seen().tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [False, False, True, True, False],
        [False, False, True, True, True],
    ]
    assert failing_set(CASE, registry.load("loop"), torch.device("cpu")) is None


def test_the_failing_set_of_a_layer_has_one_head(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "my_layer.py").read_text().replace("(key <= row[:, None])", "(key <= row[:, None] + 1)")
    (tmp_path / "layer.py").write_text(text)
    case = Case(lengths=(3,), cuts=(2,), head_dim=4, hidden=4)
    found = failing_set(case, registry.load(f"layer:{tmp_path / 'layer.py'}:Layer"), torch.device("cpu"))
    assert found is not None
    assert found.wrong["out"].shape == (3, 1, 4)
    # The last row of each micro-sequence has no next key yet.
    assert found.wrong["out"].any(2).flatten().tolist() == [True, False, False]


def failing(case: Case, **rows: list[int]) -> FailingSet:
    """A failing set with these rows wrong in their first channel."""
    wrong = {}
    for name in ("out", "dk"):
        tokens = sum(case.packed_key_lengths if name == "dk" else case.packed_lengths)
        wrong[name] = torch.zeros(tokens, case.heads, case.head_dim, dtype=torch.bool)
        wrong[name][rows.get(name, []), :, 0] = True
    return FailingSet(case, wrong)


def test_a_picture_marks_wrong_rows_and_keys() -> None:
    drawn = pictures.where_it_fails(failing(CASE, out=[3], dk=[0, 4]))
    marks = re.findall(r'<rect class="wrong"[^>]*><title>([^<]*)</title>', drawn)
    assert marks == ["out, row 3", "dk, key 0", "dk, key 4"]
    assert drawn.count('class="seen"') == 8
    assert "document 1: 2 rows, 3 keys" in drawn
    # Only what is wrong has marks.
    assert "dk, key" not in pictures.where_it_fails(failing(CASE, out=[3]))


def test_a_picture_of_thousands_of_rows_is_small() -> None:
    case = Case(level="kernel", lengths=(3000, 40), head_dim=1)
    drawn = pictures.where_it_fails(failing(case, out=[2999]))
    assert len(drawn) < 1_000_000
    assert drawn.count('class="wrong"') == 1


def test_heads_and_channels_are_marked_by_their_share_of_rows() -> None:
    found = failing(CASE, out=[0, 1, 2, 3], dk=[0])
    assert 'fill-opacity="1.00"><title>out, head 0, channel 0: 100% of rows wrong' in pictures.heads_and_channels(
        found, "out"
    )
    drawn = pictures.heads_and_channels(found, "dk")
    assert re.findall(r"<title>([^<]*)</title>", drawn) == [
        f"dk, head {head}, channel 0: 20% of rows wrong" for head in range(2)
    ]


def test_near_misses_differ_in_one_respect_and_can_be() -> None:
    case = CASE.replace(window=(1, -1), softcap=3.0, dtype="bf16")
    found = {each.words: each.case for each in neighbours(case)}
    assert found["one more token"].lengths == (3, 2)
    assert found["one more token"].key_lengths == (3, 3)
    assert found["one less key"].key_lengths == (1, 3)
    assert found["no window"] == case.replace(window=(-1, -1))
    assert found["fp32"].dtype == "fp32"
    assert "bf16" not in found
    assert "causal" not in found
    assert "no cuts" not in found
    assert len({each.to_json() for each in found.values()}) == len(found)
    layer = {each.words for each in neighbours(Case(lengths=(2,), cuts=(1,)))}
    assert {"no cuts", "one more token"} <= layer
    assert "one less token" not in layer  # it would be cut at its end


def test_near_misses_that_pass_come_first() -> None:
    told = answered(CASE, lambda case: "right" if case.heads == 1 else "refused: so" if case.softcap else "WrongOutput")
    assert [each.words for each in told if each.right] == ["one head"]
    assert told[0].right


def test_verdicts_are_added_up() -> None:
    tally = {"cases": 3, "documents": 5, "refused": 1, "by_kind": {"kernel fp32": 3}, "histograms": {"fp32 dq": [2, 1]}}
    small = {"seconds": 2.0, "backends": {"loop": {**tally, "known": {"x": 2}, "worst_z": {"kernel fp32 dq": 3.5}}}}
    both = of_verdicts([small, {"seconds": 1.0, "backends": {"loop": tally}, "environment": {"torch": "2.13"}}])
    assert both.backends == (Counted("loop", 6, 10, 2, 2, 3.5, "kernel fp32 dq", {"kernel fp32": 6}),)
    assert both.histograms == {("loop", "fp32 dq"): [4, 2]}
    assert (both.seconds, both.cases, both.environments) == (3.0, 6, ("", "torch 2.13"))
    for wrong in ({}, {"backends": []}, {"backends": {"loop": 3}, "seconds": 1}, 3):
        with pytest.raises(FindingError, match="no verdict of a campaign"):
            of_verdicts([wrong])  # type: ignore[list-item]


def test_a_page_needs_nothing_else_and_escapes_what_kernels_say(tmp_path: Path) -> None:
    matrix = {"torch 2.13": {"a <CPU>": Answer(answer="wrong", date="2026-11-29")}}
    entry = dataclasses.replace(entry_of(finding()), matrix=matrix, link="https://example.org/7")
    near = tuple(answered(entry.case, lambda case: "right" if case.causal else "refused: <no>"))
    drawn = (pictures.where_it_fails(failing(CASE, out=[3])),)
    bug = Told(
        entry, entry.about, finding().original_case, "17 cases", 2, 3, drawn, "import torch  # <script>", "", near
    )
    known = [each for each in Ledger(tmp_path).entries().values() if each.kind != "finding"]
    text = page("a title", "made today", [bug, Told(entry, "another")], known, MEASURED)
    seen = Page(text)
    assert (seen.fetched, seen.wrong, seen.open) == ([], [], [])
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert "&lt;b&gt;wrong&lt;/b&gt;" in text
    assert "a &lt;CPU&gt;" in text
    assert "prefers-color-scheme: dark" in text
    for section in ("overview", "bugs", "known", "errors", "coverage", "throughput"):
        assert section in seen.ids
        assert f'href="#{section}"' in text
    assert "fails in 2 of 3 runs" in text
    assert all(each.id in text for each in known)
    assert "<td>head_dim</td><td>8</td><td>1</td>" in text
    # Every class that a picture has is one of the style sheet.
    style, body = text.split("</style>")
    for name in {
        word for each in re.findall(r'<(?:rect|line|polyline) class="([^"]*)"', body) for word in each.split()
    }:
        assert f".{name} " in style, name
    empty = page("a title", "made today", [], known, Measured())
    assert "None." in empty
    assert 'id="errors"' not in empty


def test_a_store_becomes_a_page(tmp_path: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("campaign.retest", "reports.told"):
        monkeypatch.setattr(f"attn_fuzz.{module}.Isolated", InThisProcess)
    Path("kernel.py").write_text(WRONG)
    store = Store(Path("store"))
    store.prepare()
    store.save(store.placed(finding()))
    store.save(store.placed(finding(backend="gone.py:kernel")))
    Path("run.json").write_text(json.dumps({"seconds": 1.0, "backends": {}}))
    options = ("--store", "store", "--device", "cpu", "--repeat", "1")
    done = attn_fuzz("report", *options, "--verdict", "run.json", "--output", "page.html")
    assert (done.status, done.out) == (0, "page.html: 2 bugs\n"), done.err
    text = Path("page.html").read_text()
    assert "fails in 1 of 1 runs" in text
    assert "out, row 0</title>" in text
    assert "neighbours pass" in text
    assert "Exit status 1 while the fault is there" in text
    assert "gone.py cannot be imported" in text
    # Nothing is run.
    attn_fuzz("report", "--store", "store", "--repeat", "0", "--output", "page.html")
    assert "runs</span>" not in Path("page.html").read_text()
    assert "no verdict" in sentence(attn_fuzz("report", "--verdict", "kernel.py", "--store", "store"))
    assert "cannot be written" in sentence(attn_fuzz("report", "--store", "none", "--output", "no/page.html"))


def test_what_has_just_begun_when_all_ends_is_in_the_picture() -> None:
    """As of a campaign that is killed: such a piece lies behind the last bin."""
    pieces = [Piece(0.0, 60.0, "loop", 600), Piece(60.0, 0.0, "loop", 5)]
    assert "10" in pictures.throughput(pieces, ["loop"])
