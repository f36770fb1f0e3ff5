"""Draws what each mode draws, without running it, and counts what was reached."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judge import schedule_on
from attn_fuzz.batch.layer import draw_layer_case
from attn_fuzz.batch.layer_judge import LAYER_SCHEDULE
from attn_fuzz.batch.packed import PACKED_SCHEDULE
from attn_fuzz.coverage.aims import aim_at
from attn_fuzz.coverage.allowed import Space
from attn_fuzz.coverage.axes import probe_name
from attn_fuzz.coverage.counts import Counts, Pair
from attn_fuzz.generation import calls, layer_calls, length_sweeps
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.drawing import few_cases
from attn_fuzz.generation.length_sweeps import Sweep
from attn_fuzz.oracle.checks import PROBES
from attn_fuzz.oracle.examine import some_probes
from attn_fuzz.reference.case import Case

Place = tuple[str, str]
"""(mode, level)."""


class Drawer:
    """Draws for one backend on a CPU.

    Args:
        backend: that would run it.
        seed: of everything.
    """

    def __init__(self, backend: Backend, seed: int = 0) -> None:
        self.backend, self.random = backend, Random(seed)
        capabilities = backend.kernel.capabilities_on("cpu")
        self.space = Space(capabilities, "cpu", backend.levels, backend.levels)
        self.allowed = list(self.space.pairs())
        self.counts, self.turn, self.reached = Counts(), 0, dict[Pair, int]()

    def note(self, cases: list[Case], mode: str, questions: list[str]) -> None:
        """Counts cases as a worker does."""
        self.counts.count([case for case in cases if self.backend.refusal(case, "cpu") is None], mode, questions)

    def draw(self, place: Place, aim: Mapping[str, tuple[Any, ...]], question: str | None = None) -> None:
        """Two single cases, or a batch, or a packed call; of a question of its schedule, in turn or given."""
        mode, level = place
        domain = Domain.of(self.space.capabilities, "cpu", aim=aim)
        self.turn += 1
        if mode == "case":
            few_cases(level, domain, self.random.randrange(1 << 30), self._note_single, 2)
            return
        schedule = PACKED_SCHEDULE if mode == "packed" else schedule_on("cpu") if level == "kernel" else LAYER_SCHEDULE
        asked = question if question is not None else schedule[self.turn % len(schedule)].asked
        cases = self._packed(level, domain) if mode == "packed" else self._batch(level, domain)
        self.note(cases, mode, [asked] if asked and place != ("packed", "layer") else [])

    def _note_single(self, case: Case) -> None:
        self.note([case], "case", [probe_name(probe) for probe in some_probes(case) if probe in PROBES])

    def _batch(self, level: str, domain: Domain) -> list[Case]:
        size = self.turn % 3
        if level == "layer":
            longest = layer_calls.LONGEST["cpu"][size]
            batch = layer_calls.draw_layer_batch(self.random, self.backend, domain, 8, longest)
        else:
            sweep = Sweep(calls.LONGEST["cpu"][size], self.random.randrange(1 << 16))
            batch = calls.draw_batch(self.random, sweep, self.backend, domain, 12)
        return list(batch.calls) if batch is not None else []

    def _packed(self, level: str, domain: Domain) -> list[Case]:
        longest = length_sweeps.LONGEST["cpu"][self.turn % 3]
        if level == "layer":
            case = draw_layer_case(self.random, self.backend, domain, self.random.choice((64, 90)), longest[0])
        else:
            sweep = Sweep(longest, self.random.randrange(1 << 16))
            documents = self.random.choice((64, 64, 128))
            case = length_sweeps.draw_case(self.random, sweep, self.backend, domain, documents)
        return [case] if case is not None else []

    def take(self) -> None:
        """Counts what was drawn since."""
        for pair, count in self.counts.take().pairs.items():
            self.reached[pair] = self.reached.get(pair, 0) + count

    def missing(self) -> list[Pair]:
        """Pairs that the declarations allow and no case had."""
        return [pair for pair in self.allowed if pair not in self.reached]

    def draw_towards(self, pair: Pair) -> None:
        """Something that may have both values, where they may occur together."""
        places = self.space.places(*pair)
        # Where there is a choice, mostly in the modes that draw many at once.
        place = self.random.choice([place for place in places for _ in range(1 if place.mode == "case" else 3)])
        asked = None if place.mode == "case" else dict(pair).get("question")
        self.draw((place.mode, place.level), aim_at(self.space, *pair), asked)

    def draw_all(self, batches: int, singles: int) -> None:
        """So many batches and packed calls, and draws of single cases, of each level, of anything."""
        for level in self.backend.levels:
            for _ in range(batches):
                self.draw(("batch", level), {})
                self.draw(("packed", level), {})
            for _ in range(singles):
                self.draw(("case", level), {})
        self.take()
