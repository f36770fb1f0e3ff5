"""Memory of a campaign over time: whether it is flat, by a stated rule, and a picture of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

RULE: Final = (
    "Over the last two thirds of the time, the median slope between any two points, times that time, is below a tenth "
    "of their median: of the supervisor's memory, and of the least memory that all processes together had in each "
    "minute, which is what stays when no kernel fills it; both while there are workers, and half a minute and more "
    "after each start of a supervisor."
)

_RISE: Final = 0.1
"""Of the median."""

_SETTLED: Final = 30.0
"""Seconds after its start in which a supervisor imports what it needs."""

_MINUTE: Final = 60.0

_AT_WORK: Final = 5
"""Processes: the supervisor, two of multiprocessing's own, and workers."""


class Sample(NamedTuple):
    """One look at the processes of a campaign."""

    at: float
    """Seconds since the soak began."""
    supervisor: int
    """Bytes of it in memory; 0 while there is none."""
    every: int
    """Bytes of all processes in memory; what they share is counted in each."""
    processes: int


class Kill(NamedTuple):
    """One process that was ended."""

    at: float
    supervisor: bool


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median slope between any two points (Theil 1950), which outliers do not move; 0 where there are fewer."""
    found = [
        (later - earlier) / (end - begin)
        for index, (begin, earlier) in enumerate(points)
        for end, later in points[index + 1 :]
        if end > begin
    ]
    return statistics.median(found) if found else 0.0


def rise(points: Sequence[tuple[float, float]]) -> float:
    """By what share of their median points rise over the last two thirds of their time; negative where they fall."""
    if not points:
        return 0.0
    begin, end = points[0][0], points[-1][0]
    last = [point for point in points if point[0] >= begin + (end - begin) / 3]
    median = statistics.median(value for _, value in last)
    return slope(last) * (last[-1][0] - last[0][0]) / median if median else 0.0


def settled(samples: Sequence[Sample], starts: Sequence[float]) -> list[Sample]:
    """Those while there was a supervisor with workers that had started a while ago.

    Args:
        samples: in order of time.
        starts: when supervisors started, in seconds.
    """
    return [
        sample
        for sample in samples
        if sample.supervisor
        and sample.processes >= _AT_WORK
        and not any(0 <= sample.at - start < _SETTLED for start in starts)
    ]


def floors(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """The least memory of all processes in each minute, at the minute's middle."""
    least: dict[int, int] = {}
    for sample in samples:
        minute = int(sample.at // _MINUTE)
        least[minute] = min(least.get(minute, sample.every), sample.every)
    return [((minute + 0.5) * _MINUTE, float(value)) for minute, value in sorted(least.items())]


def flatness(samples: Sequence[Sample], starts: Sequence[float]) -> dict[str, Any]:
    """Whether memory is flat by ``RULE``, and the numbers, ready for JSON; bytes are told in megabytes.

    Args:
        samples: in order of time.
        starts: when supervisors started, in seconds.
    """
    counted = settled(samples, starts)
    own, least = [(each.at, float(each.supervisor)) for each in counted], floors(counted)
    rises = {"supervisor": rise(own), "all_processes": rise(least)}

    def megabytes(values: Sequence[float]) -> float:
        return round(statistics.median(values) / 1e6, 1) if values else 0.0

    return {
        "flat": all(each < _RISE for each in rises.values()),
        "rule": RULE,
        "rise": {name: round(each, 4) for name, each in rises.items()},
        "supervisor_megabytes": megabytes([value for _, value in own]),
        "least_megabytes_of_a_minute": megabytes([value for _, value in least]),
        "most_megabytes": round(max((sample.every for sample in samples), default=0) / 1e6, 1),
        "most_processes": max((sample.processes for sample in samples), default=0),
    }


def draw(path: Path, samples: Sequence[Sample], starts: Sequence[float], kills: Sequence[Kill], title: str) -> bool:
    """Writes a PNG of the memory over time, with the kills below it.

    Returns:
        Whether it did: it needs matplotlib (``pip install attn-fuzz[reports]``).
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 5.2), height_ratios=(6, 1), constrained_layout=True
    )
    minutes = [sample.at / _MINUTE for sample in samples]
    above.fill_between(minutes, [each.every / 1e9 for each in samples], color="#9ec9e2", lw=0, label="all processes")
    least = floors(settled(samples, starts))
    above.step(
        [at / _MINUTE for at, _ in least],
        [value / 1e9 for _, value in least],
        where="mid",
        color="#08519c",
        label="least of each minute",
    )
    own = [sample.supervisor / 1e9 if sample.supervisor else float("nan") for sample in samples]
    above.plot(minutes, own, color="#d94801", label="supervisor")
    above.set_ylabel("resident memory, GB")
    above.set_ylim(bottom=0)
    above.set_title(title, loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    for name, which, place in (("worker", False, 0.0), ("supervisor", True, 1.0)):
        below.plot(
            [kill.at / _MINUTE for kill in kills if kill.supervisor is which],
            [place for kill in kills if kill.supervisor is which],
            "|",
            ms=12,
            color="black",
            label=name,
        )
    below.set_yticks((0.0, 1.0), ("worker killed", "supervisor killed"))
    below.set_ylim(-0.7, 1.7)
    below.set_xlabel("minutes")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
