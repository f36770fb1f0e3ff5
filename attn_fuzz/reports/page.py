"""The page itself: everything that is told of bugs, known issues and campaigns, in one HTML file."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from attn_fuzz import __version__
from attn_fuzz.findings.entry import Entry
from attn_fuzz.findings.templates import templates
from attn_fuzz.reports import pictures
from attn_fuzz.reports.measured import Measured
from attn_fuzz.reports.told import Told


def _histograms(measured: Measured) -> list[tuple[str, list[tuple[str, str]]]]:
    """By backend: dtype and tensor, and the picture."""
    every = sorted(measured.histograms.items())
    return [
        (backend, [(name, pictures.histogram(name, counts)) for (_, name), counts in several])
        for backend, several in itertools.groupby(every, key=lambda item: item[0][0])
    ]


def page(title: str, made: str, bugs: Sequence[Told], known: Sequence[Entry], measured: Measured) -> str:
    """The HTML.

    Args:
        title: of the page.
        made: when and where, in words.
        bugs: what was found.
        known: entries of known issues and declared limits.
        measured: what campaigns counted.
    """
    series = sorted({piece.backend for piece in measured.pieces})
    values: dict[str, Any] = {
        "title": title,
        "made": made,
        "version": __version__,
        "bugs": bugs,
        "states": sorted(Counter(told.entry.state for told in bugs).items()),
        "bugs_of": Counter(told.entry.signature.backend for told in bugs),
        "known": known,
        "measured": measured,
        "kinds": sorted({kind for each in measured.backends for kind in each.kinds}),
        "histograms": _histograms(measured),
        "coverage": [(name, pictures.coverage_map(lengths)) for name, lengths in sorted(measured.lengths.items())],
        "throughput": pictures.throughput(measured.pieces, series) if measured.pieces else "",
        "series": series,
    }
    return templates(__file__, autoescape=True).get_template("report.html.jinja").render(**values)
