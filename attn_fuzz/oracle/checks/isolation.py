"""Isolation: what a result must not depend on is replaced, and the result keeps its bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from attn_fuzz.execution.inferred import InferredCapabilities
from attn_fuzz.execution.observation import Observation
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.garbage import kernel_garbage, layer_garbage
from attn_fuzz.oracle.symptoms import NotIsolated, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.attention import allowed_keys
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.layout import call_segments, document_spans


def garbage_of(case: Case, inferred: InferredCapabilities, finite: float) -> float:
    """NaN or infinity where the backend keeps them apart, the finite number otherwise; by the case's seed."""
    return (finite, torch.nan, torch.inf)[case.seed % 3] if inferred.isolates_nonfinite else finite


def _finite(trial: Trial) -> float:
    """Finite garbage for a case's tensors (attn_fuzz/oracle/garbage.py)."""
    inputs = trial.inputs
    return kernel_garbage(trial.case) if isinstance(inputs, Inputs) else layer_garbage(trial.case, inputs)


def first_kept(case: Case) -> int:
    """The document from which on every other one keeps its values: the first or the second, by the case's seed."""
    return case.seed // 3 % 2


def kept_documents(case: Case) -> list[int]:
    """Every other document."""
    return list(range(first_kept(case), len(case.packed_lengths), 2))


def moved_bits(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Elements that are no longer the same: 0 times a negative number is -0, so that signs of zeros may move."""
    return (before != after) & ~(before.isnan() & after.isnan())


def documents_apart(trial: Trial) -> Iterator[Symptom]:
    """Other documents are filled with garbage: those that keep their values keep all their results."""
    case = trial.case
    if len(case.packed_lengths) < 2:
        return
    kept = kept_documents(case)
    rows = _rows_of(case.packed_lengths, kept)
    key_rows = _rows_of(case.packed_key_lengths, kept) if case.level == "kernel" else rows
    garbage = garbage_of(case, trial.inferred, _finite(trial))
    inputs = _spoiled(trial, ~rows, ~key_rows, garbage)

    def spoiled() -> Observation:
        return trial.observe_with(inputs, trial.poisons[0])

    observation = spoiled()
    tensors = "q, k, v and dout" if case.level == "kernel" else "x and dout"
    others = f"other documents' values ({garbage:g} in {tensors} of documents {_listed(case, kept)})"
    for name in ("out", "lse", "dq", "dk", "dv", "dx", "k", "v"):
        on_keys = case.level == "kernel" and name in ("dk", "dv")
        yield from _compare(trial, observation, name, key_rows if on_keys else rows, others, spoiled)


def future_apart(trial: Trial) -> Iterator[Symptom]:
    """Keys that earlier rows do not see are filled with garbage: those rows keep their output and dQ."""
    case = trial.case
    if case.level != "kernel" or max(case.effective_window) < 0:
        return
    rows = torch.zeros(sum(case.packed_lengths), dtype=torch.bool)
    key_rows = torch.zeros(sum(case.packed_key_lengths), dtype=torch.bool)
    for segment in call_segments(case):
        mask = allowed_keys(segment.queries.length, segment.keys.length, case.effective_window)
        rest = segment.queries.length // 2
        rows[segment.queries.begin : segment.queries.begin + rest] = True
        key_rows[slice(*segment.keys)] = mask[:rest].any(0)
    if not rows.any() or key_rows.all():
        return
    # Finite: kernels multiply whole tiles, so that masked NaN in a row's own tile may stay NaN.
    garbage = kernel_garbage(case)
    inputs = _spoiled(trial, ~rows, ~key_rows, garbage)

    def spoiled() -> Observation:
        return trial.observe_with(inputs, trial.poisons[0])

    observation = spoiled()
    unseen = f"keys that it does not see ({garbage:g} in k and v there, and in q and dout of later rows)"
    for name in ("out", "lse", "dq"):
        yield from _compare(trial, observation, name, rows, unseen, spoiled)


def _listed(case: Case, kept: list[int]) -> str:
    """The documents that are not kept, the first few."""
    others = [index for index in range(len(case.packed_lengths)) if index not in kept]
    return ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")


def _rows_of(lengths: tuple[int, ...], kept: list[int]) -> torch.Tensor:
    rows = torch.zeros(sum(lengths), dtype=torch.bool)
    for index, span in enumerate(document_spans(lengths)):
        rows[slice(*span)] = index in kept
    return rows


def _spoiled(trial: Trial, rows: torch.Tensor, key_rows: torch.Tensor, garbage: float) -> Inputs | LayerInputs:
    """The case's tensors with garbage in some rows."""

    def spoil(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.where(where.view(-1, *[1] * (x.dim() - 1)), x.new_tensor(garbage), x)

    inputs = trial.inputs
    if isinstance(inputs, Inputs):
        dout = spoil(inputs.dout, rows)
        # One gradient for all rows cannot be spoilt in some.
        dout = inputs.dout if trial.case.memory == "broadcast" else dout
        return Inputs(spoil(inputs.q, rows), spoil(inputs.k, key_rows), spoil(inputs.v, key_rows), dout)
    return dataclasses.replace(inputs, x=spoil(inputs.x, rows), dout=spoil(inputs.dout, rows))


def _far(trial: Trial, name: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Elements further apart than two runs with roundings of their own are."""
    spread = trial.answer[name].variance.sqrt()
    return ~((before.double() - after.double()).abs() <= 2**0.5 * LIMIT * spread) & (before != after)


def _compare(
    trial: Trial,
    observation: Observation,
    name: str,
    rows: torch.Tensor,
    what: str,
    spoiled: Callable[[], Observation],
) -> Iterator[Symptom]:
    """What moved in some rows of a result, ``spoiled`` being another run like the one observed."""
    before, after = trial.observations[0].results.get(name), observation.results.get(name)
    if before is None or after is None or before.shape != after.shape or len(before) != len(rows):
        return
    if trial.repeats(name) and trial.case.level == "kernel":
        # Layers hold matrix products over all tokens, whose rounding is torch's affair.
        moved = moved_bits(before, after)
        if moved[rows].any() and not trial.moves_for(name, spoiled):
            moved = _far(trial, name, before, after)
    else:
        moved = _far(trial, name, before, after)
    moved = moved.reshape(len(moved), -1) & rows[:, None]
    if found := moved.any(1).nonzero()[:, 0].tolist():
        document, row = trial.document_of(name, found[0])
        was, became = (x.reshape(len(x), -1)[moved].double() for x in (before, after))
        worst = int((became - was).abs().nan_to_num(torch.inf).argmax())
        yield NotIsolated(
            "isolation",
            name,
            f"document {document}, row {row} changes with {what}: {len(found)} such rows, by up to "
            f"{(became - was)[worst].abs().item():.3g}, from {was[worst].item():.6g} to {became[worst].item():.6g}",
            nan=bool(became[worst].isnan()),
        )
