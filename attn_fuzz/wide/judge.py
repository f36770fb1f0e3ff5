"""One verdict per document and tensor, computed where the results are: the largest z, and nothing else, comes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_fuzz.checks.budget import deviations
from reference.answer import KERNEL_TENSORS, Expected, Inputs
from reference.batched import answers
from reference.case import Case
from reference.profile import Profile
from reference.screen import row_maxima, screen


def complete(case: Case, results: dict[str, torch.Tensor], inputs: Inputs) -> list[str]:
    """Results of the wrong shape or dtype, by name; only the LSE may be absent, and has a dtype of its own."""
    shapes = {"out": inputs.q, "dq": inputs.q, "dk": inputs.k, "dv": inputs.v, "lse": inputs.q[..., 0]}
    return [
        name
        for name, like in shapes.items()
        if (name in results and results[name].shape != like.shape)
        or (name != "lse" and (name not in results or results[name].dtype != like.dtype))
    ]


def largest_z(
    case: Case,
    inputs: Inputs,
    profile: Profile,
    results: Sequence[dict[str, torch.Tensor]],
    *,
    documents: Sequence[int] | None = None,
) -> torch.Tensor:
    """The largest deviation of each document's results, in standard deviations of their budget.

    One pass of the reference serves any number of backends that compute alike.

    Args:
        case: a kernel case.
        inputs: its tensors, on the device.
        profile: the roundings of those backends.
        results: of each of them, on the device, complete.
        documents: places in the call of those to judge; None for all.

    Returns:
        float64 ``[backends, documents of the call, 5]`` on the device, tensors in the order of ``KERNEL_TENSORS``; 0
        where nothing was judged, inf where equality was owed or a finite value is missing.
    """
    count = len(case.packed_lengths)
    z = torch.zeros(len(results), count, len(KERNEL_TENSORS), dtype=torch.float64, device=inputs.q.device)
    for chunk in answers(case, inputs, profile, documents=documents):
        for column, name in enumerate(KERNEL_TENSORS):
            rows, expected = chunk.rows(name), chunk.expected[name]
            there = rows.there[:, None, :]
            for backend, found in enumerate(results):
                if name in found:
                    worst = _row_maxima(case, rows.gather(found[name]), expected).masked_fill(~there, 0.0)
                    z[backend, chunk.documents, column] = worst.amax((1, 2))
    return z


def screened_z(
    case: Case, inputs: Inputs, profile: Profile, results: Sequence[dict[str, torch.Tensor]]
) -> torch.Tensor:
    """What ``largest_z`` gives, for all documents, by the fast reference (reference/screen.py)."""
    screened = screen(case, inputs, profile)
    device, count = inputs.q.device, len(case.packed_lengths)
    documents = torch.arange(count, device=device)
    owners = {}
    for side, lengths in (("q", case.packed_lengths), ("k", case.packed_key_lengths)):
        sizes = torch.tensor(lengths).to(device, non_blocking=True)
        owners[side] = torch.repeat_interleave(documents, sizes, output_size=sum(lengths))
    z = torch.zeros(len(results), len(KERNEL_TENSORS), count, dtype=torch.float32, device=device)
    for column, name in enumerate(KERNEL_TENSORS):
        owner = owners["k" if name in ("dk", "dv") else "q"]
        for backend, found in enumerate(results):
            if name in found:
                z[backend, column].scatter_reduce_(0, owner, row_maxima(found[name], screened[name]), "amax")
    return z.transpose(1, 2).double()


def _row_maxima(case: Case, got: torch.Tensor, expected: Expected) -> torch.Tensor:
    """``[documents, heads, rows]``."""
    z = deviations(case, got, expected)
    return z.amax(-1) if z.dim() == 4 else z
