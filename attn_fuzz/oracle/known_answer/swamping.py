"""Kernel inputs whose running sums are far larger than their results: what is added up in the storage dtype is lost.

q = 0, so that all keys of a row weigh the same. Over a document's keys K and V are first +B, then mostly +1 and
sometimes -1, then -B, as often as +B. Beside the sum of the first keys the dtype cannot tell what a tile of the middle
adds, and in the end the large ones cancel: float32 sums give the sum of the middle, others give less of it.

Weights need not be the same to the last bit: they are rounded, by a split of the keys perhaps, and large values then do
not cancel. Channel 1 therefore has the same large values and a middle of zeros: what is judged is the difference to it,
to which the weights of the large keys contribute nothing.

V's channel 0 has alternate signs s that add up to 0, K is s times its pattern, and the output gradient is in channel 0
of last rows only. Then dP = +-dO, D = 0, and dQ is the sum of K's pattern times ``scale dO / n``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final, NamedTuple

import torch

from attn_fuzz.oracle.known_answer.compared import Compared, Results
from attn_fuzz.oracle.known_answer.row_index import RowIndex
from attn_fuzz.oracle.known_answer.signs import drawn
from attn_fuzz.oracle.known_answer.slack import stores_dq, weight_error
from attn_fuzz.oracle.symptoms import NotExact, Symptom
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import UNIT_ROUNDOFF, Profile
from attn_fuzz.reference.values import DTYPES

LARGE: Final = {"bf16": 256, "fp16": 2048}
"""B, to which the dtype counts one by one: a sum of m of them is kept to multiples of m at best, rounding m/2 away."""

FEWEST_KEYS: Final = 32
"""Of a document that is judged."""

REFERENCE_CHANNEL: Final = 1
"""The channel that the others are compared with."""

MOST_LARGE: Final = 128
"""Keys of a document that are large, of either sign."""

_MOSTLY: Final = 0.3186
"""5/8 of a normal variable: the middle's mean is 1/4, its tiles stay below what is rounded away, its sum is large."""

_SCALES: Final = (2.0**-10, 4.0)
"""Of scales, over the softcap where there is one: outside, fp16 gradients of scores would be subnormal, or overflow."""


def swamps(case: Case) -> bool:
    """Whether a kernel case has a channel to compare with, and gradients of scores that are everyday numbers."""
    low, high = _SCALES
    fits = case.level == "kernel" and case.dtype in LARGE and min(case.head_dim, case.value_dim) > REFERENCE_CHANNEL
    return fits and low * max(1.0, case.softcap) <= case.softmax_scale <= high


def swamped_documents(case: Case) -> list[bool]:
    """Which documents' last rows see all of many keys."""
    left = case.effective_window[0]
    sizes = zip(case.packed_lengths, case.packed_key_lengths, strict=True)
    return [bool(queries) and keys >= FEWEST_KEYS and not 0 <= left < keys - 1 for queries, keys in sizes]


