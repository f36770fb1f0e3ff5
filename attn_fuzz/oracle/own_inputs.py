"""Results of somebody's own call, held to the budget of its inputs: what ``attn_fuzz.assert_attention`` does."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends.arithmetic import declared_facts
from attn_fuzz.backends.output import as_output
from attn_fuzz.backends.sdpa import as_flash_does
from attn_fuzz.backends.user import UserKernel
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.off_by_factor import factors
from attn_fuzz.oracle.second_opinion import confirm_results
from attn_fuzz.reference.answer import KERNEL_TENSORS, Expected, Inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import Span, document_spans
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.transfer import transferred
from attn_fuzz.reference.values import DTYPES

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

_RUNS: Final = 8
"""So many ranges of places stand in a sentence."""

_REPEATED: Final = 0.01
"""Share of rows that another row of the tensor equals beyond which roundings are expected to agree."""


@dataclasses.dataclass(frozen=True)
class WrongElement:
    """The worst element of a result that is beyond its budget."""

    tensor: str
    document: int
    row: int
    """Within the document: of its queries, or of its keys for dk and dv."""
    head: int
    channel: int | None
    """None for the LSE."""
    got: float
    expected: float
    z: float
    """Standard deviations of what correct roundings do; inf where equality is owed."""
    wrong: int
    """Elements of the tensor that are beyond their budgets."""
    elements: int
    documents: tuple[int, ...]
    """That have one."""
    rows: tuple[int, ...] = ()
    """Within that document, where there is only one."""
    heads: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    factor: float | None = None
    """Where every element is within its budget and a head of a document is off by a factor as a whole: which one."""

    def __str__(self) -> str:
        channel = "" if self.channel is None else f", channel {self.channel}"
        row = "key" if self.tensor in ("dk", "dv") else "row"
        where = {"documents": self.documents, f"{row}s": self.rows, "heads": self.heads, "channels": self.channels}
        places = ", ".join(f"{what} {_runs(numbers)}" for what, numbers in where.items() if numbers)
        factor = "" if self.factor is None else f"off by a factor of {self.factor:.4f} as a whole, "
        return (
            f"{self.tensor}: document {self.document}, {row} {self.row}, head {self.head}{channel}: "
            f"got {self.got:.6g}, expected {self.expected:.6g}, z = {self.z:.3g}; "
            f"{self.wrong} of {self.elements} elements wrong, {factor}in {places}"
        )


def _runs(numbers: Sequence[int]) -> str:
    """Rising numbers in words: ``0-3, 7``; the first few runs of them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join([*words[:_RUNS], *(["..."] if len(words) > _RUNS else [])])


class AttentionMismatch(AssertionError):
    """Results are not those of attention over these inputs; ``wrong`` has the worst element of each."""

    def __init__(self, wrong: Sequence[WrongElement]) -> None:
        super().__init__("\n".join(map(str, wrong)))
        self.wrong = tuple(wrong)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """What a call was asked for; the names are those of a varlen kernel's arguments."""

    causal: bool = False
    """Bottom-right: query i of a document with q queries and k keys sees keys up to i + k - q."""
    window: tuple[int, int] = (-1, -1)
    """Keys to the left and to the right of a row's own place; -1 for no limit."""
    softmax_scale: float | None = None
    """None for ``head_dim ** -0.5``."""
    softcap: float = 0.0
    """Scores become ``softcap * tanh(score / softcap)``; 0 for none."""


def _lengths(sums: torch.Tensor, name: str, tokens: int) -> tuple[int, ...]:
    """Documents' lengths from prefix sums.

    Raises:
        ValueError: when these are none of so many tokens.
    """
    if sums.dim() != 1 or len(sums) < 2 or sums.is_floating_point():
        raise ValueError(f"{name} must be a vector of integers, one more than there are documents")
    ends = [int(end) for end in sums.tolist()]
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in zip(ends, ends[1:])):
        raise ValueError(f"{name} must rise from 0 to the {tokens} rows of its tensor, not {ends[0]} to {ends[-1]}")
    return tuple(b - a for a, b in zip(ends, ends[1:]))


def _repeats_rows(x: torch.Tensor) -> bool:
    """Whether rows of a tensor are equal to one another, as those of a gradient of ones are."""
    if len(x) < 2:
        return False
    distinct = len(torch.unique(x.reshape(len(x), -1), dim=0))
    return len(x) - distinct > _REPEATED * len(x)


def _case(inputs: Inputs, lengths: tuple[int, ...], key_lengths: tuple[int, ...], masking: Masking) -> Case:
    """The call as a case: only its inputs' values are others."""
    q, k = inputs.q, inputs.k
    structured = any(_repeats_rows(x) for x in (q, k, inputs.v, inputs.dout))
    return Case(
        level="kernel",
        lengths=lengths,
        key_lengths=key_lengths,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        head_dim_v=inputs.v.shape[2],
        dtype=_NAMES[q.dtype],
        causal=masking.causal,
        window=masking.window,
        scale=masking.softmax_scale,
        softcap=masking.softcap,
        values="ties" if structured else "gaussian",
    )


