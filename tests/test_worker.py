"""One worker's assignment, done in this process: what it says, and when it gives up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from attn_fuzz.campaign import worker
from attn_fuzz.campaign.messages import Assignment, Candidate, Failed, Finished, Found, Message, Trying
from attn_fuzz.campaign.worker import work
from attn_fuzz.coverage.axes import probe_name
from attn_fuzz.oracle.checks import Check
from attn_fuzz.oracle.examine import Verdict, examine
from attn_fuzz.reference.case import Case

EXAMPLE = (Path(__file__).resolve().parent.parent / "examples" / "my_kernel.py").read_text()
SWAPPED = Assignment(backend="fault:M51-swapped", device="cpu", seed=3, cases=40, stop_at_first=True)


def said(assignment: Assignment) -> list[Message]:
    """Every message of an assignment."""
    messages: list[Message] = []
    work(assignment, messages.append)
    return messages


def kernel(folder: Path, deed: str) -> Assignment:
    """An assignment of the example kernel, which does something else first."""
    path = folder / "kernel.py"
    path.write_text(EXAMPLE.replace("    out = []\n", f"    {deed}\n    out = []\n"))
    return Assignment(backend=f"{path}:kernel", device="cpu", seed=0, cases=12, levels=("kernel",), dtypes=("fp32",))


@pytest.mark.slow
def test_a_finding_is_announced_before_it_is_shrunk() -> None:
    messages = said(SWAPPED)
    kinds = [type(message) for message in messages]
    assert kinds[0] is Trying
    assert kinds.index(Candidate) < kinds.index(Found) < kinds.index(Finished)
    (suspect,) = [message.finding for message in messages if isinstance(message, Candidate)]
    (found,) = [message.finding for message in messages if isinstance(message, Found)]
    assert suspect.case == suspect.original_case == found.original_case
    assert found.case.tokens <= found.original_case.tokens
    assert found.case.tokens <= 2
    tried = [Case.from_json(message.case) for message in messages if isinstance(message, Trying)]
    assert {found.original_case, found.case} <= set(tried)


@pytest.mark.slow
def test_the_same_seed_draws_the_same_cases() -> None:
    def tried(seed: int) -> list[str]:
        job = Assignment(backend="loop", device="cpu", seed=seed, cases=8, levels=("kernel",), dtypes=("fp32",))
        return [message.case for message in said(job) if isinstance(message, Trying)]

    first = tried(1)
    assert first == tried(1)
    assert first != tried(2)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [(), ("same in company", "compiled alike")])
def test_every_case_is_asked_what_is_named(asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []

    def recorded(case: Case, *rest: Any, probes: Sequence[Check], **options: Any) -> Verdict:
        seen.append(tuple(map(probe_name, probes)))
        return examine(case, *rest, probes=() if asked else probes, **options)

    monkeypatch.setattr(worker, "examine", recorded)
    said(Assignment(backend="loop", device="cpu", seed=5, cases=6, levels=("kernel",), dtypes=("fp32",), asked=asked))
    assert len(seen) >= 6
    assert set(seen) == {asked} if asked else len(set(seen)) > 1


@pytest.mark.slow
def test_what_is_named_is_found_by_it() -> None:
    """A batch-dependent kernel, asked for it and for something else."""
    job = Assignment(backend="fault:C01", device="cpu", seed=2, cases=40, levels=("kernel",), stop_at_first=True)

    def found(*asked: str) -> list[str]:
        messages = said(dataclasses.replace(job, asked=asked))
        return [each.finding.symptom for each in messages if isinstance(each, Found)]

    assert found("same in company") == ["NotBatchInvariant"]
    assert found("sums not swamped") == []


@pytest.mark.slow
def test_as_many_cases_as_were_asked_for_are_counted(tmp_path: Path) -> None:
    (finished,) = [message for message in said(kernel(tmp_path, "pass")) if isinstance(message, Finished)]
    tally = finished.tally
    assert tally.cases == sum(tally.by_kind.values()) == 12
    assert set(tally.by_kind) == {"kernel fp32"}
    assert 0 < max(tally.worst_z.values()) < 10
    assert {Case.from_json(text).dtype for text in tally.worst_case.values()} == {"fp32"}


@pytest.mark.slow
def test_memory_that_runs_out_accuses_nobody(tmp_path: Path) -> None:
    """Half of the calls get none; what ran without is counted."""
    deed = "if len(q) % 2: raise MemoryError('no more')"
    messages = said(kernel(tmp_path, deed))
    assert not [message for message in messages if isinstance(message, (Candidate, Found))]
    assert isinstance(messages[-1], Finished)
    assert messages[-1].tally.cases == 12
    assert messages[-1].tally.refused > 0


def test_a_backend_that_refuses_everything_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REFUSALS", 20)
    assignment = kernel(tmp_path, "raise NotImplementedError('on Sundays')")
    # Else nothing shows that it takes rows beyond the last document, and most are refused for those.
    with (tmp_path / "kernel.py").open("a") as file:
        file.write("\nkernel.capabilities = {**kernel.capabilities, 'capacity': True}\n")
    messages = said(assignment)
    assert isinstance(messages[-1], Failed)
    assert "refused all" in messages[-1].reason
    assert "on Sundays" in messages[-1].reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend": "flesh"}, "unknown backend 'flesh'"),
        ({"levels": ("kernel",), "backend": "legacy:loop"}, "has no kernel level"),
        ({"dtypes": ("fp64",)}, "none of the dtypes fp64"),
    ],
)
def test_what_cannot_be_done_is_one_message(changes: dict[str, object], reason: str) -> None:
    (failed,) = said(dataclasses.replace(SWAPPED, **changes))  # type: ignore[arg-type]
    assert isinstance(failed, Failed)
    assert reason in failed.reason


@pytest.mark.slow
def test_a_mistake_of_the_harness_ends_the_hunt_even_at_its_last_case(monkeypatch: pytest.MonkeyPatch) -> None:
    examined = worker.examine
    seen: list[Case] = []

    def broken(case: Case, *args: Any, **options: Any) -> Verdict:
        seen.append(case)
        if len(seen) == 8:
            raise IndexError("a mistake of ours")
        return examined(case, *args, **options)

    monkeypatch.setattr(worker, "examine", broken)
    job = Assignment(backend="loop", device="cpu", seed=1, cases=8, levels=("kernel",), dtypes=("fp32",))
    messages = said(job)
    assert isinstance(messages[-1], Failed)
    assert "a mistake of ours" in messages[-1].reason
    assert len(seen) == 8