@dataclasses.dataclass(frozen=True)
class Swamping:
    """Sums beside large numbers of a kernel case, on a device; the gradients of K and V are not judged."""

    symptoms: ClassVar[Mapping[str, type[Symptom]]] = {"out": NotExact, "dq": NotExact}
    backward: ClassVar[bool] = True

    case: Case
    profile: Profile
    inputs: Inputs
    places: RowIndex
    judged: torch.Tensor
    """bool ``[documents]``: those whose last row is."""
    large: torch.Tensor
    """int64 ``[documents]``: how many keys are large, of either sign."""
    gradient: torch.Tensor
    """float64 ``[documents]``: the output gradient of the last row's channel 0. dS is near 1/8, and sums of dQ stay
    within fp16's range."""

    @classmethod
    def of(cls, case: Case, device: torch.device, profile: Profile) -> Swamping | None:
        """Its inputs, or None where there is no long document or it cannot be swamped.

        Args:
            case: a kernel case.
            device: where they are made.
            profile: how the backend computes.
        """
        if not swamps(case) or not any(held := swamped_documents(case)):
            return None
        places, judged = RowIndex(case, device), torch.tensor(held).to(device)
        counts = places.key_lengths
        # An even number of large keys, half of which have either sign in K.
        large = (counts // 4).clamp_max(MOST_LARGE) // 2 * 2
        # The binary logarithm, rounded down, of numbers below 2^24.
        exponent = torch.frexp(counts.clamp_min(1).float()).exponent.clamp_max(16)
        gradient = torch.bitwise_left_shift(torch.ones_like(counts), exponent.long()).double() / 16
        k, v = _patterns(case, places, judged, large)
        q, dout = (
            torch.zeros(sum(case.packed_lengths), case.heads, channels, device=device)
            for channels in (case.head_dim, case.value_dim)
        )
        last = judged[places.owner] & ((places.lengths - 1)[places.owner] == places.position)
        dout[:, :, 0] = torch.where(last, gradient[places.owner].float(), 0.0)[:, None]
        inputs = Inputs(*(x.to(DTYPES[case.dtype]) for x in (q, k, v, dout)))
        return cls(case, profile, inputs, places, judged, large, gradient)

    def judge(self, results: Results) -> Iterator[Compared]:
        """The last row of each long document, in out and, where it is not stored on the way, in dQ."""
        places, error = self.places, weight_error(self.case, self.profile)
        rows = (places.begins + places.lengths - 1).clamp_min(0)
        documents = torch.arange(len(rows), device=rows.device)
        for name in ("out",) if stores_dq(self.case, self.profile) else ("out", "dq"):
            unit, got = self.unit(name)[:, None, None], results[name][rows].double()
            expected = unit * self._sums(name)
            sized = Sized(places.key_lengths.clamp_min(1).double()[:, None, None], self.large[:, None, None], unit)
            wrong = swamped(self.case, name, sized, error, got, expected)
            judged = wrong & self.judged[:, None, None]
            yield Compared(name, documents, (places.lengths - 1).clamp_min(0), got, expected, judged)

    def unit(self, name: str) -> torch.Tensor:
        """float64 ``[documents]``: what a single +1 is in a result."""
        count = self.places.key_lengths.clamp_min(1).double()
        return 1 / count if name == "out" else self.case.softmax_scale * self.gradient / count

    def _sums(self, name: str) -> torch.Tensor:
        """float64 ``[documents, heads, d]``: over all keys, in units; whole numbers, exact in every order."""
        k, v = self.inputs.k.double(), self.inputs.v.double()
        terms = v if name == "out" else v[..., :1] * k
        sums = terms.new_zeros(len(self.judged), *terms.shape[1:]).index_add_(0, self.places.key_owner, terms)
        return sums.repeat_interleave(self.case.heads // self.case.kv_heads, 1)


def _patterns(
    case: Case, places: RowIndex, judged: torch.Tensor, large: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V: +B, mostly +1, -B along the keys of the documents that are judged."""
    k, v = (
        torch.where(drawn(case, name, case.kv_heads, places.device, keys=True, values=values) < _MOSTLY, 1.0, -1.0)
        for name, values in (("swamped keys", False), ("swamped values", True))
    )
    owner, position, counts = places.key_owner, places.key_position, places.key_lengths
    here = judged[owner]
    first = here & (position < large[owner])
    last = here & (position >= counts[owner] - large[owner])
    for x in (k, v):
        x[..., REFERENCE_CHANNEL].masked_fill_(here[:, None], 0.0)
        x.masked_fill_(first[:, None, None], LARGE[case.dtype])
        x.masked_fill_(last[:, None, None], -LARGE[case.dtype])
    alternate = torch.where(here, _balanced(position, counts[owner]), 1.0)
    k *= alternate[:, None, None]
    v[:, :, 0] = torch.where(here[:, None], alternate[:, None], v[:, :, 0])
    return k, v


def _balanced(position: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Alternate signs with a sum of 0, at each key: of an odd number the one in the middle is 0."""
    half = count // 2
    middle = (count % 2 == 1) & (position == half)
    # Behind the middle of an odd number the signs go on from where they were.
    place = position - ((count % 2 == 1) & (position > half)).long()
    return torch.where(middle, 0.0, 1.0 - 2.0 * (place % 2))


def beside(x: torch.Tensor) -> torch.Tensor:
    """Differences to the reference channel, ``[..., channels]``."""
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
        got: the result, float64 ``[..., heads, channels]``.
        expected: as ``got``, what it should be.
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
