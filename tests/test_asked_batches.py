"""Batches that are asked one thing, and a kernel that is wrong in nearly all of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from commandline import Run

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judged import Judged
from attn_fuzz.campaign.calls_worker import CallsWorker
from attn_fuzz.campaign.messages import Assignment, Finished, Found, Message
from attn_fuzz.oracle.examine import Verdict
from attn_fuzz.reference.case import Case


class _AskedOf(CallsWorker):
    """Notes what batches are asked, and of which size, by level."""

    def take(self, judged: Judged) -> None:
        self.noted[judged.batch.case.level, judged.question.asked, max(judged.batch.case.lengths)] += 1
        super().take(judged)

    noted: Counter[tuple[str, str, int]]


def asked_of(*asked: str, levels: tuple[str, ...] = ("layer", "kernel"), cases: int = 90) -> Counter[str]:
    job = Assignment(backend="backup", device="cpu", seed=0, levels=levels, cases=cases, mode="batch", asked=asked)
    worker = _AskedOf(job, lambda message: None)
    worker.noted = Counter()
    worker.run()
    names = Counter[str]()
    for (level, question, _), number in worker.noted.items():
        names[f"{level}: {question}"] += number
    return names


def test_batches_are_asked_what_was_named() -> None:
    assert set(asked_of("company", "needle", levels=("kernel",))) == {"kernel: company", "kernel: needle"}


def test_of_layers_there_are_none_where_no_layer_is_asked_that() -> None:
    assert set(asked_of("company", cases=30)) == {"kernel: company"}
    with pytest.raises(ValueError, match="no batch of backup is asked company here"):
        asked_of("company", levels=("layer",))


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_on_the_command_line(attn_fuzz: Run) -> None:
    quick = ("--level", "kernel", "--device", "cpu", "--workers", "1", "--cases", "30")
    done = attn_fuzz("run", "-b", "backup", "--mode", "batch", "--ask", "company", *quick, "--json")
    assert done.status == 0
    assert '"company forward"' in done.out or "company" in done.out


class _Halved(LoopKernel):
    """All outputs are half of what they should be."""

    name = "halved"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        return attended._replace(out=attended.out / 2)


def test_what_is_wrong_everywhere_is_looked_into_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend("halved", _Halved())
    monkeypatch.setattr(registry, "load", lambda name: backend)
    looked: list[Case] = []
    narrow = CallsWorker.narrow

    def noted(worker: CallsWorker, case: Case, *rest: Any) -> Verdict | None:
        looked.append(case)
        return narrow(worker, case, *rest)

    monkeypatch.setattr(CallsWorker, "narrow", noted)
    messages: list[Message] = []
    job = Assignment(backend="halved", device="cpu", seed=0, levels=("kernel",), cases=400, mode="batch")
    CallsWorker(job, messages.append).run()
    last = messages[-1]
    assert isinstance(last, Finished)
    assert any(isinstance(message, Found) for message in messages)
    assert last.tally.cases == 400
    # Three for each of the few results that are wrong by it, of some sixty batches and, in a night, of thousands.
    assert last.tally.repeated > 2 * len(looked)
    assert len(looked) <= 18
