"""Memory of a campaign over time: whether it is flat, by a stated rule, and a picture of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

RULE: Final = (
    "Over the last two thirds of the time, a slope times that time is below a tenth of the median. Of what lives as "
    "long as the campaign, the supervisor's memory and that of the process that workers are forked from, and of the "
    "most processes that there were in each minute, it is the median slope between any two points. Of the least that "
    "workers had in each minute (of those ten seconds old and older, the one in the middle) it is the least slope that "
    "is likely (Sen's lower bound of 95 percent): workers come and go, and what they have depends on what they were "
    "given. All while there are workers, and half a minute and more after each start of a supervisor."
)

_RISE: Final = 0.1
"""Of the median."""

_LIKELY: Final = 1.645
"""Standard deviations of Kendall's statistic beyond which it is by chance once in twenty times."""

_SETTLED: Final = 30.0
"""Seconds after its start in which a supervisor imports what it needs."""

_MINUTE: Final = 60.0

_AT_WORK: Final = 5
"""Processes: the supervisor, two of multiprocessing's own, and workers."""


Points = Sequence[tuple[float, float]]
"""Moments, in seconds, and what there was at each."""


class Sample(NamedTuple):
    """One look at the processes of a campaign."""

    at: float
    """Seconds since the soak began."""
    supervisor: int
    """Bytes of it in memory; 0 while there is none."""
    every: int
    """Bytes of all processes in memory; what they share is counted in each."""
    processes: int
    servers: int
    """Bytes of what the supervisor has started: the process that workers are forked from, most of all."""
    worker: int
    """Bytes of the worker in the middle, of those that have been there for a while; 0 where there is none."""


class Kill(NamedTuple):
    """One process that was ended."""

    at: float
    supervisor: bool


def _slopes(points: Points) -> list[float]:
    """Between any two points, the least first."""
    return sorted(
        (later - earlier) / (end - begin)
        for index, (begin, earlier) in enumerate(points)
        for end, later in points[index + 1 :]
        if end > begin
    )


def slope(points: Points) -> float:
    """The median slope between any two points (Theil 1950), which outliers do not move; 0 where there are fewer."""
    found = _slopes(points)
    return statistics.median(found) if found else 0.0


def least_slope(points: Points) -> float:
    """The least slope that is likely of points that are scattered: with 95 percent it is larger (Sen 1968)."""
    found, number = _slopes(points), len(points)
    deviation = math.sqrt(number * (number - 1) * (2 * number + 5) / 18)
    below = round((len(found) - _LIKELY * deviation) / 2)
    return found[max(below, 0)] if found else 0.0


def rise(points: Points, slope_of: Callable[[Points], float] = slope) -> float:
    """By what share of their median points rise over the last two thirds of their time; negative where they fall.

    Args:
        points: in order of time.
        slope_of: such points.
    """
    if not points:
        return 0.0
    begin, end = points[0][0], points[-1][0]
    last = [point for point in points if point[0] >= begin + (end - begin) / 3]
    median = statistics.median(value for _, value in last)
    return slope_of(last) * (last[-1][0] - last[0][0]) / median if median else 0.0


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


def by_minute(points: Points, choose: Callable[[Sequence[float]], float]) -> list[tuple[float, float]]:
    """The least, or the most, of each minute, at the minute's middle."""
    minutes: dict[int, list[float]] = {}
    for at, value in points:
        minutes.setdefault(int(at // _MINUTE), []).append(value)
    return [((minute + 0.5) * _MINUTE, choose(values)) for minute, values in sorted(minutes.items())]


def floors(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """The least bytes in each minute of the worker in the middle."""
    return by_minute([(sample.at, float(sample.worker)) for sample in samples if sample.worker], min)


def flatness(samples: Sequence[Sample], starts: Sequence[float]) -> dict[str, Any]:
    """Whether memory is flat by ``RULE``, and the numbers, ready for JSON; bytes are told in megabytes.

    Args:
        samples: in order of time.
        starts: when supervisors started, in seconds.
    """
    counted = settled(samples, starts)
    own = [(each.at, float(each.supervisor)) for each in counted]
    servers = [(each.at, float(each.servers)) for each in counted]
    worker, most = floors(counted), by_minute([(each.at, float(each.processes)) for each in counted], max)
    rises = {
        "supervisor": rise(own),
        "servers": rise(servers),
        "worker": rise(worker, least_slope),
        "processes": rise(most),
    }

    def megabytes(points: Points) -> float:
        return round(statistics.median(value for _, value in points) / 1e6, 1) if points else 0.0

    return {
        "flat": all(each < _RISE for each in rises.values()),
        "rule": RULE,
        "rise": {name: round(each, 4) for name, each in rises.items()},
        "supervisor_megabytes": megabytes(own),
        "servers_megabytes": megabytes(servers),
        "worker_megabytes": megabytes(worker),
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

    figure, (above, middle, below) = pyplot.subplots(
        3, 1, sharex=True, figsize=(9, 6.4), height_ratios=(5, 3, 1), constrained_layout=True
    )
    minutes = [sample.at / _MINUTE for sample in samples]
    above.fill_between(minutes, [each.every / 1e9 for each in samples], color="#9ec9e2", lw=0)
    above.set_ylabel("all processes, GB")
    above.set_title(f"{title}; resident memory", loc="left", fontsize=10)
    least = floors(settled(samples, starts))
    middle.step(
        [at / _MINUTE for at, _ in least],
        [value / 1e6 for _, value in least],
        where="mid",
        color="#08519c",
        label="the worker in the middle, least of each minute",
    )
    lasting = (
        ("supervisor", "#d94801", [each.supervisor for each in samples]),
        ("what workers are forked from", "#238b45", [each.servers for each in samples]),
    )
    for name, colour, values in lasting:
        middle.plot(minutes, [value / 1e6 or float("nan") for value in values], color=colour, label=name)
    middle.set_ylabel("one process, MB")
    for axes in (above, middle):
        axes.set_ylim(bottom=0)
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
    for axes in (above, middle, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
