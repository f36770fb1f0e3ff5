"""Runs of Hypothesis: cases of a level, a few at a time.

Within a run Hypothesis goes on from what it has drawn, by copying parts of a case to other parts of it: most of fifty
cases in a row resemble an earlier one. A few cases per run are all new, and an engine costs less than a case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed

from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.strategies import cases
from attn_fuzz.reference.case import Case

FEW: Final = 4
"""Cases per run."""


def few_cases(
    level: str, domain: Domain, seed: int, test: Callable[[Case], None], count: int = FEW, *, shrink: bool = False
) -> None:
    """Hands so many cases to a test, always the same ones for a seed.

    Args:
        level: of the cases.
        domain: what to draw from.
        seed: of this run.
        test: raises where a case fails.
        count: how many cases.
        shrink: whether a failing case is shrunk before the exception comes out.
    """
    options = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    hypothesis_seed(seed)(options(given(cases(level, domain))(test)))()
