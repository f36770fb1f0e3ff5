"""Campaigns outlive their workers, and lose nothing that those had found."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hunts import finding_of

from attn_fuzz.backends import registry
from attn_fuzz.campaign import inquest, pool, watch, witnesses
from attn_fuzz.campaign.isolated import Isolated, NoDevice, Report, Subject, report_of
from attn_fuzz.campaign.messages import Assignment, Candidate, Finished, Found, Message, Tally, Trying
from attn_fuzz.campaign.plan import CampaignOptions, plan, share_of_time
from attn_fuzz.campaign.pool import CampaignError, Outcome, Pool
from attn_fuzz.findings.finding import Finding
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reduction.minimise import minimise
from attn_fuzz.reference.case import Case

EXAMPLE = (Path(__file__).resolve().parent.parent / "examples" / "my_kernel.py").read_text()
CASE = Case(level="kernel", lengths=(3, 2), head_dim=2)
SMALL = CASE.replace(lengths=(1, 1))

# What a kernel does before it computes. HERE is its folder.
DIES_SPEAKING = """
    if not (HERE / "died").exists():
        (HERE / "died").touch()
        for pipe in [thing for thing in gc.get_objects() if isinstance(thing, Connection) and thing.writable]:
            # A message of five bytes, of which two arrive.
            os.write(pipe.fileno(), bytes([0, 0, 0, 5, 1, 2]))
        os._exit(9)
"""
DIES_FROM_THREE = """
    if len(q) >= 3:
        os._exit(9)
"""
HANGS_AFTER = """
    CALLS.append(len(q))
    if len(CALLS) > {} and not (HERE / "woken").exists():
        threading.Event().wait()
"""
SCALES = "torch.cat(out) * 1.5"


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[..., str]:
    """Writes the example kernel with something wrong, and gives its name as a backend."""

    def write(deed: str, output: str = "torch.cat(out)", at_import: str = "") -> str:
        imports = (
            "import gc, os, threading\nfrom multiprocessing.connection import Connection\nfrom pathlib import Path\n"
        )
        source = EXAMPLE.replace("    out = []\n", f"{deed}    out = []\n").replace("torch.cat(out)", output)
        path = tmp_path / "kernel.py"
        path.write_text(f"{imports}\nCALLS = []\nHERE = Path({str(tmp_path)!r})\n{at_import}\n{source}")
        return f"{path}:kernel"

    return write


def nothing(*_: object) -> None:
    """For callbacks whose calls are not looked at."""


def campaign(
    backend: str,
    cases: int,
    on_progress: Callable[[dict[str, Tally]], None] = nothing,
    on_finding: Callable[[Finding], None] = nothing,
    **options: Any,
) -> Outcome:
    """A campaign of one worker at kernel level."""
    options = {"dtypes": ("fp32",), "levels": ("kernel",), **options}
    assignment = Assignment(backend=backend, device="cpu", seed=1, cases=cases, **options)
    return Pool([assignment], 1, on_progress, on_finding).run()


# Deaths.


@pytest.mark.slow
def test_a_worker_that_dies_is_a_finding_and_the_campaign_goes_on(kernel: Callable[..., str]) -> None:
    # It leaves a mark, and does not die where there is one.
    backend = kernel(DIES_SPEAKING)
    outcome = campaign(backend, cases=2)
    (finding,) = outcome.findings
    assert (finding.backend, finding.symptom, finding.checks) == (backend, "Crashed", ("runs",))
    assert "died with exit code 9" in finding.messages[0]
    assert finding.messages[-1] == inquest.NOT_AGAIN
    assert finding.case == finding.original_case
    assert finding.case.level == "kernel"
    assert outcome.tallies[backend].cases == 2
    assert not outcome.interrupted


class InThisProcess:
    """Stands for ``Isolated``: says of a case what DIES_FROM_THREE would do."""

    def __init__(self, *_: object) -> None:
        pass

    def report(self, case: Case, *, judged: bool | None = None) -> Report:
        return Report("Crashed", "it died", survived=False) if case.tokens >= 3 else Report()

    close = prepare = begin = be_patient = nothing


@pytest.mark.slow
def test_what_the_system_kills_for_its_memory_accuses_nobody(
    kernel: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    deed = "    if len(q) >= 3:\n        os.kill(os.getpid(), 9)\n"
    monkeypatch.setattr("attn_fuzz.execution.process._OF_MEMORY", 0.0)
    monkeypatch.setattr(pool, "RESTARTS", 0)
    outcome = campaign(kernel(deed), cases=200)
    assert outcome.findings == []
    (trouble,) = outcome.troubles
    assert "was killed, and had filled the memory" in trouble
    # A death of another kind is the kernel's, however large its process.
    monkeypatch.setattr(inquest, "SHRINK_CRASH_SECONDS", -1.0)
    (finding,) = campaign(kernel(DIES_SPEAKING), cases=2).findings
    assert finding.symptom == "Crashed"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["case", "batch"])
@pytest.mark.parametrize("always", [False, True])
def test_a_failure_of_no_stated_cause_is_looked_into_by_others(
    kernel: Callable[..., str], mode: str, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cuBLAS fails on a GPU that others have filled, in calls of the code under test, too."""
    monkeypatch.setattr(inquest, "SHRINK_CRASH_SECONDS", 20.0)
    # Not in the first calls: what a kernel takes is found out in them, whatever comes of it.
    condition = "len(q) >= 3" if always else 'len(CALLS) == 30 and not (HERE / "failed").exists()'
    said = "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa)`"
    raised = f'        (HERE / "failed").touch()\n        raise RuntimeError("{said}")\n'
    deed = f"    CALLS.append(1)\n    if {condition}:\n{raised}"
    backend = kernel(deed)
    outcome = campaign(backend, cases=40, mode=mode)
    if not always:
        assert outcome.findings == []
        assert outcome.tallies[backend].cases >= 40
        (trouble,) = outcome.troubles
        assert "no fault of a kernel" in trouble
        return
    (finding,) = outcome.findings
    assert (finding.symptom, finding.case.lengths) == ("Crashed", (3,))
    assert said in finding.messages[0]


