"""Answers for thousands of documents at a time: equal to ``answer.kernel_answer``, which takes them one by one.

Documents are put into buckets of nearly the same size, padded with zeros to the bucket's size and computed together by
the very formulas of attention.py and budget.py, whose leading dimension is then the document. Padding changes nothing
but the order of sums: padded keys are seen by no query, padded queries see no key, and both add exact zeros.

One chunk of a bucket is computed at a time, and chunks are as large as the free memory allows. Answers
of a thousand documents come chunk by chunk, so that not all of them need to be held at once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from attn_fuzz.reference import vectorised
from attn_fuzz.reference.answer import KERNEL_TENSORS, Expected, Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.sums import sums_of
from attn_fuzz.reference.vectorised_scores import bounded_scores
from attn_fuzz.reference.vectorised_terms import Documents

SIZES: Final = (2, 8, 16, 24, 32, 48, 64, 96, 128)
"""Padded lengths: few buckets, because each costs as many small operations as a large one. Beyond the last: its
multiples."""

_CPU_BYTES: Final = 28 << 20
"""A chunk's working set where it is to stay near the processor's caches."""

_CPU_SHARE: Final = 0.25

_CPU_OVERHEAD: Final = 2 << 20
"""Working set that takes a processor as long as the hundred operations of a chunk take by themselves: a millisecond."""

_CUDA_OVERHEAD: Final = 1 << 30
"""The same of a GPU, where some five hundred launches are what a chunk costs the host, and the device passes over a
gigabyte or two meanwhile."""

_CUDA_SHARE: Final = 0.25
_CUDA_PART: Final = 32
"""Of a GPU's memory: what a chunk has taken stays with its process, and sixteen of them may share one."""


# float64 tensors alive at a time in vectorised.py, inputs and results included: of [heads, q, k], and of
# [heads, q + k, d]. Not all of both at once; a test counts what is alive for every backend's profile.
_LIVE_SCORES: Final = 16
_LIVE_ROWS: Final = 12


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows of some documents lie on the query or the key side of a packed call."""

    index: torch.Tensor
    """int64 ``[documents, size]``: row of the packed tensor; 0 where there is none."""
    there: torch.Tensor
    """bool ``[documents, size]``: False for padding."""
    lengths: torch.Tensor
    """int64 ``[documents]``."""
    count: int
    """Their sum, which the host knows: nothing has to wait for a device to say it."""

    def gather(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Packed ``[tokens, heads, ...]`` to ``[documents, heads, size, ...]``, zeros where there is no row."""
        size = (*self.index.shape, *x.shape[1:])
        if not len(x):
            return x.new_zeros(size, dtype=dtype).transpose(1, 2)
        # Not by a product: what is read for padding may be NaN.
        missing = ~self.there.view(*self.there.shape, *(1,) * (x.dim() - 1))
        found = x.index_select(0, self.index.flatten()).view(size).to(dtype)
        return found.masked_fill_(missing, 0).transpose(1, 2)

    @functools.cached_property
    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(which of the padded rows are there, where each of them lies in the packed tensor)."""
        size = self.index.shape[1]
        document = torch.repeat_interleave(self.lengths, output_size=self.count)
        first = self.lengths.cumsum(0) - self.lengths
        # From a row's number among those that are there to its place among all.
        gaps = size * torch.arange(len(first), device=first.device) - first
        there = torch.arange(self.count, device=first.device) + gaps[document]
        return there, self.index.flatten()[there]

    def scatter(self, packed: torch.Tensor, x: torch.Tensor) -> None:
        """Stores ``[documents, heads, size, ...]`` into the rows of ``packed [tokens, heads, ...]``."""
        there, places = self._places
        rows = x.transpose(1, 2).flatten(0, 1)
        packed.index_copy_(0, places, rows if len(there) == len(rows) else rows.index_select(0, there))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some documents of one bucket with their answers, padded."""

    documents: torch.Tensor
    """int64 ``[documents]``: their places in the call."""
    queries: Rows
    keys: Rows
    expected: dict[str, Expected]
    """By the names of ``KERNEL_TENSORS``; ``[documents, heads, size, d]``, ``lse`` without the channels."""

    def rows(self, name: str) -> Rows:
        """The side of the call that a result belongs to."""
        return self.keys if name in ("dk", "dv") else self.queries


