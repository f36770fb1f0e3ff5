"""Orders of a tensor's dimensions, by letters: ``b`` documents, ``s`` rows (or ``t``), ``h`` heads, ``d`` channels."""

from __future__ import annotations

import torch


def checked(layout: str) -> str:
    """A layout with ``s`` for ``t``.

    Raises:
        ValueError: for one that there is not; one sentence.
    """
    found = layout.replace("t", "s")
    if sorted(found) not in (sorted("shd"), sorted("bshd")):
        raise ValueError(f"a layout is made of b, s, h and d, each once, or without b, not {layout!r}")
    return found


def arranged(x: torch.Tensor, layout: str) -> torch.Tensor:
    """``[b, s, h, d]`` in another order; without ``b`` in the layout, the only document of a batch."""
    if "b" not in layout:
        return x[0].permute(["shd".index(each) for each in layout])
    return x.permute(["bshd".index(each) for each in layout])


def restored(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The inverse of ``arranged``."""
    found = x.permute([layout.index(each) for each in "bshd" if each in layout])
    return found if "b" in layout else found[None]
