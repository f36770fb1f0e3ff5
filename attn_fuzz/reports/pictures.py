"""Pictures of a report: where a finding fails, errors by how large they are, what was covered, how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch

from attn_fuzz.oracle.checks.budget import HISTOGRAM_STEP
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.reference.layout import document_spans
from attn_fuzz.reports.failing_set import OF_KEYS, OF_ROWS, FailingSet
from attn_fuzz.reports.measured import Piece
from attn_fuzz.reports.svg import Figure

_MOST_CELLS: Final = 72
"""Rows or keys that are drawn one by one; of more, several share a cell."""
_GRID: Final = 380.0
"""Pixels of the longer side of the grid of rows and keys."""
_LARGEST_CELL: Final = 26.0
_BAND: Final = 16.0
"""Pixels of a tensor's marks beside the grid."""
_EDGE: Final = 56.0
"""Pixels left of and above a grid, for names."""


def _pooled(x: torch.Tensor, cells: int) -> torch.Tensor:
    """Of a bool vector or matrix: whether any of those that share a cell is true, along its first dimension."""
    if len(x) <= cells:
        return x
    return torch.stack([part.any(0) for part in x.tensor_split(cells)])


class _Grid:
    """Rows and keys of a case, drawn in cells."""

    def __init__(self, failing: FailingSet) -> None:
        seen = failing.seen()
        self.rows, self.keys = seen.shape
        self.cells = min(self.rows, _MOST_CELLS), min(self.keys, _MOST_CELLS)
        self.seen = _pooled(_pooled(seen, self.cells[0]).T, self.cells[1]).T
        self.cell = min(_LARGEST_CELL, _GRID / max(*self.cells, 1))
        self.left = _EDGE + _BAND * sum(name in failing.tensors for name in OF_ROWS)

    def x(self, key: float) -> float:
        return self.left + self.cell * key * self.cells[1] / max(self.keys, 1)

    def y(self, row: float) -> float:
        return _EDGE + self.cell * row * self.cells[0] / max(self.rows, 1)


def where_it_fails(failing: FailingSet) -> str:
    """Documents' rows and keys: which see which, and beside them, by tensor, which are wrong."""
    grid, case = _Grid(failing), failing.case
    below = [name for name in OF_KEYS if name in failing.tensors]
    width = grid.x(grid.keys) + 24
    height = grid.y(grid.rows) + _BAND * len(below) + 30
    figure = Figure(max(width, 240), height, f"Rows and keys of {', '.join(failing.tensors)} that are wrong")
    for row, line in enumerate(grid.seen.tolist()):
        for key, sees in enumerate(line):
            if sees:
                place = grid.left + grid.cell * key, _EDGE + grid.cell * row
                figure.rectangle(place, (grid.cell - 0.5, grid.cell - 0.5), "seen")
    _documents(figure, grid, failing)
    beside = [name for name in OF_ROWS if name in failing.tensors]
    for at, name in enumerate(beside):
        wrong = _pooled(failing.wrong[name].flatten(1).any(1), grid.cells[0]).tolist()
        x = _EDGE + _BAND * at
        figure.text((x + _BAND / 2 - 1, _EDGE - 6), name, "middle")
        for row, bad in enumerate(wrong):
            place = x, _EDGE + grid.cell * row
            figure.rectangle(place, (_BAND - 3, grid.cell - 0.5), "wrong" if bad else "fine", f"{name}, row {row}")
    for at, name in enumerate(below):
        wrong = _pooled(failing.wrong[name].flatten(1).any(1), grid.cells[1]).tolist()
        y = grid.y(grid.rows) + 4 + _BAND * at
        figure.text((grid.left - 5, y + 11), name, "end")
        for key, bad in enumerate(wrong):
            place = grid.left + grid.cell * key, y
            figure.rectangle(place, (grid.cell - 0.5, _BAND - 3), "wrong" if bad else "fine", f"{name}, key {key}")
    figure.text((grid.left, _EDGE - 24), f"keys {grid.keys}, documents {len(case.packed_lengths)}")
    figure.text((4, _EDGE + 12), "rows")
    figure.text((4, _EDGE + 26), str(grid.rows))
    return str(figure)


def _documents(figure: Figure, grid: _Grid, failing: FailingSet) -> None:
    """Borders of documents, and where a layer's sequence is cut."""
    case = failing.case
    spans = zip(document_spans(case.packed_lengths), document_spans(case.packed_key_lengths), strict=True)
    for number, (rows, keys) in enumerate(spans):
        x, y = grid.x(keys.begin), grid.y(rows.begin)
        size = grid.x(keys.end) - x, grid.y(rows.end) - y
        if min(size) > 0:
            figure.rectangle((x, y), size, "document", f"document {number}: {rows.length} rows, {keys.length} keys")
        if size[0] >= 12:
            figure.text((x + size[0] / 2, _EDGE - 6), str(number), "middle")
    for cut in case.cuts:
        figure.line((grid.left, grid.y(cut)), (grid.x(grid.keys), grid.y(cut)), "cut")


