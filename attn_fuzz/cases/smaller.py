"""Smaller layouts: steps that a shrinker takes towards fewer ranks, fewer and shorter documents, and fewer cuts.

Each is a function from a case to candidates, boldest first; None stands for one that cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from attn_fuzz.cases.repair import changed
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import document_spans, micro_sequences

_PART: Final = 8
"""Quarters, eighths and so on of a value are taken from it while they are no smaller."""


def below(value: int) -> list[int]:
    """Candidates below a value, boldest first: of thousands a fitting number is found in dozens of attempts."""
    parts = [value >> shift for shift in range(2, value.bit_length()) if value >> shift >= _PART]
    steps = (0, 1, value // 2, *(value - part for part in parts), value - 2, value - 1)
    return list(dict.fromkeys(c for c in steps if 0 <= c < value))


def with_lengths(case: Case, lengths: Sequence[int], kept: Sequence[int], keys: Sequence[int] | None) -> Case | None:
    """The case with the documents ``kept`` (indices) at new lengths; cuts keep their place within their document."""
    if not kept:
        return None
    ids = case.packed_ids[: len(case.lengths)]
    old_begins = [0, *accumulate(case.lengths)]
    new_begins = [0, *accumulate(lengths)]

    def moved(cut: int) -> int:
        for new_index, index in enumerate(kept):
            begin, end = old_begins[index], old_begins[index + 1]
            if cut <= begin:
                return new_begins[new_index]
            if cut < end:
                return min(new_begins[new_index] + cut - begin, new_begins[new_index + 1])
        return new_begins[-1] + max(cut - old_begins[-1], 0)

    return changed(
        case,
        lengths=tuple(lengths),
        key_lengths=None if keys is None else tuple(keys),
        cuts=tuple(moved(cut) for cut in case.cuts),
        document_ids=tuple(ids[index] for index in kept),
    )


_MANY_ALIKE: Final = 4096


def _alike(case: Case) -> bool:
    """Whether there are thousands of documents, all of the same size."""
    lengths, keys = case.lengths, case.packed_key_lengths
    return len(lengths) >= _MANY_ALIKE and len(set(lengths)) == len(set(keys)) == 1


def _telling(case: Case) -> Sequence[int]:
    """Places of the documents that are worth a look each: of thousands that are alike, the first."""
    return range(1) if _alike(case) else range(len(case.lengths))


def _without(case: Case, begin: int, end: int) -> Case | None:
    kept = [index for index in range(len(case.lengths)) if not begin <= index < end]
    keys = None if case.key_lengths is None else [case.key_lengths[index] for index in kept]
    return with_lengths(case, [case.lengths[index] for index in kept], kept, keys)


def _resized(case: Case, index: int, queries: int, keys: int | None) -> Case | None:
    lengths, key_lengths = (list(case.lengths), None if case.key_lengths is None else list(case.key_lengths))
    lengths[index] = queries
    if key_lengths is not None and keys is not None:
        key_lengths[index] = keys
    return with_lengths(case, lengths, range(len(lengths)), key_lengths)


def fewer_ranks(case: Case) -> Iterator[Case | None]:
    """On fewer ranks, tensor-parallel or not.

    What three ranks share in one micro-sequence, two share in two of them: with a cut, for which there may be padding.
    Where what shows may not bear padding, the longest document gives up the tokens that do not fit.
    """
    for tensor_ranks in range(1, case.tensor_ranks):
        yield changed(case, tensor_ranks=tensor_ranks)
    for ranks in range(1, case.ranks):
        yield changed(case, ranks=ranks)
        longest = max(case.lengths)
        if (over := case.tokens % (ranks * case.tensor_ranks)) and over < longest:
            index = case.lengths.index(longest)
            yield changed(
                case, ranks=ranks, lengths=(*case.lengths[:index], longest - over, *case.lengths[index + 1 :])
            )
        for padding in (case.padding, case.padding + case.ranks):
            more = tuple(range(ranks, case.tokens + case.ranks, ranks))
            yield changed(case, ranks=ranks, padding=padding, cuts=more)


_TINY_KEYS: Final = tuple((queries, keys) for queries in (1, 2, 3, 5, 9) for keys in (1, 2, 3, 5, 9))
_TINY: Final = ((1,), (2,), (1, 1), (3,), (2, 1), (4,), (2, 2), (5,), (6,), (3, 2, 1), (8,), (9,), (17,))


def tiny_layouts(case: Case) -> Iterator[Case | None]:
    """With one of the smallest layouts there are in place of its own: many need not be cut down to it step by step.

    Nothing becomes more: no documents, queries, keys or cuts. Layers are cut nowhere or behind every token.
    """
    tokens = sum(case.lengths)
    if case.key_lengths is not None:
        keys_now = sum(case.key_lengths)
        for queries, keys in sorted(_TINY_KEYS, key=sum):
            if queries <= tokens and keys <= keys_now and queries + keys < tokens + keys_now:
                yield changed(case, lengths=(queries,), key_lengths=(keys,), document_ids=None)
        return
    for lengths in _TINY:
        total = sum(lengths)
        if total < tokens and len(lengths) <= len(case.lengths):
            for cuts in dict.fromkeys(((), tuple(range(1, total)))):
                if len(cuts) <= len(case.cuts):
                    yield changed(case, lengths=lengths, cuts=cuts, padding=0, document_ids=None)


def fewer_documents(case: Case) -> Iterator[Case | None]:
    """Without runs of documents, then without single ones."""
    count = len(case.lengths)
    size = count // 2
    while size >= 1:
        # Without two, wherever they stand, every other document stays what it is to relations.
        step = 1 if size == 2 else size
        # Of many that are alike it is how many there are that counts.
        for begin in (count - size,) if _alike(case) else range(0, count, step):
            yield _without(case, begin, min(begin + size, count))
        size //= 2


def merged_documents(case: Case) -> Iterator[Case | None]:
    """With two neighbours made one document; padding is the last one's neighbour."""
    if case.padding:
        yield changed(case, lengths=(*case.lengths[:-1], case.lengths[-1] + case.padding), padding=0)
    for index in _telling(case)[: len(case.lengths) - 1]:

        def merged(lengths: tuple[int, ...], index: int = index) -> tuple[int, ...]:
            return (*lengths[:index], lengths[index] + lengths[index + 1], *lengths[index + 2 :])

        ids = case.packed_ids[: len(case.lengths)]
        yield changed(
            case,
            lengths=merged(case.lengths),
            key_lengths=None if case.key_lengths is None else merged(case.key_lengths),
            document_ids=(*ids[: index + 1], *ids[index + 2 :]),
        )


