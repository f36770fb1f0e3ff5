"""The table of axes: each row is a question or a value that some backend takes, and what cannot be done is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attn_fuzz.backends.kernel import Capabilities, UnsupportedCase
from attn_fuzz.batch.judge import schedule_on
from attn_fuzz.campaign.calls_worker import CallsWorker
from attn_fuzz.campaign.messages import Assignment, Finished, Message
from attn_fuzz.coverage.axes import ASKED, PLACES
from attn_fuzz.evaluation import axes
from attn_fuzz.evaluation.axes import Earlier, by_number, jobs
from attn_fuzz.evaluation.axes_rows import ROWS


def test_rows_are_of_values_and_questions_that_there_are() -> None:
    questions = {question.asked for question in schedule_on("cuda")}
    for row in ROWS:
        assert row.aim or row.asked
        assert all(value in PLACES for value in row.aim)
        assert row.asked in ({*ASKED} if row.mode == "case" else {*questions, ""})


def test_each_backend_is_asked_what_it_takes_or_it_is_said_why_not() -> None:
    names = ("loop", "backup", "sdpa_dense")
    found, refused = jobs(ROWS, names, "cpu", 2, cases=50, seconds=5.0)
    told = {(job.label, job.backend) for job in found} | {*refused}
    assert told == {(row.name, name) for row in ROWS for name in names}
    assert len(found) + len(refused) == len(told)
    assert {name for name, _ in refused} >= {"CUDA graphs", "streams"}
    assert "it is not declared" in refused["gradient through the LSE", "backup"]
    assert {job.cases for job in found if not job.asked} == {50}
    assert all((job.cases or 0) > 50 for job in found if job.asked and job.mode == "batch")
    assert all(job.aim for job in found if not job.asked)


def test_what_earlier_runs_had_is_not_run_again(tmp_path: Path) -> None:
    rows, names = [ROWS[2], ROWS[10]], ("loop", "backup")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps({"axes": {ROWS[2].name: {"loop": {"asked": 30}, "backup": {"asked": 50}}}}))
    second.write_text(json.dumps({"axes": {ROWS[2].name: {"loop": {"asked": 5}}, ROWS[10].name: {}}}))
    all_of_it, _ = jobs(rows, names, "cpu", 2, 50, 5.0)
    left, _ = jobs(rows, names, "cpu", 2, 50, 5.0, Earlier.read([first, second]))
    before, now = ({(job.label, job.backend): job for job in some} for some in (all_of_it, left))
    assert {*before} - {*now} == {(ROWS[2].name, "backup")}
    assert now[ROWS[2].name, "loop"].cases == 15
    assert now[ROWS[10].name, "loop"].cases == before[ROWS[10].name, "loop"].cases
    assert not {job.seed for job in now.values()} & {job.seed for job in before.values()}


def test_what_takes_long_is_shared_by_several_and_begins_first(tmp_path: Path) -> None:
    had = tmp_path / "had.json"
    slow = {"asked": 10, "seconds": 20.0}
    had.write_text(json.dumps({"axes": {ROWS[2].name: {"backup": slow, "loop": {"asked": 10, "seconds": 1.0}}}}))
    found, _ = jobs([ROWS[2]], ("loop", "backup"), "cpu", 2, 40, 30.0, Earlier.read([had]))
    assert [(job.backend, job.cases) for job in found] == [("backup", 15), ("backup", 15), ("loop", 30)]
    assert len({job.seed for job in found if job.backend == "backup"}) == 2


def test_what_nothing_is_known_of_begins_with_what_takes_longest(tmp_path: Path) -> None:
    had = tmp_path / "had.json"
    had.write_text(json.dumps({"axes": {ROWS[2].name: {"loop": {"asked": 10, "seconds": 1.0}}}}))
    found, _ = jobs([ROWS[2]], ("loop", "backup"), "cpu", 2, 40, 30.0, Earlier.read([had]))
    assert [job.backend for job in found] == ["backup", "loop"]


def test_a_question_that_could_not_be_put_is_not_put_again(tmp_path: Path) -> None:
    row, files = ROWS[1], []
    for number, (cases, asked) in enumerate([(6000, 0), (5000, 3), (20, 0), (0, 0)]):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps({"axes": {row.name: {"loop": {"asked": asked, "cases": cases}}}}))

    def refused(*some: int) -> dict[tuple[str, str], str]:
        return jobs([row], ("loop",), "cpu", 2, 40, 30.0, Earlier.read([files[n] for n in some]))[1]

    told = {(row.name, "loop"): "none of 6,000 calls could be asked"}
    assert refused(0) == refused(0, 3) == told
    # Of a few calls that may have been chance, and the code is another one since. Files are taken by their numbers.
    assert refused(0, 1) == refused(1, 0) == refused(2) == refused(3) == {}
    assert [path.name for path in sorted(map(Path, ("a_10", "a_2", "a_1")), key=by_number)] == ["a_1", "a_2", "a_10"]


@pytest.mark.parametrize("stated", [{"compiles": True}, {"layouts": 4}])
def test_of_what_compiles_calls_are_drawn_that_can_be_asked(stated: dict[str, Any]) -> None:
    for row in ROWS:
        assert row.aim_of(Capabilities()) == row.aim
        assert row.aim_of(Capabilities(**stated)) == (*row.aim, *row.of_compiled)
        # One axis has one value in all of them.
        assert not {axis for axis, _ in row.aim} & {axis for axis, _ in row.of_compiled}
    assert {row.asked for row in ROWS if row.of_compiled} == {"merging", "company"}


def test_nothing_left_to_run_is_said(tmp_path: Path) -> None:
    had = tmp_path / "had.json"
    had.write_text(json.dumps({"axes": {ROWS[2].name: {"loop": {"asked": 40}}}}))
    with pytest.raises(SystemExit, match="nothing left to run: all that is taken has had 40 cases"):
        axes.main(["loop"], [ROWS[2].name], "cpu", 40, 30.0, 2, [had])


def test_what_is_no_earlier_table_is_said() -> None:
    with pytest.raises(SystemExit, match="is no table of axes"):
        axes.main(["loop"], [ROWS[2].name], "cpu", 40, 30.0, 2, [Path(__file__)])


@pytest.mark.slow
def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ROWS[0].name, "gaps between documents", "alone and in company"]
    with pytest.raises(SystemExit) as ended:
        axes.main(["loop"], rows, "cpu", 40, 30.0, 2)
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["axes"]) == set(rows)
    for row in told["axes"].values():
        assert row["loop"]["asked"] >= 25
        assert 0.0 < row["loop"]["largest_z"] < 10.0


@pytest.mark.slow
def test_a_finding_says_in_which_rows_it_came_up(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ROWS[0].name, "gaps between documents"]
    with pytest.raises(SystemExit) as ended:
        # Of documents of five tokens something is wrong.
        axes.main(["trigger:5,5:loop"], rows, "cpu", 400, 30.0, 2)
    assert ended.value.code == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert findings
    assert {row for finding in findings for row in finding["rows"]} <= set(rows)
    assert all(finding["rows"] for finding in findings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((None, ["gradients"], "cpu"), "no such row: 'gradients'; there are: gradient through the LSE"),
        ((["lop"], None, "cpu"), "lop"),
        ((["flash"], None, "cpu"), "flash cannot run on cpu here"),
        ((None, None, "tpu"), "unknown device 'tpu'"),
        ((["backup"], ["gaps between documents"], "cpu"), "none of backup takes any of that: .* it is not declared"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(arguments: tuple[list[str] | None, ...], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        axes.main(*arguments, 40, 30.0, 2)  # type: ignore[arg-type]


def test_a_batch_that_there_is_no_memory_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(worker: CallsWorker, *rest: object) -> None:
        raise UnsupportedCase("memory far_rows asks for 69 GiB, but 12 are free")

    monkeypatch.setattr(CallsWorker, "judge", none)
    messages: list[Message] = []
    job = Assignment(backend="loop", device="cpu", seed=0, levels=("kernel",), cases=8, mode="batch")
    CallsWorker(job, messages.append).run()
    assert isinstance(messages[-1], Finished)
    assert messages[-1].tally.cases == 0
    assert messages[-1].tally.refused > 50
    assert messages[-1].tally.why_refused == "memory far_rows asks for 69 GiB, but 12 are free"