def heads_and_channels(failing: FailingSet, name: str) -> str:
    """Of one result: by head and channel, the share of its rows that are wrong."""
    mask = failing.wrong[name]
    if not mask.numel():
        return ""
    share = mask.double().mean(0)
    heads, channels = share.shape
    groups = min(channels, 64)
    cell = max(5.0, min(18.0, 330 / groups))
    figure = Figure(
        _EDGE + max(groups * cell + 30, 150), heads * 14 + 34, f"Heads and channels of {name} that are wrong"
    )
    for head in range(heads):
        figure.text((_EDGE - 6, 28 + head * 14), f"head {head}", "end")
        for at, part in enumerate(share[head].tensor_split(groups)):
            value = float(part.max())
            place = _EDGE + at * cell, 18.0 + head * 14
            figure.rectangle(place, (cell - 1, 12), "fine")
            if value:
                title = f"{name}, head {head}, channel {at * channels // groups}: {value:.0%} of rows wrong"
                figure.shaded(place, (cell - 1, 12), "wrong", 0.25 + 0.75 * value, title)
    figure.text((_EDGE, 12), f"{name}: channels 0 to {channels - 1}")
    return str(figure)


def _bars(figure: Figure, heights: Sequence[float], kinds: Sequence[str], titles: Sequence[str]) -> None:
    """Bars between the axes of a figure."""
    step = (figure.width - 60) / max(len(heights), 1)
    for at, (height, kind, title) in enumerate(zip(heights, kinds, titles, strict=True)):
        tall = height * (figure.height - 48)
        figure.rectangle((44 + at * step, figure.height - 28 - tall), (step - 1, tall), kind, title)
    figure.line((44, figure.height - 28), (figure.width - 14, figure.height - 28), "axis")


def histogram(name: str, counts: Sequence[int]) -> str:
    """Elements by z, the number of them on a logarithmic scale, and the limit of the verdict."""
    figure = Figure(330, 170, f"Elements of {name} by error in standard deviations")
    most = max(1.0, math.log10(max(*counts, 1) + 1))
    titles = [f"z from {at * HISTOGRAM_STEP:g}: {count:,} elements" for at, count in enumerate(counts)]
    kinds = ["bar" if at * HISTOGRAM_STEP < LIMIT else "wrong" for at in range(len(counts))]
    _bars(figure, [math.log10(count + 1) / most for count in counts], kinds, titles)
    width = figure.width - 60
    for z in range(0, int(len(counts) * HISTOGRAM_STEP) + 1, 2):
        figure.text((44 + width * z / (len(counts) * HISTOGRAM_STEP), figure.height - 12), str(z), "middle")
    for power in range(0, int(most) + 1, max(1, int(most) // 3)):
        y = figure.height - 28 - (figure.height - 48) * power / most
        figure.text((40, y + 4), f"1e{power}", "end")
    limit = 44 + width * LIMIT / (len(counts) * HISTOGRAM_STEP)
    figure.line((limit, 14), (limit, figure.height - 28), "limit")
    return str(figure)


def coverage_map(lengths: Mapping[tuple[int, int], int]) -> str:
    """Documents by octaves of their queries and keys."""
    every = sorted({length for pair in lengths for length in pair})
    cell, most = 27.0, math.log10(max([*lengths.values(), 1]) + 1)
    figure = Figure(_EDGE + cell * len(every) + 10, _EDGE + cell * len(every) + 10, "Documents by queries and keys")
    for column, keys in enumerate(every):
        figure.text((_EDGE + cell * (column + 0.5), _EDGE - 6), _short(keys), "middle")
        for row, queries in enumerate(every):
            place, count = (_EDGE + cell * column, _EDGE + cell * row), lengths.get((queries, keys), 0)
            title = f"{queries} or more queries, {keys} or more keys: {count:,} documents"
            figure.rectangle(place, (cell - 1, cell - 1), "fine", title)
            if count:
                share = 0.2 + 0.8 * math.log10(count + 1) / most
                figure.shaded(place, (cell - 1, cell - 1), "bar", share, title)
    for row, queries in enumerate(every):
        figure.text((_EDGE - 6, _EDGE + cell * (row + 0.65)), _short(queries), "end")
    figure.text((_EDGE, 18), "keys, to the right; queries, down")
    return str(figure)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)


_BINS: Final = 60


def throughput(pieces: Sequence[Piece], backends: Sequence[str]) -> str:
    """Cases per second over time, one line a backend; whose line it is the page's legend says.

    Args:
        pieces: of work, of any order.
        backends: in the order of the legend.
    """
    ends = max((piece.begin + piece.seconds for piece in pieces), default=1.0)
    rates = {name: [0.0] * _BINS for name in backends}
    for piece in pieces:
        # One that has just begun when all end lies in the last bin, too.
        first, last = (min(int(_BINS * t / ends), _BINS - 1) for t in (piece.begin, piece.begin + piece.seconds))
        share = piece.cases / (last - first + 1) / (ends / _BINS)
        for at in range(first, last + 1):
            rates[piece.backend][at] += share
    figure = Figure(720, 240, "Cases per second over time")
    most = max([*(rate for line in rates.values() for rate in line), 1e-9])
    for number, name in enumerate(backends):
        points = [(50 + 650 * (at + 0.5) / _BINS, 210 - 190 * rate / most) for at, rate in enumerate(rates[name])]
        figure.path(points, f"series series-{number % 8}")
    figure.line((50, 210), (700, 210), "axis")
    figure.line((50, 20), (50, 210), "axis")
    for share in (0.0, 0.5, 1.0):
        figure.text((46, 214 - 190 * share), f"{most * share:.3g}", "end")
        figure.text((50 + 650 * share, 228), f"{ends * share:.0f} s", "middle")
    return str(figure)
