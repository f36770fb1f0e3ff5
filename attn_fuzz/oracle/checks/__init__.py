"""The oracle: named checks, each a function from a trial to the symptoms it sees.

Adding a check is writing one such function and listing it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attn_fuzz.oracle.checks.accumulation import exact_accumulation
from attn_fuzz.oracle.checks.additivity import sums_add_up
from attn_fuzz.oracle.checks.asked import asked_otherwise
from attn_fuzz.oracle.checks.budget import histograms, within_budget, worst_errors
from attn_fuzz.oracle.checks.company import same_in_company
from attn_fuzz.oracle.checks.compiled import compiled_alike
from attn_fuzz.oracle.checks.dead_rows import dead_rows_zero
from attn_fuzz.oracle.checks.exact import needle_found, rows_counted, uniform_keys
from attn_fuzz.oracle.checks.graphs import replayed_alike
from attn_fuzz.oracle.checks.isolation import documents_apart, future_apart
from attn_fuzz.oracle.checks.lifetimes import evaluated, second_sequence
from attn_fuzz.oracle.checks.memory import (
    buffer_intact,
    inputs_intact,
    results_complete,
    results_kept,
    unwritten_unread,
)
from attn_fuzz.oracle.checks.merging import parts_merge
from attn_fuzz.oracle.checks.placement import placed_otherwise
from attn_fuzz.oracle.checks.ranks import dead_rows_zero_by_rank, replicas_equal
from attn_fuzz.oracle.checks.regroup import regrouped
from attn_fuzz.oracle.checks.repeat import path_taken, repeats_itself
from attn_fuzz.oracle.checks.spread import rows_within_budget, worst_spreads
from attn_fuzz.oracle.checks.streams import ordered_by_streams
from attn_fuzz.oracle.checks.swamping import sums_not_swamped
from attn_fuzz.oracle.symptoms import Symptom
from attn_fuzz.oracle.trial import Trial

Check = Callable[[Trial], Iterable[Symptom]]

CHECKS: tuple[Check, ...] = (
    results_complete,
    unwritten_unread,
    dead_rows_zero,
    dead_rows_zero_by_rank,
    replicas_equal,
    buffer_intact,
    results_kept,
    inputs_intact,
    path_taken,
    within_budget,
    rows_within_budget,
)
"""Functions of the runs that every case makes."""

PROBES: tuple[Check, ...] = (
    uniform_keys,
    rows_counted,
    regrouped,
    needle_found,
    exact_accumulation,
    sums_add_up,
    repeats_itself,
    documents_apart,
    future_apart,
    asked_otherwise,
    sums_not_swamped,
    second_sequence,
    evaluated,
    parts_merge,
    same_in_company,
    replayed_alike,
    ordered_by_streams,
    placed_otherwise,
)
"""Functions of runs of their own, with inputs of their own: asked where nothing has failed yet."""

RARE: tuple[Check, ...] = (compiled_alike,)
"""Those that take seconds each: asked of one case in a thousand, and of saved cases that they have failed."""

__all__ = ["CHECKS", "PROBES", "RARE", "Check", "histograms", "worst_errors", "worst_spreads"]
