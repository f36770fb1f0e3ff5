"""One verdict per document and tensor, computed where the results are: the largest z, and nothing else, comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from attn_fuzz.batch import fused_look
from attn_fuzz.oracle.deviations import CONTINUOUS, LIMIT, deviations, limit, row_bound
from attn_fuzz.oracle.known_answer.compared import largest
from attn_fuzz.reference.answer import KERNEL_TENSORS, Expected, Inputs
from attn_fuzz.reference.batched import Chunk, answers
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.fused_answer import Fused, rows_of
from attn_fuzz.reference.memory import bits
from attn_fuzz.reference.packed import packed
from attn_fuzz.reference.profile import Profile

ROWS: Final = ("out", "dq", "dk", "dv")
"""Results that have a row statistic."""

COLUMNS: Final = (*KERNEL_TENSORS, *(f"{name}-rows" for name in ROWS), "bits")
"""What is judged of each document: the largest deviation of each result, then the largest row statistic of those that
have one, in units in which the verdict is at LIMIT, and whether two runs of the call gave other bits (inf)."""

OFF: Final = 3.0
"""Standard deviations by which answers in float32 may be off, and by far more than they are: budgets are of half
precision, and of float32 sums."""

_MANY: Final = 1024
"""Documents: of fewer the host's launches take longer than what they compute."""

_OWED: Final = {torch.float64: 1e-300, torch.float32: 1e-30}
"""Stand for a variance of 0: the least that can be wrong is 1e-45, and then 1e105 standard deviations off; in float32
what differs there is a doubt."""

_VANISHING: Final = _OWED[torch.float32]

_EQUALITY: Final = {torch.float64: 1e60, torch.float32: 1e15}
_LARGEST_FP16: Final = 65504.0


def largest_z(
    case: Case,
    inputs: Inputs,
    profile: Profile,
    results: Sequence[dict[str, torch.Tensor]],
    *,
    first_look: bool | None = None,
) -> torch.Tensor:
    """The largest deviation of each document's results, in standard deviations of their budget.

    One pass of the reference serves any number of runs.

    Args:
        case: a kernel case.
        inputs: its tensors, on the device.
        profile: the roundings of what ran.
        results: of each run, on the device, complete.
        first_look: whether answers are computed in float32 at first, by fused kernels where those are compiled
            (``fused_look``), and in float64 for those documents alone that this leaves a doubt about; None where it
            pays: on a GPU, for half precision and thousands of documents.

    Returns:
        float64 ``[runs, documents of the call, columns]`` on the device, in the order of ``COLUMNS``; 0 where
        nothing was judged, inf where equality was owed or a finite value is missing.
    """
    count = len(case.packed_lengths)
    z = torch.zeros(len(results), count, len(COLUMNS), dtype=torch.float64, device=inputs.q.device)
    if first_look is None:
        first_look = count >= _MANY and look_pays(case, z.device)
    doubtful = None
    if first_look and float32_is_plain():
        sure = [LIMIT - OFF] * len(COLUMNS)
        if (fused := fused_look.look(case, inputs, profile)) is not None:
            _judge_fused(case, fused.found, results, z)
            sure = [min(LIMIT - OFF, fused.sure(name, LIMIT)) for name in COLUMNS]
        else:
            for chunk in answers(case, inputs, profile, degrees=_by_rows(case), dtype=torch.float32):
                _judge(case, chunk, results, z)
        # NaN is a doubt, too.
        doubtful = (~(z < z.new_tensor(sure)).all(2)).any(0).nonzero()[:, 0].tolist()
        if not doubtful:
            return z
    for chunk in answers(case, inputs, profile, degrees=_by_rows(case), documents=doubtful):
        _judge(case, chunk, results, z)
    return z


def look_pays(case: Case, device: torch.device) -> bool:
    """Whether a first look in float32 pays, of much: on a GPU, for half precision."""
    return device.type != "cpu" and case.dtype != "fp32"


def float32_is_plain() -> bool:
    """Whether products of float32 are: in TF32 they would be as coarse as half precision."""
    return torch.get_float32_matmul_precision() == "highest"


def _by_rows(case: Case) -> bool:
    """Whether rows are judged as a whole."""
    return case.values in CONTINUOUS and limit(case) <= LIMIT


