"""Whether every backend had its share: verdicts per value of an axis, against the median of all backends.

``python -m attn_fuzz.nights.evenness STORE`` prints it as one JSON object, with exit status 1 where a backend that does
not compile has less than a fifth of the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.registry import UnknownBackend
from attn_fuzz.coverage.axes import Value
from attn_fuzz.nights.database import Database, DatabaseError, path_beside
from attn_fuzz.nights.holes import coverage_of
from attn_fuzz.nights.spaces import targets
from attn_fuzz.nights.totals import subjects
from attn_fuzz.reference.case import LEVELS

FIFTH: Final = 0.2
"""Of the median: a backend with less of it is one that a campaign has neglected."""


def per_value(values: Mapping[Value, int]) -> float:
    """Verdicts per value of an axis: the mean over all values that a backend may be asked for; 0 for none."""
    return statistics.fmean(values.values()) if values else 0.0


def evenness(rates: Mapping[str, float], compiled: Collection[str]) -> dict[str, Any]:
    """What each backend has had, ready for JSON; those that compile are compared among themselves.

    Args:
        rates: verdicts per axis value (``per_value``), by backend.
        compiled: backends that compile for what they are handed.

    Returns:
        For ``quick`` and ``compiled`` ones the median, the backends' verdicts and their shares of the median; ``even``
        says whether no quick one has less than a fifth of it.
    """
    found: dict[str, Any] = {}
    for kind, of_kind in (("quick", False), ("compiled", True)):
        mine = {name: rate for name, rate in rates.items() if (name in compiled) is of_kind}
        median = statistics.median(mine.values()) if mine else 0.0
        found[kind] = {
            "median": round(median, 1),
            "verdicts_per_axis_value": {name: round(rate, 1) for name, rate in sorted(mine.items())},
            "of_median": {name: round(rate / median, 3) if median else 1.0 for name, rate in sorted(mine.items())},
        }
    found["even"] = all(share >= FIFTH for share in found["quick"]["of_median"].values())
    return found


def of_store(store: Path) -> dict[str, Any]:
    """The evenness of a store's campaigns, by kind of device.

    Raises:
        DatabaseError: when there is no database of it, or none that can be read.
    """
    rates: dict[str, dict[str, float]] = {}
    with Database(path_beside(store), create=False) as database:
        for name, kind in subjects(database):
            try:
                rates.setdefault(kind, {})[name] = per_value(coverage_of(database, name, kind).values)
            except (UnknownBackend, BackendUnavailable):
                # It is gone since; so nothing is said of it.
                continue
    found = {}
    for kind, mine in rates.items():
        compiled = {each.backend for each in targets(list(mine), [kind], LEVELS, ("case",)) if each.compiled}
        found[kind] = evenness(mine, compiled)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path, nargs="?", default=Path(".attn-fuzz/findings"))
    try:
        found = of_store(parser.parse_args().store)
    except DatabaseError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(found, indent=1))
    sys.exit(0 if all(each["even"] for each in found.values()) else 1)


if __name__ == "__main__":
    main()