def _require(results: Mapping[str, torch.Tensor], inputs: Inputs) -> None:
    """Raises ValueError for tensors that do not belong together."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or q.dtype not in _NAMES:
        raise ValueError("q, k and v must be [tokens, heads, head_dim] in float32, bfloat16 or float16")
    # Values may have channels of their own, and so may the output then.
    out, values = as_output(q, v), as_output(k, v)
    like = {"k": as_output(k, q), "v": values, "out": out, "dout": out, "dq": q, "dk": k, "dv": values}
    for name, x in {"k": k, "v": v, "dout": inputs.dout, **results}.items():
        shape = like[name].shape if name in like else q.shape[:2]
        if x.shape != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}, but should have {list(shape)}")
        if name in like and x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, but q is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")


def profile_of(device: str, arithmetic: Mapping[str, Any] | None) -> Profile:
    """How an unknown kernel may compute there, with what is declared of it (docs/arithmetic.md).

    Raises:
        BackendUnavailable: for facts that there are not.
    """
    owner = types.SimpleNamespace(capabilities={"arithmetic": dict(arithmetic or {})})
    facts = declared_facts(owner, "the call")
    return dataclasses.replace(as_flash_does(UserKernel.profile, device), **facts)


def _worst(case: Case, name: str, got: torch.Tensor, expected: Expected) -> WrongElement | None:
    """The worst element of a result that is beyond its budget, or of a head that is off by a factor."""
    spans = document_spans(case.packed_key_lengths if name in ("dk", "dv") else case.packed_lengths)
    z = deviations(case, got, expected)
    wrong = z > limit(case)
    if wrong.any():
        return _place(name, got, expected, z, wrong, spans)
    if expected.degrees is None:
        return None
    off = factors(case.dtype, got, expected, spans)
    if not off.wrong.any():
        return None
    lengths = transferred([span.length for span in spans], z.device)
    of_rows = off.wrong.repeat_interleave(lengths, 0)[..., None].expand_as(z)
    found = _place(name, got, expected, z.masked_fill(~of_rows, 0.0), of_rows, spans)
    return dataclasses.replace(found, factor=off.value[found.document, found.head].item())


def _place(
    name: str, got: torch.Tensor, expected: Expected, z: torch.Tensor, wrong: torch.Tensor, spans: Sequence[Span]
) -> WrongElement:
    """The element with the largest z, and where else there are wrong ones."""
    row, head, *channel = (int(i) for i in torch.unravel_index(z.argmax().cpu(), z.shape))
    place = next(i for i, span in enumerate(spans) if span.begin <= row < span.end)
    rows = wrong.flatten(1).any(1)
    documents = tuple(i for i, span in enumerate(spans) if span.length and rows[slice(*span)].any())
    return WrongElement(
        tensor=name,
        document=place,
        row=row - spans[place].begin,
        head=head,
        channel=channel[0] if channel else None,
        got=got.flatten()[z.argmax()].item(),
        expected=expected.value.flatten()[z.argmax()].item(),
        z=z.max().item(),
        wrong=int(wrong.sum()),
        elements=z.numel(),
        documents=documents,
        rows=_numbers(rows[slice(*spans[place])]) if len(documents) == 1 else (),
        heads=_numbers(wrong.transpose(0, 1).flatten(1).any(1)),
        channels=_numbers(wrong.flatten(0, 1).any(0)) if channel else (),
    )


def _numbers(flags: torch.Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero()[:, 0].tolist())


def wrong_elements(
    results: Mapping[str, torch.Tensor],
    inputs: Inputs,
    sums: tuple[torch.Tensor, torch.Tensor],
    masking: Masking,
    arithmetic: Mapping[str, Any] | None = None,
) -> tuple[WrongElement, ...]:
    """The worst element of each result that is beyond its budget.

    Args:
        results: by names of ``KERNEL_TENSORS``; the LSE ``[tokens_q, heads]`` in natural logarithms.
        inputs: what the call was given.
        sums: of queries and of keys, integers ``[documents + 1]``: each document's first row, and one past the last.
        masking: what else it was asked for.
        arithmetic: facts about the kernel's arithmetic, as in ``capabilities["arithmetic"]``.

    Raises:
        ValueError: when tensors or prefix sums do not belong together.
        CaseError: for a call that no case describes.
        ReferencesDisagree: when a second opinion has it that the mistake is the harness's.
    """
    _require(results, inputs)
    lengths = _lengths(sums[0], "cu_seqlens_q", len(inputs.q))
    key_lengths = _lengths(sums[1], "cu_seqlens_k", len(inputs.k))
    if len(lengths) != len(key_lengths):
        raise ValueError(f"cu_seqlens_q has {len(lengths)} documents, but cu_seqlens_k has {len(key_lengths)}")
    case = _case(inputs, lengths, key_lengths, masking)
    profile = profile_of(inputs.q.device.type, arithmetic)
    answer = kernel_answer(case, inputs, profile)
    found = [_worst(case, name, results[name], answer[name]) for name in KERNEL_TENSORS if name in results]
    wrong = tuple(each for each in found if each is not None)
    if wrong:
        confirm_results(case, inputs, {each.tensor: results[each.tensor] for each in wrong}, answer, profile)
    return wrong
