"""What shape an output has, and what is said of one that has another."""

from __future__ import annotations

import torch


class MisshapenResult(TypeError):
    """A kernel gave something else than the output that was asked for; the message says what, in one sentence."""


def as_output(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A view of the queries with as many channels as values have: of the output's shape, dtype and device."""
    return q if q.shape[-1] == v.shape[-1] else q[..., :1].expand(*q.shape[:-1], v.shape[-1])


def require_output(out: object, q: torch.Tensor, v: torch.Tensor) -> None:
    """Raises MisshapenResult unless an output has the shape, dtype and device of the queries, and V's channels."""
    if not isinstance(out, torch.Tensor):
        raise MisshapenResult(f"the output should be a tensor, but is {type(out).__name__}")
    if differs := first_mismatch(out, as_output(q, v)):
        what, got, wanted = differs
        channels = " with the channels of v" if what == "shape" and q.shape[-1] != v.shape[-1] else ""
        raise MisshapenResult(f"the output's {what} is {got}, but should be {wanted}, that of q{channels}")


def first_mismatch(got: torch.Tensor, wanted: torch.Tensor) -> tuple[str, object, object] | None:
    """Of shape, dtype and device the first in which a tensor is not as wanted, with what it is and should be."""
    for what in ("shape", "dtype", "device"):
        mine, other = getattr(got, what), getattr(wanted, what)
        if mine != other:
            return (what, list(mine), list(other)) if what == "shape" else (what, mine, other)
    return None