def shorter_documents(case: Case) -> Iterator[Case | None]:
    """With one document shorter, queries and keys together, then each alone."""
    for index in _telling(case):
        queries = case.lengths[index]
        if case.key_lengths is None:
            for fewer in below(queries):
                yield _resized(case, index, fewer, None)
            continue
        keys = case.key_lengths[index]
        for step in {queries, keys, queries // 2, 1}:
            if 0 < step <= min(queries, keys):
                yield _resized(case, index, queries - step, keys - step)
        for fewer in below(queries):
            yield _resized(case, index, fewer, keys)
        for fewer in below(keys):
            yield _resized(case, index, queries, fewer)


def clipped(case: Case, queries: int, keys: int) -> Case | None:
    """With no document longer than so many tokens."""
    lengths = [min(length, queries) for length in case.lengths]
    fewer = None if case.key_lengths is None else [min(length, keys) for length in case.key_lengths]
    return with_lengths(case, lengths, range(len(lengths)), fewer)


def shorter_everywhere(case: Case) -> Iterator[Case | None]:
    """With all documents at most so long at once: what needs their number may not need their lengths."""
    for most in below(max((*case.lengths, *(case.key_lengths or ())))):
        yield clipped(case, most, most)


def one_shorter(case: Case) -> Iterator[Case | None]:
    """With one document shorter by one token: queries and keys together, then each alone."""
    for index in _telling(case):
        queries = case.lengths[index]
        if case.key_lengths is None:
            yield _resized(case, index, queries - 1, None) if queries else None
            continue
        keys = case.key_lengths[index]
        for fewer_queries, fewer_keys in ((queries - 1, keys - 1), (queries - 1, keys), (queries, keys - 1)):
            if min(fewer_queries, fewer_keys) >= 0:
                yield _resized(case, index, fewer_queries, fewer_keys)


def shorter_micro_sequences(case: Case) -> Iterator[Case | None]:
    """With tokens taken from the end of one micro-sequence, whosever they are; the number of cuts may be what fails."""
    if case.level == "layer" and case.cuts:
        for part in micro_sequences(case):
            for fewer in below(part.length):
                yield _without_tokens(case, part.begin + fewer, part.end)


def _without_tokens(case: Case, begin: int, end: int) -> Case | None:
    """Without the tokens ``[begin, end)``, nor documents that have no other; later cuts move along."""
    lengths = [
        span.length - max(0, min(span.end, end) - max(span.begin, begin))
        for span in document_spans(case.packed_lengths)
    ]
    padding = lengths.pop() if case.padding else 0
    kept = [index for index, length in enumerate(lengths) if length or not case.lengths[index]]
    ids = case.packed_ids
    return changed(
        case,
        lengths=tuple(lengths[index] for index in kept),
        padding=padding,
        cuts=tuple(cut if cut <= begin else max(begin, cut - (end - begin)) for cut in case.cuts),
        document_ids=tuple(ids[index] for index in kept),
    )


def simpler_cuts(case: Case) -> Iterator[Case | None]:
    """Without a cut, or with one moved back."""
    for index, cut in enumerate(case.cuts):
        rest = case.cuts[:index] + case.cuts[index + 1 :]
        yield changed(case, cuts=rest)
        for place in below(cut):
            if place and place not in rest:
                yield changed(case, cuts=tuple(sorted((*rest, place))))
