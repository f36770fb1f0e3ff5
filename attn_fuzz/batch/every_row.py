"""A gradient in every row (``probes.every_row_probe``) for thousands of documents in one call."""

from __future__ import annotations

from typing import Final

import torch

from attn_fuzz.batch.row_index import RowIndex
from attn_fuzz.batch.verdicts import COLUMNS, largest_z
from attn_fuzz.oracle.checks.exact import ALIKE
from attn_fuzz.oracle.known_answer.inputs import signs
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.values import DTYPES

_JUDGED: Final = 2048
"""Documents of a call whose dV is held against a budget, which takes the float64 reference."""


def every_row_inputs(case: Case, device: torch.device) -> Inputs:
    """The inputs of a kernel case, the same numbers as ``every_row_probe`` gives."""
    places = RowIndex(case, device)
    k, v = (signs(case, name, case.kv_heads, device, keys=True) for name in ("probe keys", "probe values"))
    dout = places.paired(signs(case, "every row", case.heads, device, keys=False), keys=False)
    begin, end = places.seen
    # No whole number's logarithm lies half-way between two: every machine rounds it alike.
    power = (end - begin).clamp_min(1).double().log2().round().long()
    dout = dout * torch.bitwise_left_shift(torch.ones_like(power), power)[:, None, None]
    return Inputs(*(x.to(DTYPES[case.dtype]) for x in (torch.zeros_like(dout), k, v, dout)))


def miscounted(case: Case, inputs: Inputs, profile: Profile, dv: torch.Tensor) -> torch.Tensor:
    """How far dV of each document is off, in units in which the verdict is at LIMIT: float64 ``[documents]``."""
    documents = range(min(len(case.packed_lengths), _JUDGED))
    # The mode of the drawn values says nothing about these.
    z = largest_z(case.replace(values="gaussian"), inputs, profile, [{"dv": dv}], documents=documents)[0]
    return torch.maximum(z[:, COLUMNS.index("dv")], z[:, COLUMNS.index("dv-rows")] / ALIKE)