def _judge(case: Case, chunk: Chunk, results: Sequence[dict[str, torch.Tensor]], z: torch.Tensor) -> None:
    """Writes down what of some documents is wrong (``largest_z``)."""
    for column, name in enumerate(KERNEL_TENSORS):
        rows, expected = chunk.rows(name), chunk.expected[name]
        for run, found in enumerate(results):
            if name not in found:
                continue
            got = rows.gather(found[name], expected.value.dtype)
            if name == "lse":
                worst = deviations(case, got, expected).masked_fill(~rows.there[:, None, :], 0.0)
                z[run, chunk.documents, column] = worst.amax((1, 2)).double()
                continue
            worst, mean = _by_row(case, got, expected)
            z[run, chunk.documents, column] = worst.amax((1, 2)).double()
            if expected.degrees is not None:
                z[run, chunk.documents, COLUMNS.index(f"{name}-rows")] = LIMIT * mean.amax((1, 2)).double()


def _judge_fused(
    case: Case, fused: Mapping[str, Fused], results: Sequence[dict[str, torch.Tensor]], z: torch.Tensor
) -> None:
    """Writes down what of each document is wrong by a fused answer."""
    sides = {"q": packed(case.packed_lengths, z.device).owner, "k": packed(case.packed_key_lengths, z.device).owner}
    for column, name in enumerate(KERNEL_TENSORS):
        owner = sides["k" if name in ("dk", "dv") else "q"]
        for run, found in enumerate(results):
            if name not in found:
                continue
            worst, mean = rows_of(found[name], fused[name])
            z[run, :, column].scatter_reduce_(0, owner, worst.amax(1).double(), "amax")
            degrees = fused[name].degrees
            if degrees is not None and _by_rows(case):
                of_rows = LIMIT * (mean / row_bound(degrees)).sqrt().amax(1)
                z[run, :, COLUMNS.index(f"{name}-rows")].scatter_reduce_(0, owner, of_rows.double(), "amax")


def _by_row(case: Case, got: torch.Tensor, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """``deviations``' largest and ``row_spreads`` of every row ``[documents, heads, size]``, in as few passes.

    Padding is 0, as its answer is. ``got`` is written over.
    """
    doubtful = _doubtful(got, expected) if got.dtype == torch.float32 else None
    z2 = got.sub_(expected.value).square_().div_(expected.variance.clamp_min(_OWED[got.dtype]))
    if case.dtype == "fp16":
        # Others hold whatever the modes of values drawn here can sum up to.
        z2.masked_fill_(expected.value.abs() > 0.5 * _LARGEST_FP16, 0.0)
    worst = z2.amax(-1).sqrt_().nan_to_num_(torch.inf)
    worst = worst.masked_fill_(worst > _EQUALITY[got.dtype], torch.inf)
    if doubtful is not None:
        worst.masked_fill_(doubtful, torch.inf)
    if expected.degrees is None:
        return worst, torch.zeros_like(worst)
    owing = expected.variance.amin(-1) > 0
    mean = (z2.mean(-1) / row_bound(expected.degrees)).sqrt_().nan_to_num_(torch.inf)
    return worst, torch.where(owing, mean, 0.0)


def _doubtful(got: torch.Tensor, expected: Expected) -> torch.Tensor:
    """Rows of which float32 says nothing: budgets that have overflowed, and differences whose squares may vanish."""
    variance = expected.variance
    vanishing = (variance < _VANISHING) & (got != expected.value)
    return (vanishing | ~variance.isfinite()).any(-1)


def of_documents(case: Case, name: str, by_row: torch.Tensor) -> torch.Tensor:
    """Which documents have a row of a result for which something holds: bool ``[tokens]`` to bool ``[documents]``."""
    lengths = case.packed_key_lengths if name in ("dk", "dv") else case.packed_lengths
    return largest(by_row, packed(lengths, by_row.device).owner, len(lengths))


def other_bits(
    case: Case, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], names: Sequence[str]
) -> torch.Tensor:
    """Documents some of whose results have other bits in one run than in another: bool ``[documents]``."""
    count = len(case.packed_lengths)
    found = torch.zeros(count, dtype=torch.bool, device=first["out"].device)
    for name in names:
        if name in first and name in second and len(first[name]):
            differs = (bits(first[name]) != bits(second[name])).flatten(1).any(1)
            found |= of_documents(case, name, differs)
    return found