def padded_size(length: int) -> int:
    """The size of a length's bucket, at least 1."""
    if length > SIZES[-1]:
        return -(-length // SIZES[-1]) * SIZES[-1]
    return next(size for size in SIZES if size >= length)


def free_bytes() -> int:
    """What the operating system could hand out without waiting, or no bound where it does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return sys.maxsize


def chunk_bytes(device: torch.device) -> int:
    """Bytes that one chunk of an answer may take on a device, beside other processes that share it."""
    if device.type != "cuda":
        return min(_CPU_BYTES, int(free_bytes() * _CPU_SHARE))
    free, whole = torch.cuda.mem_get_info(device)
    # What the caching allocator holds unused is free too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(int(free * _CUDA_SHARE), whole // _CUDA_PART)


_Bucket = tuple[tuple[int, int], list[int]]
"""(padded queries, padded keys) and the documents that lie there."""


def _merged(buckets: Sequence[_Bucket], worth: Callable[[int, int], float]) -> list[_Bucket]:
    """Fewer buckets, where documents cost less in a larger one than a chunk of their own does.

    Args:
        buckets: all of them.
        worth: what one document of a size costs, in units of what a chunk costs.
    """
    kept: list[_Bucket] = []
    for size, members in sorted(buckets, key=lambda bucket: worth(*bucket[0]), reverse=True):
        least, place = 1.0, -1
        for index, (other, others) in enumerate(kept):
            both = worth(max(size[0], other[0]), max(size[1], other[1]))
            more = len(members) * (both - worth(*size)) + len(others) * (both - worth(*other))
            if more < least:
                least, place = more, index
        if place < 0:
            kept.append((size, members))
        else:
            other, others = kept[place]
            kept[place] = ((max(size[0], other[0]), max(size[1], other[1])), others + members)
    return kept


def plan_chunks(
    case: Case, memory: int, documents: Sequence[int] | None = None, *, overhead: int = 0
) -> list[tuple[int, int, list[int]]]:
    """(padded queries, padded keys, documents) of every chunk.

    Args:
        case: a kernel case.
        memory: bytes that one chunk may take.
        documents: places in the call; None for all.
        overhead: bytes of working set that cost as much to pass over as a chunk costs by itself. With some, chunks are
            no larger than their longest document, and as few as that makes worth while; with none, they have the sizes
            of buckets, which are kind to a GPU.
    """
    lengths, key_lengths = case.packed_lengths, case.packed_key_lengths
    buckets: dict[tuple[int, int], list[int]] = {}
    sizes = {length: padded_size(length) for length in {*lengths, *key_lengths}}
    for index in range(len(lengths)) if documents is None else documents:
        buckets.setdefault((sizes[lengths[index]], sizes[key_lengths[index]]), []).append(index)

    widest = max(case.head_dim, case.value_dim)

    def size_of(queries: int, keys: int) -> int:
        return 8 * case.heads * (_LIVE_SCORES * queries * keys + _LIVE_ROWS * (queries + keys) * widest)

    def longest(members: Sequence[int]) -> tuple[int, int]:
        return max(1, *(lengths[i] for i in members)), max(1, *(key_lengths[i] for i in members))

    found: Sequence[_Bucket] = sorted(buckets.items())
    if overhead:
        tight = [(longest(members), members) for _, members in found]
        found = _merged(tight, lambda queries, keys: size_of(queries, keys) / overhead)
    chunks = []
    for (queries, keys), members in found:
        count = max(1, memory // size_of(queries, keys))
        for begin in range(0, len(members), count):
            some = members[begin : begin + count]
            chunks.append((*(longest(some) if overhead else (queries, keys)), some))
    return chunks


def _rows(begins: torch.Tensor, lengths: torch.Tensor, size: int, count: int) -> Rows:
    offsets = torch.arange(size, device=begins.device)
    there = offsets < lengths[:, None]
    return Rows(torch.where(there, begins[:, None] + offsets, 0), there, lengths, count)


def _mask(queries: Rows, keys: Rows, window: tuple[int, int]) -> torch.Tensor:
    """``attention.allowed_keys`` of documents of different lengths: bool ``[documents, 1, q, k]``."""
    row, key = (torch.arange(rows.index.shape[1], device=rows.index.device) for rows in (queries, keys))
    own = row[None, :, None] + (keys.lengths - queries.lengths)[:, None, None]
    mask = queries.there[:, :, None] & keys.there[:, None, :]
    left, right = window
    if left >= 0:
        mask &= key >= own - left
    if right >= 0:
        mask &= key <= own + right
    return mask[:, None]


def answers(
    case: Case,
    inputs: Inputs,
    profile: Profile,
    *,
    documents: Sequence[int] | None = None,
    memory: int | None = None,
    degrees: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Chunk]:
    """The answers to a kernel case, chunk by chunk, computed where the inputs are.

    Args:
        case: a kernel case of any number of documents.
        inputs: its tensors.
        profile: the roundings of the backend under test.
        documents: places in the call of those to answer; None for all.
        memory: bytes that one chunk may take; None: planned from what is free.
        degrees: whether to count independent errors per row.
        dtype: that answers are computed in. In float32 they are some float32 roundings off, which half precision's
            budgets are far above; what underflows there takes its variance along, and never adds any.
    """
    device = inputs.q.device
    group = case.heads // case.kv_heads
    counts, key_counts = case.packed_lengths, case.packed_key_lengths
    sums = sums_of(max(counts), max(key_counts), profile, group)
    lengths, key_lengths = torch.tensor(counts), torch.tensor(key_counts)
    begins, key_begins = (x.cumsum(0) - x for x in (lengths, key_lengths))
    # One transfer for all chunks: the host knows every layout, the device needs it once.
    table = torch.stack([lengths, begins, key_lengths, key_begins]).to(device)
    how = Computation.of(case, profile)
    # A GPU is asked once, before there is anything for it to finish.
    bounded = None
    if device.type != "cpu" and len(inputs.q) and len(inputs.k):
        bounded = bounded_scores(inputs.q, inputs.k, max(key_counts), how)
    planned = plan_chunks(
        case,
        chunk_bytes(device) if memory is None else memory,
        documents,
        overhead=_CPU_OVERHEAD if device.type == "cpu" else _CUDA_OVERHEAD,
    )
    for queries, keys, members in planned:
        chosen = torch.tensor(members).to(device)
        length, begin, key_length, key_begin = table[:, chosen]
        rows = _rows(begin, length, queries, sum(counts[index] for index in members))
        key_rows = _rows(key_begin, key_length, keys, sum(key_counts[index] for index in members))
        q, dout = (rows.gather(x, dtype) for x in (inputs.q, inputs.dout))
        k, v = (key_rows.gather(x, dtype) for x in (inputs.k, inputs.v))
        dlse = None if inputs.dlse is None else rows.gather(inputs.dlse, dtype)
        expected = vectorised.answer(
            Documents(q, k, v, dout, _mask(rows, key_rows, case.effective_window), dlse),
            how,
            sums,
            degrees=degrees,
            bounded=bounded,
        )
        yield Chunk(chosen, rows, key_rows, expected)


def kernel_answer(
    case: Case,
    inputs: Inputs,
    profile: Profile,
    *,
    memory: int | None = None,
    degrees: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Expected]:
    """What ``answer.kernel_answer`` gives, computed in chunks, and in this dtype."""
    shapes = {"out": inputs.dout, "lse": inputs.q[..., 0], "dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    values = {name: torch.zeros(x.shape, dtype=dtype, device=x.device) for name, x in shapes.items()}
    variances = {name: torch.zeros_like(x) for name, x in values.items()}
    counted = {name: torch.ones_like(x[..., 0]) for name, x in values.items() if name != "lse" and degrees}
    for chunk in answers(case, inputs, profile, memory=memory, degrees=degrees, dtype=dtype):
        for name, expected in chunk.expected.items():
            rows = chunk.rows(name)
            rows.scatter(values[name], expected.value)
            rows.scatter(variances[name], expected.variance)
            if name in counted and expected.degrees is not None:
                rows.scatter(counted[name], expected.degrees)
    return {name: Expected(values[name], variances[name], counted.get(name)) for name in KERNEL_TENSORS}
