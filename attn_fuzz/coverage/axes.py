"""The axes of a case, each a handful of named values, so that what was never drawn can be said.

Numbers of which there are thousands come in classes, named by where they begin and end. A new axis is an entry of
``AXES`` and a line in ``options_of``.
"""

from __future__ import annotations

import bisect
import itertools
from typing import Final, NamedTuple

from attn_fuzz.backends.kernel import Configuration
from attn_fuzz.batch.judge import LAUNCHED, SCHEDULE
from attn_fuzz.batch.layer_judge import LAYER_SCHEDULE
from attn_fuzz.batch.packed import PACKED_SCHEDULE
from attn_fuzz.generation.domain import HEAD_DIMS
from attn_fuzz.oracle.checks import PROBES, RARE, Check
from attn_fuzz.reference.case import DTYPES, FAR_MEMORIES, LEVELS, MEMORIES, Case

MODES: Final = ("case", "batch", "packed")

LENGTHS: Final = (0, 1, 2, 16, 64, 128, 256)
"""Where classes of queries and of keys of a document begin: none, one row, and where tiles and blocks end."""

OCTAVES: Final = (0, *(1 << power for power in range(15)))
"""Where finer classes begin, in which documents are counted for a map."""

DOCUMENTS: Final = (1, 2, 5, 17, 65)
"""Where classes of the number of documents of a call begin."""

GROUPS: Final = (1, 2, 3, 4, 5, 9)
"""Where classes of query heads per K/V head begin; groups above 8 are of many heads."""

OTHER: Final = "other"
"""A head dimension that is none of the usual ones."""

VALUE_CHANNELS: Final = ("same", "fewer", "more")
"""Than queries and keys have."""


def _classes(begins: tuple[int, ...]) -> tuple[str, ...]:
    """Names of classes of numbers: ``5-16``, or a single one; the last has no end."""
    inner = (f"{begin}" if end == begin + 1 else f"{begin}-{end - 1}" for begin, end in itertools.pairwise(begins))
    return (*inner, f"{begins[-1]}-")


def probe_name(probe: Check) -> str:
    """A probe of the case mode in words, as batches name theirs."""
    return probe.__name__.replace("_", " ")


ASKED: Final = {probe_name(probe): probe for probe in (*PROBES, *RARE)}
"""What a case can be asked beside its budgets, by name."""


class Axis(NamedTuple):
    """One of them."""

    name: str
    values: tuple[str, ...]


QUESTIONS: Final = tuple(
    dict.fromkeys(
        (
            *map(probe_name, PROBES),
            *(each.asked for each in (*SCHEDULE, *LAUNCHED, *LAYER_SCHEDULE, *PACKED_SCHEDULE) if each.asked),
        )
    )
)
"""What is asked of a case beside its budgets, by the probes of the case mode and the schedules of the others."""

AXES: Final = (
    Axis("dtype", DTYPES),
    Axis("head_dim", (*map(str, sorted(HEAD_DIMS)), OTHER)),
    Axis("group", _classes(GROUPS)),
    Axis("mask", ("causal", "full")),
    Axis("window", ("none", "left", "right", "both")),
    Axis("softcap", ("off", "on")),
    Axis("LSE gradient", ("off", "on")),
    Axis("value channels", VALUE_CHANNELS),
    Axis("memory", (*MEMORIES, *FAR_MEMORIES)),
    Axis("max_seqlen", ("tight", "loose")),
    Axis("gaps", ("none", "queries", "keys", "both")),
    Axis("queries", _classes(LENGTHS)),
    Axis("keys", _classes(LENGTHS)),
    Axis("documents", _classes(DOCUMENTS)),
    Axis("level", LEVELS),
    Axis("mode", MODES),
    Axis("question", QUESTIONS),
)
"""All of them. A case has one value of each, but for queries, keys and questions, of which it has some."""

Value = tuple[str, str]
"""(axis, value)."""

VALUES: Final[tuple[Value, ...]] = tuple((axis.name, value) for axis in AXES for value in axis.values)
PLACES: Final[dict[Value, int]] = {value: place for place, value in enumerate(VALUES)}
"""Where each stands in ``VALUES``."""


def class_of(number: int, begins: tuple[int, ...]) -> int:
    """Which class a number is in, from 0."""
    return bisect.bisect_right(begins, number) - 1


def group_of(heads: int, kv_heads: int) -> str:
    """The class of so many query heads per K/V head."""
    return AXES[2].values[class_of(heads // kv_heads, GROUPS)]


GAPS: Final = {(False, False): "none", (True, False): "queries", (False, True): "keys", (True, True): "both"}
"""Names of where rows between documents are, by (of queries, of keys)."""


def dim_of(head_dim: int) -> str:
    """A head dimension by its name."""
    return name if ("head_dim", name := str(head_dim)) in PLACES else OTHER


def value_channels_of(head_dim: int, head_dim_v: int | None) -> str:
    """Whether values have as many channels as queries and keys."""
    return VALUE_CHANNELS[0 if head_dim_v is None else 1 if head_dim_v < head_dim else 2]


def options_of(case: Case) -> dict[str, str]:
    """Values of the axes that a case says by itself, whatever documents it has, by axis."""
    chosen = Configuration.of(case)
    return {
        "dtype": case.dtype,
        "head_dim": dim_of(case.head_dim),
        "group": group_of(case.heads, case.kv_heads),
        "mask": "causal" if case.causal else "full",
        "window": chosen.window,
        "softcap": "on" if case.softcap else "off",
        "LSE gradient": "on" if case.lse_gradient else "off",
        "value channels": value_channels_of(case.head_dim, case.head_dim_v),
        "memory": case.memory,
        "max_seqlen": "tight" if case.loose_max_seqlen == (0, 0) else "loose",
        "gaps": GAPS[case.gaps[0] > 0, case.gaps[1] > 0],
        "level": case.level,
    }
