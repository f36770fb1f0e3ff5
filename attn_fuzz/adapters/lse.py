"""The LSE that a kernel gives beside its output: where its heads and rows are, and in which logarithm."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import torch

from attn_fuzz.backends.output import MisshapenResult

_BASES: Final = {"e": 1.0, "2": math.log(2.0), "10": math.log(10.0)}


@dataclasses.dataclass(frozen=True)
class Lse:
    """How a function gives the log of its row sums; handed to an adapter, it has the LSE judged, too.

        kernel = adapters.varlen(function, lse=Lse("th", base="2"))

    Raises:
        ValueError: for a layout or a base that there is not; one sentence.
    """

    layout: str = "hs"
    """Its dimensions in order: ``b`` documents, ``h`` heads, ``s`` rows (``t`` is the same)."""
    base: str = "e"
    """Of the logarithm: ``e``, ``2`` or ``10``."""
    index: int = 1
    """Its place in the tuple that the function returns; the output is the first."""

    def __post_init__(self) -> None:
        if sorted(self.layout.replace("t", "s")) not in (["h", "s"], ["b", "h", "s"]):
            raise ValueError(f"the layout of an LSE is made of b, h and s, or h and s, not {self.layout!r}")
        if self.base not in _BASES:
            raise ValueError(f"the base of an LSE is {', '.join(_BASES)}, not {self.base!r}")

    def of(self, returned: Any) -> torch.Tensor:
        """The LSE in what a function returned, natural, ``[b, h, s]`` or ``[h, s]``, float32, with its graph.

        Raises:
            MisshapenResult: where there is none.
        """
        found = returned[self.index] if isinstance(returned, (tuple, list)) and len(returned) > self.index else None
        if not isinstance(found, torch.Tensor) or found.dim() != len(self.layout):
            what = f"a tensor [{', '.join(self.layout)}]"
            raise MisshapenResult(f"the kernel should return an LSE, {what}, at place {self.index} of a tuple")
        layout = self.layout.replace("t", "s")
        order = [layout.index(each) for each in "bhs" if each in layout]
        return (found.permute(order).double() * _BASES[self.base]).float()


def split(returned: Any, lse: Lse | None) -> tuple[Any, torch.Tensor | None]:
    """(output, LSE as ``Lse.of`` gives it, or None where none is asked for) of what a function returned."""
    out = returned[0] if isinstance(returned, (tuple, list)) and returned else returned
    return out, None if lse is None else lse.of(returned)


def require_shape(out: object, shape: torch.Size, what: str) -> torch.Tensor:
    """Raises MisshapenResult unless something is a tensor of a shape; ``what`` begins the sentence."""
    if not isinstance(out, torch.Tensor):
        raise MisshapenResult(f"{what} should be a tensor, but is {type(out).__name__}")
    if out.shape != shape:
        raise MisshapenResult(f"{what} has shape {list(out.shape)}, but should have {list(shape)}")
    return out
