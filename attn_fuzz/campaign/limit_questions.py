"""What a user's kernel is asked before it is fuzzed: plain cases, and small ones that differ from them in one axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.repair import fitted
from attn_fuzz.cases.spread import in_multiples
from attn_fuzz.generation.domain import Domain
from attn_fuzz.reference.case import Case, CaseError

LENGTHS: Final = (5, 33, 16)
"""Of the documents of every case, unless it is about lengths."""


@dataclasses.dataclass(frozen=True)
class Question:
    """Something that a kernel may not take."""

    axis: str
    """Such as ``memory misaligned``."""
    case: Case
    """Small, and the plain case in all else."""
    unpromised: bool = False
    """Nothing is said of it, so that what comes back wrong is not taken, either; and it is asked although another
    question of its axis has failed."""


def plain_case(backend: Backend, domain: Domain, dtype: str) -> Case:
    """A case as plain as the backend's declaration allows."""
    stated = domain.capabilities
    options: dict[str, Any] = {"dtype": dtype, "causal": stated.causal, "heads": 2, "kv_heads": 2}
    if stated.configurations:
        chosen = next((c for c in stated.configurations if c.dtype == dtype), stated.configurations[0])
        options |= {**chosen._asdict(), "window": (-1, -1)}
    else:
        options["head_dim"] = 64 if 64 in domain.head_dims else max(domain.head_dims)
    if "kernel" in backend.levels:
        return Case(level="kernel", lengths=LENGTHS, **options)
    between = (5, 38) if stated.noncausal_cuts else ()
    case = Case(lengths=LENGTHS, hidden=16, cuts=(3, 20) if stated.causal else between, **options)
    return _spread(case, stated)


def _spread(case: Case, stated: Capabilities) -> Case:
    """A layer's plain case on as few ranks as it takes, with slices of a size that it takes."""
    ranks, tensor_ranks = (
        min(taken) if isinstance(taken, tuple) else 1 for taken in (stated.ranks, stated.tensor_ranks)
    )
    together = ranks * tensor_ranks
    if tensor_ranks > 1:
        case = case.replace(heads=2 * tensor_ranks, kv_heads=1)
    if together > 1 and not case.causal:
        # Every rank has documents of its own.
        one, other, *_ = case.lengths
        other += -(one + other) % stated.slice_multiple
        case = case.replace(lengths=(one, other) * together, cuts=())
    padding, cuts = fitted(together, case.lengths, case.padding, case.cuts)
    case = case.replace(padding=padding, cuts=cuts, ranks=ranks, tensor_ranks=tensor_ranks)
    return in_multiples(case, stated.slice_multiple) or case


OTHER_VALUES: Final = "values of another head_dim than keys"
GROUPED_VALUES: Final = f"{OTHER_VALUES}, grouped heads"
_VALUE_DIMS: Final = ((64, 32), (64, 128), (192, 128))
_FLOOR: Final = (1, 8, 16)
_OTHER_DIMS: Final = (5, 24, 36, 80, 256, 320, 192, 128)
"""One of each kind: odd, multiples of 4 and of 8, powers of two; and the largest."""


def _questions(base: Case, domain: Domain, dtypes: Sequence[str]) -> Iterator[Question]:
    """What is most often not taken first."""
    stated = domain.capabilities
    if stated.configurations:
        return
    few = stated.head_dims[:_MOST_DIMS]
    yield from (Question(f"head_dim {dim}", base.replace(head_dim=dim)) for dim in few or _FLOOR)
    if base.level == "kernel" and "misaligned" in stated.memories:
        # Addresses that are off by an element are something else for elements of another size.
        for dtype in (base.dtype, *(dtype for dtype in dtypes if dtype != base.dtype)):
            yield Question("memory misaligned", base.replace(memory="misaligned", dtype=dtype))
        # Seen to give NaN, and no error, where others end in one.
        many = {"lengths": (1, 6, 1, 4, 1), "memory": "misaligned", "values": "ties", "seed": 4}
        yield Question("memory misaligned", base.replace(**many))
    if base.level == "kernel" and stated.head_dims_v is not False:
        for head_dim, head_dim_v in _value_dims(domain):
            case = base.replace(head_dim=head_dim, head_dim_v=head_dim_v)
            yield Question(OTHER_VALUES, case, unpromised=stated.head_dims_v is None)
    if stated.gqa:
        yield Question("grouped heads", base.replace(heads=4, kv_heads=2))
    if base.level == "kernel" and stated.head_dims_v is not False and stated.gqa and stated.gqa_head_dims_v:
        # Some backwards take both, but not together; one pair shows it.
        for head_dim, head_dim_v in _value_dims(domain)[:1]:
            case = base.replace(head_dim=head_dim, head_dim_v=head_dim_v, heads=4, kv_heads=2)
            yield Question(GROUPED_VALUES, case, unpromised=stated.head_dims_v is None)
    if stated.window and stated.causal:
        yield Question("window, causal", base.replace(causal=True, window=(7, -1)))
    if stated.window and stated.noncausal and not stated.window_needs_causal:
        cuts = {} if base.level == "kernel" else {"cuts": (5, 38) if stated.noncausal_cuts else ()}
        yield Question("window, non-causal", base.replace(causal=False, window=(7, 3), **cuts))
    if stated.loose_max_seqlen and base.level == "kernel":
        yield Question("loose max_seqlen", base.replace(loose_max_seqlen=(70, 130)))
    for side, gaps in (("q", (3, 0)), ("k", (0, 3))):
        if side in stated.gaps and base.level == "kernel":
            yield Question(f"gaps {side}", base.replace(gaps=gaps))
    if base.level == "kernel":
        others = (memory for memory in stated.memories if memory not in ("misaligned", "contiguous"))
        yield from (
            Question(f"memory {memory}", base.replace(memory=memory)) for memory in (*others, *stated.far_memories)
        )
    yield from (Question(f"head_dim {dim}", base.replace(head_dim=dim)) for dim in _OTHER_DIMS if not few)


_MOST_DIMS: Final = 8
"""Of those that a kernel names so many are asked about."""


def _value_dims(domain: Domain) -> Sequence[tuple[int, int]]:
    """Pairs (head_dim, head_dim_v) that are asked about: those that are named, or one either way and a usual one."""
    stated = domain.capabilities
    if isinstance(stated.head_dims_v, tuple):
        return stated.head_dims_v[:_MOST_DIMS]
    free = dataclasses.replace(domain, capabilities=dataclasses.replace(stated, head_dims_v=True)).value_dims
    return [pair for pair in _VALUE_DIMS if pair in free] or free[: len(_VALUE_DIMS)]


def questions_of(base: Case, backend: Backend, domain: Domain, dtypes: Sequence[str]) -> list[Question]:
    """The questions that the declaration allows."""
    found = []
    for question in _questions(base, domain, dtypes):
        try:
            case = question.case
            drawn = case.head_dim_v is not None or (case.head_dim in domain.every_head_dim and case != base)
            if drawn and backend.refusal(case, domain.device) is None:
                found.append(question)
        except CaseError:
            continue
    return found
