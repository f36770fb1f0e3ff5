"""Dead rows: what no query attends to, and what attends to nothing, has a gradient of exactly zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attn_fuzz.execution.observation import Observation
from attn_fuzz.oracle.symptoms import DeadRowsNotZero, Element, Place, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Expected


def dead_rows_zero(trial: Trial) -> Iterator[Symptom]:
    """dQ, dK and dV rows with no partner are 0, and each backward leaves gradient rows outside its extent alone."""
    owing = {name: dead for name in ("dq", "dk", "dv") if (dead := _dead(trial.answer.get(name))) is not None}
    for observation in trial.observations:
        for name, dead in owing.items():
            got = observation.results.get(name)
            if got is None or got.shape != trial.answer[name].value.shape:
                continue
            alive = dead & (got != 0).flatten(1).any(1)
            if rows := alive.nonzero()[:, 0].tolist():
                document, row = trial.document_of(name, rows[0])
                value = got[rows[0]].flatten()
                held = value[value != 0][0].item()
                yield DeadRowsNotZero(
                    "dead_rows",
                    name,
                    f"document {document}, row {row} has no partner, but its gradient holds "
                    f"{held:.6g} ({len(rows)} such rows)",
                    element=Element(Place(document, row), held, 0.0),
                )
        if trial.backend.kernel.capabilities_on(trial.device.type).covers_all_rows:
            yield from _tails_zero(observation)
        for stray in observation.strays:
            if stray.tensor in ("dk", "dv"):
                yield DeadRowsNotZero(
                    "dead_rows",
                    stray.tensor,
                    f"the {stray.step} changed rows {_ranges(stray.rows)} outside its active extent, "
                    f"to {stray.value:.6g}",
                    element=Element(Place(None, stray.rows[0]), stray.value, 0.0),
                )


def _dead(expected: Expected | None) -> torch.Tensor | None:
    """Which rows of a gradient owe zeros, ``[rows]``, or None where none do."""
    if expected is None:
        return None
    dead = ~expected.variance.flatten(1).any(1)
    if not dead.any():
        return None
    return dead & ~expected.value.flatten(1).any(1)


def empty(name: str) -> float:
    """What a backend that fills a result's rows of no document fills them with."""
    return -torch.inf if name == "lse" else 0.0


def unfilled(name: str, tail: torch.Tensor) -> torch.Tensor:
    """Elements of such rows that are something else."""
    return tail != empty(name)


def _tails_zero(observation: Observation) -> Iterator[Symptom]:
    """Rows between and behind the documents, where the backend promises to fill them."""
    for name, tail in observation.tails.items():
        if (wrong := unfilled(name, tail)).any():
            row = len(observation.results[name]) + int(wrong.flatten(1).any(1).nonzero()[0])
            yield DeadRowsNotZero(
                "dead_rows",
                name,
                f"rows of no document hold {tail[wrong][0].item():.6g} ({len(tail)} such rows)",
                element=Element(Place(None, row), tail[wrong][0].item(), empty(name)),
            )


def _ranges(rows: tuple[int, ...]) -> str:
    return f"{rows[0]}" if len(rows) == 1 else f"{rows[0]}..{rows[-1]} ({len(rows)} rows)"
