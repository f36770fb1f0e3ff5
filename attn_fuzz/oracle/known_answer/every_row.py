"""Every row: q = 0, and an output gradient in all rows, scaled so that each puts about +-1 into dV of its keys.

A key that a single row drops, adds or swaps moves every channel of dV by about 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

import torch

from attn_fuzz.oracle.deviations import LIMIT, deviations, spread_of
from attn_fuzz.oracle.known_answer.compared import Compared, Results
from attn_fuzz.oracle.known_answer.row_index import RowIndex
from attn_fuzz.oracle.known_answer.signs import signs
from attn_fuzz.oracle.symptoms import Symptom, WrongKeysBackward
from attn_fuzz.reference.answer import Expected, Inputs
from attn_fuzz.reference.batched import answers
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.values import DTYPES

ALIKE: Final = 1.5
"""Equal probabilities have equal roundings: of rows whose errors are not independent more must be wrong."""

HALF_A_KEY: Final = 0.5
"""A key moves every channel of dV by 0.7 to 1.4; what moves it by less than half of that is a matter of weights."""

_JUDGED: Final = 2048
"""Documents of a call whose dV is held against a budget, which takes the float64 reference."""


@dataclasses.dataclass(frozen=True)
class EveryRow:
    """An output gradient in every row of a kernel case, on a device.

    Row i puts ``+-2^round(log2 n_i) / n_i``, a number near 1, into dV of each of its n_i keys and nothing elsewhere.
    Signs are opposite in neighbouring rows, so that roundings of P that all rows share cancel.
    """

    symptoms: ClassVar[Mapping[str, type[Symptom]]] = {"dv": WrongKeysBackward}
    backward: ClassVar[bool] = True

    case: Case
    profile: Profile
    inputs: Inputs

    @classmethod
    def of(cls, case: Case, device: torch.device, profile: Profile) -> EveryRow:
        """Its inputs.

        Args:
            case: a kernel case.
            device: where they are made.
            profile: how the backend computes.
        """
        places = RowIndex(case, device)
        k = signs(case, "probe keys", case.kv_heads, device, keys=True)
        v = signs(case, "probe values", case.kv_heads, device, keys=True, values=True)
        dout = places.paired(signs(case, "every row", case.heads, device, keys=False, values=True), keys=False)
        begin, end = places.seen
        # No whole number's logarithm lies half-way between two: every machine rounds it alike.
        power = (end - begin).clamp_min(1).double().log2().round().long()
        dout = dout * torch.bitwise_left_shift(torch.ones_like(power), power)[:, None, None]
        q = dout.new_zeros(len(dout), case.heads, case.head_dim)
        return cls(case, profile, Inputs(*(x.to(DTYPES[case.dtype]) for x in (q, k, v, dout))))

    def judge(self, results: Results) -> Iterator[Compared]:
        """dV, some documents at a time: what is beyond the budget by element or by row."""
        documents = range(min(len(self.case.packed_lengths), _JUDGED))
        for chunk in answers(self.case, self.inputs, self.profile, documents=documents, degrees=True):
            rows, expected = chunk.keys, chunk.expected["dv"]
            got = rows.gather(results["dv"], torch.float64)
            owner = chunk.documents[:, None].expand_as(rows.index)
            position = torch.arange(rows.index.shape[1], device=got.device).expand_as(rows.index)
            # Padding is 0, as its answer is.
            tensors = (_by_row(x) for x in (got, expected.value, beyond(self.case, got, expected)))
            yield Compared("dv", owner.flatten(), position.flatten(), *tensors)


def beyond(case: Case, got: torch.Tensor, expected: Expected) -> torch.Tensor:
    """The deviation of each element, or of its row as a whole where that is larger, as the verdict is at LIMIT."""
    z = deviations(case, got, expected)
    return torch.maximum(z, LIMIT / ALIKE * spread_of(z, expected)[..., None])


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """``[documents, heads, size, d]`` to ``[documents * size, heads, d]``."""
    return x.transpose(1, 2).flatten(0, 1)
