"""Kernel inputs whose running sums are far larger than their results: what is added up in the storage dtype is lost.

q = 0, so that all keys of a row weigh the same. Over a document's keys K and V are first +B, then mostly +1 and
sometimes -1, then -B, as often as +B. Beside the sum of the first keys the dtype cannot tell what a tile of the middle
adds, and in the end the large ones cancel: float32 sums give the sum of the middle, others give less of it.

Weights need not be the same to the last bit: they are rounded, by a split of the keys perhaps, and large values then do
not cancel. Channel 1 therefore has the same large values and a middle of zeros: what is judged is the difference to it,
to which the weights of the large keys contribute nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch

from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import Segment, call_segments
from attn_fuzz.reference.profile import UNIT_ROUNDOFF
from attn_fuzz.reference.values import DTYPES, draw

LARGE: Final = {"bf16": 256, "fp16": 2048}
"""B, to which the dtype counts one by one: a sum of m of them is kept to multiples of m at best, rounding m/2 away."""

FEWEST_KEYS: Final = 32
REFERENCE_CHANNEL: Final = 1
MOST_LARGE: Final = 128
# 5/8 of a normal variable: the middle's mean is 1/4, its tiles stay below what is rounded away, and its sum is large.
MOSTLY: Final = 0.3186
# Of scales, over the softcap where there is one: outside, fp16 gradients of scores would be subnormal, or overflow.
_SCALES = (2.0**-10, 4.0)


@dataclasses.dataclass(frozen=True)
class Swamped:
    """One document whose last row is judged: it sees all keys."""

    segment: Segment
    large: int
    """How many keys are +B, and as many -B."""

    @property
    def count(self) -> int:
        """Keys."""
        return self.segment.keys.length

    @property
    def gradient(self) -> float:
        """The output gradient of the last row's channel 0: dS is near 1/8, and sums of dQ stay within fp16's range."""
        return 2.0 ** (min(math.floor(math.log2(self.count)), 15) - 3)


@dataclasses.dataclass(frozen=True)
class SwampingProbe:
    """Inputs, and the documents whose last rows are judged; the gradients of K and V are not."""

    inputs: Inputs
    swamped: tuple[Swamped, ...]


def _judged(case: Case) -> Iterator[Swamped]:
    left = case.effective_window[0]
    for segment in call_segments(case):
        count = segment.keys.length
        if segment.queries.length and count >= FEWEST_KEYS and not 0 <= left < count - 1:
            # An even number of large keys, half of which have either sign in K.
            yield Swamped(segment, min(count // 4, MOST_LARGE) // 2 * 2)


def swamps(case: Case) -> bool:
    """Whether a kernel case has a channel to compare with, and gradients of scores that are everyday numbers."""
    low, high = _SCALES
    fits = case.level == "kernel" and case.dtype in LARGE and case.head_dim > REFERENCE_CHANNEL
    return fits and low * max(1.0, case.softcap) <= case.softmax_scale <= high


def swamping_probe(case: Case) -> SwampingProbe | None:
    """The probe of a kernel case, or None where there is no long document or it cannot be swamped.

    V's channel 0 has alternate signs s that add up to 0, K is s times its pattern, and the output gradient is in
    channel 0 of last rows only. Then dP = +-dO, D = 0, and dQ is the sum of K's pattern times ``scale dO / n``.
    """
    if not swamps(case) or not (swamped := tuple(_judged(case))):
        return None
    dtype = DTYPES[case.dtype]
    plain = case.replace(values="gaussian", dtype="fp32")
    k, v = (
        torch.where(draw(plain, name, case.kv_heads, case.head_dim, "cpu", keys=True) < MOSTLY, 1.0, -1.0)
        for name in ("swamped keys", "swamped values")
    )
    q = torch.zeros(sum(case.packed_lengths), case.heads, case.head_dim)
    dout = torch.zeros_like(q)
    for document in swamped:
        begin, end = document.segment.keys
        for x in (k[begin:end], v[begin:end]):
            x[:, :, REFERENCE_CHANNEL] = 0.0
            x[: document.large] = LARGE[case.dtype]
            x[-document.large :] = -LARGE[case.dtype]
        signs = _balanced(document.count)
        k[begin:end] *= signs[:, None, None]
        v[begin:end, :, 0] = signs[:, None]
        dout[document.segment.queries.end - 1, :, 0] = document.gradient
    return SwampingProbe(Inputs(*(x.to(dtype) for x in (q, k, v, dout))), swamped)


def _balanced(count: int) -> torch.Tensor:
    """Alternate signs with a sum of 0: of an odd number the one in the middle is 0."""
    signs = 1.0 - 2.0 * (torch.arange(count // 2 * 2) % 2)
    half = count // 2
    return torch.cat([signs[:half], torch.zeros(count % 2), signs[half:]])


def sums_of(case: Case, probe: SwampingProbe, document: Swamped) -> dict[str, tuple[torch.Tensor, float]]:
    """``out`` and ``dq`` of a document's last row: float64 ``[heads, head_dim]``, and what a single +1 is in them."""
    keys = slice(*document.segment.keys)
    group = case.heads // case.kv_heads
    k, v = (x[keys].double().repeat_interleave(group, 1) for x in (probe.inputs.k, probe.inputs.v))
    unit = case.softmax_scale * document.gradient / document.count
    dq = unit * torch.einsum("kh,khd->hd", v[..., 0], k)
    return {"out": (v.sum(0) / document.count, 1 / document.count), "dq": (dq, unit)}


def beside(x: torch.Tensor) -> torch.Tensor:
    """Differences to the reference channel, ``[..., head_dim]``."""
    return x - x[..., [REFERENCE_CHANNEL]]


class Sized(NamedTuple):
    """A document, or several in a shape that results broadcast with."""

    keys: int | torch.Tensor
    large: int | torch.Tensor
    """How many of them are large, of either sign."""
    unit: float | torch.Tensor
    """What a single +1 is in the result."""


def swamped(
    case: Case,
    name: str,
    sized: Sized,
    error: float,
    got: torch.Tensor,
    expected: torch.Tensor,
) -> torch.Tensor:
    """Whether differences to the reference channel are beyond what roundings can make: bounds, not deviations.

    A key's weight is rounded up to six times (P, P once more, dS, dS times scale, K times the root of the scale, and
    float32 around them): at most 8 times ``error``, the dtype's u or what is declared, for each key of the middle. A
    float32 sum in any order is off by 2^-24 of its largest partial sum per addition, in either channel; of tensor
    cores, which cut off, per 16 keys and by twice that. The two results are stored, and once more where they are scaled
    afterwards.

    Args:
        case: a kernel case.
        name: ``out`` or ``dq``.
        sized: the documents.
        error: the largest relative error of a weight (``slack.weight_error``).
        got: the result, float64 ``[..., heads, head_dim]``.
        expected: what ``sums_of`` says.
    """
    unit_roundoff, (count, large, unit) = UNIT_ROUNDOFF[case.dtype], sized
    middle = count - 2 * large
    largest = LARGE[case.dtype] * large + middle
    inside = 8 * error * middle + 2 * count * 2.0**-24 * largest
    stored = 2 * unit_roundoff * (got.abs() + got[..., [REFERENCE_CHANNEL]].abs())
    wrong = ~((beside(got) - beside(expected)).abs() <= unit * inside + stored) | ~got.isfinite()
    if name == "out":
        # Channel 0 has no large values: it makes the gradient.
        wrong[..., 0] = False
    return wrong
