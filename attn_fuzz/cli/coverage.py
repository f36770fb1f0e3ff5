"""``coverage``: what campaigns have reached of each backend, and the holes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.registry import UnknownBackend
from attn_fuzz.cli.arguments import DEFAULT_STORE, BackendOption, JsonOption, StoreOption, UsageError
from attn_fuzz.cli.columns import Column, print_fitted
from attn_fuzz.cli.terminal import results_console
from attn_fuzz.coverage.axes import Value
from attn_fuzz.coverage.counts import Pair
from attn_fuzz.nights.database import Database, path_beside
from attn_fuzz.nights.holes import Coverage, coverage_of
from attn_fuzz.nights.totals import subjects

_FEW: Final = 5
"""Holes and refusals of a kind that are shown where not all are asked for."""


def coverage(
    backend: BackendOption = None,
    every: Annotated[bool, typer.Option("--all", help="Name every hole, not a few of each kind.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """What campaigns have reached of each backend's declarations, what they never have, and what was refused."""
    found: list[Coverage] = []
    gone: list[str] = []
    with Database(path_beside(store), create=False) as database:
        wanted = [subject for subject in subjects(database) if not backend or subject[0] in backend]
        if missing := sorted(set(backend or ()) - {name for name, _ in wanted}):
            raise UsageError(f"no campaign has tested {missing[0]} in this store")
        for name, kind in wanted:
            try:
                found.append(coverage_of(database, name, kind))
            except (UnknownBackend, BackendUnavailable) as error:
                gone.append(str(error))
    if as_json:
        typer.echo(json.dumps({"backends": [to_dict(each) for each in found]}))
    else:
        print_coverage(results_console(), found, None if every else _FEW)
    for sentence in gone:
        typer.echo(f"attn-fuzz: {sentence}", err=True)
    raise typer.Exit(2 if gone else 0)


def to_dict(covered: Coverage) -> dict[str, Any]:
    """Ready for JSON: values and pairs as words."""
    return {
        "backend": covered.backend,
        "device": covered.kind,
        "share": round(covered.share, 4),
        "values": {word(value): cases for value, cases in covered.values.items()},
        "pairs": len(covered.pairs),
        "pairs_reached": sum(map(bool, covered.pairs.values())),
        "values_never": [word(value) for value in covered.values_never],
        "pairs_never": [[word(one), word(other)] for one, other in covered.pairs_never],
        "refused": dict(covered.refused.most_common()),
    }


def word(value: Value) -> str:
    """A value with its axis."""
    return f"{value[0]} {value[1]}"


def _of(reached: Sequence[int]) -> str:
    return f"{sum(map(bool, reached))} of {len(reached)}"


def print_coverage(console: Console, found: Sequence[Coverage], most: int | None) -> None:
    """A table of all, and the holes of each.

    Args:
        console: where to.
        found: of each backend and device.
        most: holes and refusals of a kind that are named; None for all.
    """
    columns = (
        Column("backend", name=True),
        Column("device"),
        Column("values", right=True),
        Column("pairs", right=True),
        Column("share", right=True),
    )
    rows = [
        (each.backend, each.kind, _of(list(each.values.values())), _of(list(each.pairs.values())), f"{each.share:.1%}")
        for each in found
    ]
    print_fitted(console, columns, rows, "reached, of what is declared")
    for each in found:
        _print_holes(console, each, most)


def _print_holes(console: Console, covered: Coverage, most: int | None) -> None:
    """What was never reached, by axes, and what was refused most often."""
    lines = [
        (axis, named([value for name, value in covered.values_never if name == axis], most))
        for axis in dict.fromkeys(name for name, _ in covered.values_never)
    ]
    lines += [
        (f"{axes[0]} x {axes[1]}", named([f"{one[1]} x {other[1]}" for one, other in pairs], most))
        for axes, pairs in _by_axes(covered.pairs_never).items()
    ]
    if lines:
        title = f"{covered.backend} on {covered.kind}: never reached"
        print_fitted(console, (Column("axes"), Column("never", right=True), Column("values")), lines_of(lines), title)
    if covered.refused:
        rows = [(str(count), reason) for reason, count in covered.refused.most_common(most)]
        title = f"{covered.backend} on {covered.kind}: refused draws"
        print_fitted(console, (Column("draws", right=True), Column("why")), rows, title)


def lines_of(lines: Sequence[tuple[str, tuple[int, str]]]) -> list[tuple[str, str, str]]:
    """Rows of a table of holes."""
    return [(axes, str(count), names) for axes, (count, names) in lines]


def named(names: Sequence[str], most: int | None) -> tuple[int, str]:
    """How many there are, and the first of them in words."""
    shown = list(names if most is None else names[:most])
    return len(names), ", ".join(shown) + (", ..." if len(shown) < len(names) else "")


def _by_axes(pairs: Sequence[Pair]) -> dict[tuple[str, str], list[Pair]]:
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        found.setdefault((pair[0][0], pair[1][0]), []).append(pair)
    return found
