"""What autograd is asked for decides what is computed, and never what comes out of it.

Inference runs without autograd, a frozen projection needs no gradient, and a graph that is kept may be taken back
twice. Kernels have paths of their own for each of these, which a suite that always asks for everything does not enter.
"""

from __future__ import annotations

from typing import Final

from attn_fuzz.execution.calls import Asked
from attn_fuzz.reference.case import Case

INFERENCE: Final = Asked(())
TWICE: Final = Asked(twice=True)

_SOME: Final = (
    ("when q alone needs a gradient", Asked(("q",))),
    ("when k alone needs a gradient", Asked(("k",))),
    ("when v alone needs a gradient", Asked(("v",))),
    ("when q needs no gradient", Asked(("k", "v"))),
)


def some_gradients(case: Case) -> tuple[str, Asked]:
    """Gradients of some inputs only, by the case's seed: in words, and as it is asked."""
    return _SOME[case.seed % len(_SOME)]