@pytest.mark.slow
def test_a_worker_that_is_killed_once_accuses_nobody_and_the_campaign_goes_on(kernel: Callable[..., str]) -> None:
    # As a person does it: its case ends no other process.
    backend = kernel(
        '    if not (HERE / "died").exists():\n        (HERE / "died").touch()\n        os.kill(os.getpid(), 9)\n'
    )
    outcome = campaign(backend, cases=2)
    assert outcome.findings == []
    (trouble,) = outcome.troubles
    assert "was killed from outside: no finding" in trouble
    assert outcome.tallies[backend].cases == 2


@pytest.mark.slow
def test_where_no_process_can_use_the_device_no_kernel_is_accused(
    kernel: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deviceless(InThisProcess):
        def report(self, case: Case, *, judged: bool | None = None) -> Report:
            raise NoDevice("a new process cannot use cuda:0, whatever it runs there")

    monkeypatch.setattr(witnesses, "Isolated", Deviceless)
    monkeypatch.setattr(pool, "RESTARTS", 0)
    outcome = campaign(kernel(DIES_FROM_THREE), cases=200)
    assert outcome.findings == []
    (trouble,) = outcome.troubles
    assert "died with exit code 9, but a new process cannot use cuda:0" in trouble


@pytest.mark.slow
def test_the_case_that_kills_is_shrunk(kernel: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock on the wall: this process only waits for others, and its own processor time stands still."""
    clocks: list[Callable[[], float]] = []

    def shrink(case: Case, fails: Callable[[Case], bool], seconds: float, clock: Callable[[], float]) -> Case:
        clocks.append(clock)
        return minimise(case, fails, seconds)

    monkeypatch.setattr(inquest, "minimise", shrink)
    monkeypatch.setattr(witnesses, "Isolated", InThisProcess)
    monkeypatch.setattr(pool, "RESTARTS", 0)
    (finding,) = campaign(kernel(DIES_FROM_THREE), cases=200).findings
    assert finding.original_case.tokens >= 3
    assert finding.case.lengths == (3,)
    assert clocks == [time.monotonic]


@pytest.mark.slow
def test_a_death_before_the_first_case_is_one_sentence(kernel: Callable[..., str]) -> None:
    at_import = "if __import__('multiprocessing').parent_process() is not None: os._exit(3)"
    with pytest.raises(CampaignError, match="died with exit code 3 before its first case"):
        campaign(kernel("", at_import=at_import), cases=1)


# Hangs.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """A callback that makes the pool impatient: not before there is progress, because starting takes time."""
    # Workers then need not ask git, which takes longest on a busy machine.
    monkeypatch.setenv("ATTN_FUZZ_COMMIT", "this one")
    return lambda _: monkeypatch.setattr(pool, "HANG_SECONDS", 4.0)


@pytest.mark.slow
def test_a_worker_that_hangs_is_a_finding_and_the_campaign_goes_on(
    kernel: Callable[..., str], impatient: Callable[[object], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dozen cases are some 80 calls; the first is counted after 6 of them."""
    patient = pool.HANG_SECONDS

    def wake(_: Finding) -> None:
        (tmp_path / "woken").touch()
        monkeypatch.setattr(pool, "HANG_SECONDS", patient)

    backend = kernel(HANGS_AFTER.format(30))
    outcome = campaign(backend, 12, lambda _: (tmp_path / "woken").exists() or impatient(_), wake)
    (finding,) = outcome.findings
    assert (finding.symptom, finding.case) == ("Hung", finding.original_case)
    assert outcome.tallies[backend].cases == 12


@pytest.mark.slow
def test_what_a_worker_was_shrinking_when_it_hung_is_kept(
    kernel: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A case is found wrong after 10 calls, and shrunk in 100 more; silences had been short until then."""
    monkeypatch.setattr(pool, "SOON_SECONDS", 2.0)
    monkeypatch.setattr(watch, "AFTER_SECONDS", 0.5)
    monkeypatch.setattr(watch, "EVERY_SECONDS", 0.2)
    kept: list[Finding] = []
    outcome = campaign(kernel(HANGS_AFTER.format(20), SCALES), 1, nothing, kept.append)
    assert outcome.findings == kept
    assert {finding.symptom for finding in kept} == {"WrongOutput", "Hung"}


# Interruptions.


@pytest.mark.slow
def test_the_signal_of_a_scheduler_keeps_what_was_found() -> None:
    def other(*_: object) -> None:
        raise AssertionError("a campaign gives the signal back")

    before = signal.signal(signal.SIGTERM, other)
    try:
        outcome = campaign("fault:M51-swapped", 10_000, on_finding=lambda finding: signal.raise_signal(signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is other
    finally:
        signal.signal(signal.SIGTERM, before)
    assert outcome.interrupted
    assert len(outcome.findings) == 1
    assert outcome.tallies["fault:M51-swapped"].cases >= 1


class ToldTwice(Pool):
    """A second signal comes while what workers had said is taken."""

    def _drain(self, worker: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        super()._drain(worker)


@pytest.mark.slow
def test_a_signal_that_comes_twice_loses_nothing() -> None:
    """As when a scheduler tells the process and then its group."""
    assignments = [Assignment(backend="fault:M51-swapped", device="cpu", seed=1, cases=10_000)]
    outcome = ToldTwice(assignments, 1, nothing, lambda finding: signal.raise_signal(signal.SIGTERM)).run()
    assert outcome.interrupted
    assert len(outcome.findings) == 1


class StopsAtCandidate(Pool):
    """Ctrl-C comes as soon as a worker has begun to shrink."""

    def _take(self, worker: Any, message: Message) -> None:
        super()._take(worker, message)
        if isinstance(message, Candidate):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interruption_while_a_worker_shrinks_keeps_the_case_as_it_was_drawn() -> None:
    assignment = Assignment(backend="fault:M51-swapped", device="cpu", seed=1, cases=100)
    outcome = StopsAtCandidate([assignment], 1, nothing, nothing).run()
    assert outcome.interrupted
    (finding,) = outcome.findings
    assert finding.case == finding.original_case
    assert finding.checks == ("budget",)


@pytest.mark.slow
def test_an_interruption_while_a_crash_is_shrunk_keeps_it(
    kernel: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(InThisProcess):
        def report(self, case: Case, *, judged: bool | None = None) -> Report:
            raise KeyboardInterrupt

    monkeypatch.setattr(witnesses, "Isolated", Interrupted)
    outcome = campaign(kernel(DIES_FROM_THREE), cases=200)
    assert outcome.interrupted
    (finding,) = outcome.findings
    assert (finding.symptom, finding.case) == ("Crashed", finding.original_case)


def one_mode_finds(assignment: Assignment, connection: Connection, processors: object) -> None:
    """Stands for a worker: the packed mode has a finding at once, the case mode looks for it for ever."""
    if assignment.mode == "case":
        threading.Event().wait()
    connection.send(Trying(SMALL.to_json()))
    verdict = examine(SMALL, registry.load(assignment.backend), "cpu", probes=())
    connection.send(Found(finding_of(assignment.backend, SMALL, verdict)))
    connection.send(Finished(Tally(cases=1)))


@pytest.mark.slow
def test_one_finding_of_a_backend_is_enough_for_all_its_hunts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "serve", one_mode_finds)
    jobs = [
        Assignment(backend="fault:M51-swapped", device="cpu", seed=1, stop_at_first=True, mode=mode)
        for mode in ("case", "packed", "case")
    ]
    ended: list[str] = []
    outcome = Pool(jobs, 2, nothing, nothing, on_end=ended.append).run()
    (finding,) = outcome.findings
    assert finding.case == SMALL
    assert outcome.tallies["fault:M51-swapped"].cases == 1
    assert not outcome.interrupted
    # Once, after the last of its hunts.
    assert ended == ["fault:M51-swapped"]


# One case in a process of its own.


@pytest.mark.slow
def test_isolated_cases_name_their_symptom_and_outlive_deaths(kernel: Callable[..., str]) -> None:
    isolated = Isolated(Subject(kernel(DIES_FROM_THREE, SCALES), "cpu"), timeout=100.0)
    try:
        assert [isolated.symptom(case) for case in (CASE, SMALL)] == ["Crashed", "WrongOutput"]
    finally:
        isolated.close()


@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("case", [SMALL, Case(lengths=(3,), head_dim=1, hidden=1)], ids=["kernel", "layer"])
def test_memory_that_runs_out_ends_no_process_and_accuses_nobody(
    kernel: Callable[..., str], case: Case, judged: bool
) -> None:
    name = kernel("    torch.empty(1 << 50)\n")
    report = report_of(case, Subject(name, "cpu", judged=judged), registry.load(name))
    assert (report.refusal, report.symptom, report.survived) == ("memory ran out", None, True)


@pytest.mark.slow
def test_an_isolated_case_that_hangs_is_said_to(kernel: Callable[..., str]) -> None:
    isolated = Isolated(Subject(kernel(HANGS_AFTER.format(0)), "cpu"), timeout=0.2)
    assert isolated.symptom(CASE) == "Hung"
    isolated.close()


@pytest.mark.slow
def test_an_isolated_process_that_dies_at_its_start_is_a_crash(kernel: Callable[..., str]) -> None:
    isolated = Isolated(Subject(kernel("", at_import="os._exit(3)"), "cpu"), timeout=100.0)
    assert isolated.symptom(CASE) == "Crashed"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_isolated_process_without_its_device_accuses_nobody() -> None:
    isolated = Isolated(Subject("loop", "cuda:0"), timeout=100.0)
    with pytest.raises(NoDevice, match="a new process cannot use cuda:0"):
        isolated.symptom(CASE)


# Time.


@pytest.mark.parametrize(
    ("planned", "busy", "left", "starting", "share"),
    [
        # Alone in its place until the end.
        ([17.0], [0.0], 60.0, None, 60.0),
        ([17.0], [0.0], 60.0, 4.0, 56.0),
        ([17.0] * 2, [0.0], 60.0, None, 60.0),
        ([17.0], [30.0], 60.0, 0.0, 60.0),
        # Four rounds of two: four processes have to start one after another.
        ([17.0] * 7, [0.0], 60.0, 0.0, 15.0),
        ([17.0] * 7, [0.0], 60.0, 5.0, 10.0),
        # Each its part of what is left, as it was planned.
        ([40.0, 10.0], [], 25.0, 0.0, 20.0),
        ([40.0, 10.0, 40.0, 10.0], [0.0], 25.0, 0.0, 20.0),
        # What follows has another place to go to.
        ([40.0, 40.0], [10.0], 60.0, 0.0, 60.0),
        # Others took longer than they should have: half of what was planned remains.
        ([17.0, 17.0], [], 1.0, 4.0, 8.5),
    ],
)
def test_who_has_to_wait_shares_what_is_left(
    planned: list[float], busy: list[float], left: float, starting: float | None, share: float
) -> None:
    assert share_of_time(planned, busy, left, starting) == pytest.approx(share, rel=0.02)


def times_of(jobs: list[Assignment], workers: int, starting: float, left: float) -> tuple[list[float], list[float]]:
    """When each place is free for good, and the seconds of each assignment; each starts for so long."""
    free_at, seconds = [0.0] * workers, [job.seconds or 0.0 for job in jobs]
    for index in range(len(jobs)):
        slot = free_at.index(min(free_at))
        busy = [max(at - free_at[slot], 0.0) for place, at in enumerate(free_at) if place != slot]
        known = starting if index >= workers else None
        seconds[index] = share_of_time(seconds[index:], busy, left - free_at[slot], known)
        free_at[slot] += starting + seconds[index]
    return free_at, seconds


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_a_campaign_of_more_backends_than_workers_ends_in_time(workers: int) -> None:
    """Slots that start processes of four seconds one after another: none outlasts the campaign's time by a process."""
    options = CampaignOptions(device="cpu", workers=workers, seconds=100.0, levels=("layer",))
    free_at, seconds = times_of(plan(tuple("abcdefg"), options), workers, 4.0, 100.0)
    assert max(free_at) <= 104.0
    # Nor is any place without work for long, nor any backend without time.
    assert min(free_at) >= 99.0 or workers > 7
    assert min(seconds) >= 0.6 * max(min(100.0, workers * 100.0 / 7) - 4.0, 0.0)


@pytest.mark.parametrize(
    ("names", "workers", "counts"), [(7, 2, (7, 7)), (1, 2, (2, 2)), (1, 4, (1, 3)), (2, 3, (2, 2))]
)
def test_the_case_mode_gets_a_part_of_each_backends_time(
    names: int, workers: int, counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth, as nearly as there are places for; and no place is without work."""
    monkeypatch.setattr("attn_fuzz.campaign.plan.takes_batches", lambda *_: True)
    options = CampaignOptions(device="cpu", workers=workers, seconds=100.0, modes=("case", "batch"))
    jobs = plan(tuple("abcdefg"[:names]), options)
    by_mode = {mode: [job for job in jobs if job.mode == mode] for mode in options.modes}
    assert tuple(map(len, by_mode.values())) == counts
    assert len({job.seed for job in jobs}) == len(jobs)
    free_at, seconds = times_of(jobs, workers, 0.5, 100.0)
    assert all(98.0 <= at <= 101.0 for at in free_at)
    of_cases = sum(time for time, job in zip(seconds, jobs, strict=True) if job.mode == "case")
    assert 0.15 <= of_cases / sum(seconds) <= 0.35
