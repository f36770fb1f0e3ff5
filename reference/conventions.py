"""What a buffered layer may do otherwise than the canonical one, and be as right: facts that its answer depends on."""

from __future__ import annotations

import dataclasses
from typing import Final

ROTARY_POSITIONS: Final = ("document", "packed")
GRADIENT_ROWS: Final = ("kept", "consumed")
PADDING: Final = ("computed", "zero", "skipped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conventions:
    """Of a layer; the defaults are those of the canonical one."""

    rotary_positions: str = "document"
    """What rotary turns by: the position in the ``document``, or in the ``packed`` sequence. Scores are the same, since
    they depend on differences; keys, their gradients, and the roundings of larger angles are not."""
    gradient_rows: str = "kept"
    """What becomes of the K/V gradient rows that a backward takes for its own micro-sequence: ``kept`` as they are, or
    ``consumed``, written over in place. Then each row is judged by what it holds before that step: what the queries of
    later micro-sequences have added to it."""
    padding: str = "computed"
    """Padding is ``computed`` as a document is. Or no row of it has a gradient, nor adds to any; then its rows of
    outputs and input gradients are ``zero``, or, ``skipped``, hold anything. Its keys and values are looked at in
    neither case."""

    @property
    def computes_padding(self) -> bool:
        """Whether padding is a document like any other."""
        return self.padding == "computed"


USUAL: Final = Conventions()
