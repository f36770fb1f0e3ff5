"""What to try: Hypothesis strategies for cases.

The simplest choice stands first everywhere, so that shrinking walks towards one document, one micro-sequence, one head
and the defaults. Values are never drawn, only their mode and seed: a shrinker would turn them into constants, whose
rounding errors are not independent (docs/oracle.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from hypothesis import strategies as st

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.cases.repair import fitted
from attn_fuzz.cases.spread import in_multiples
from attn_fuzz.generation.domain import USUAL_HEADS, Domain
from attn_fuzz.generation.fixed_layouts import pooled_cuts, pooled_keys, pooled_lengths
from attn_fuzz.generation.layouts import (
    CROWD,
    FEW_KEYS,
    LONG_EDGES,
    LONG_LAYERS,
    LONG_ROWS,
    LONG_SQUARES,
    MANY,
    TILE_EDGES,
    VERY_LONG,
    among,
    cut_points,
    document_lengths,
    keys_of,
    long_pasts,
    seldom,
    takes_few_keys,
)
from attn_fuzz.generation.long_rows import pooled_long
from attn_fuzz.generation.options import lse_gradients, options
from attn_fuzz.generation.placement import placed
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import document_spans

_ROTARY_THETAS = (10000.0, 10000.0, 500.0, 1e6)
_ROTARY_FRACTIONS = (0.5, 0.25, 0.75, 1.0)

_CROWD_ONCE_IN = (16, 14)
"""And of those once more: a call of a crowd takes as long as some fifty others. Of larger ranges Hypothesis takes the
ends far more often than once in so many times."""

_MANY_HEADS = 8
"""Beyond which there are no very long documents, where more are aimed at."""

_LONG_ROWS_ONCE_IN = 48
_LONG_SQUARE_ONCE_IN = 32
"""Of long rows; one takes as long as fifteen other cases do."""

_MAX_SELECTION = 128
# Which channels there are is nothing to ranks; borders are, and narrow heads let more of them be tried.
_MAX_RANK_HEAD_DIM = 32


def layout_numbers(capabilities: Capabilities) -> st.SearchStrategy[int | None]:
    """Which layout of the pool, for a backend that compiles for shapes."""
    return st.integers(0, capabilities.layouts - 1) if capabilities.layouts else st.none()


@st.composite
def kernel_cases(draw: st.DrawFn, domain: Domain) -> Case:
    """A single varlen call."""
    capabilities = domain.capabilities
    number = draw(layout_numbers(capabilities))
    # A crowd has little else, and what is aimed at may make it slow.
    crowds = number is None and capabilities.crowds and not domain.aim
    if crowds and draw(seldom(_CROWD_ONCE_IN[0])) and draw(seldom(_CROWD_ONCE_IN[1])):
        return crowd(draw, domain)
    if number is None and draws_long_rows(draw, domain):
        long = long_rows(draw, domain)
        if long is not None:
            return long
    if number is None:
        very_long = longest_of(domain)
        lengths = draw(document_lengths(empty=capabilities.empty_documents, many=MANY, very_long=very_long))
    else:
        lengths = pooled_lengths(number, capabilities)
    straddling_one, past = long_pasts(draw, lengths) if number is None and longest_of(domain) else (0, 0)
    chosen = options(draw, domain, "kernel", lengths, past)
    key_lengths = None
    if number is not None:
        keys = pooled_keys(number, lengths, capabilities, causal=bool(chosen["causal"]))
        if (one := pooled_long(number, chosen, domain)) is not None:
            lengths, keys = [*lengths, one[0]], [*keys, one[1]]
        # What is compiled for is how many documents there are and how long, not their order.
        order = draw(st.permutations(range(len(lengths))))
        lengths, keys = ([counts[index] for index in order] for counts in (lengths, keys))
        key_lengths = tuple(keys) if keys != lengths else None
    elif past or draw(st.booleans()):
        causal = bool(chosen["causal"])
        keys = keys_of(draw, lengths, capabilities, causal=causal)
        if not (causal and capabilities.causal_needs_equal_lengths):
            keys[straddling_one] += past
        key_lengths = tuple(keys) if sum(keys) and keys != lengths else None
    return Case(
        level="kernel",
        lengths=tuple(lengths),
        key_lengths=key_lengths,
        capacity=draw(capacities(capabilities)) if number is None else 0,
        lse_gradient=draw(lse_gradients(domain)),
        **(placed(draw, domain, len(lengths)) if number is None else {}),
        **chosen,  # type: ignore[arg-type]
    )


def crowd(draw: st.DrawFn, domain: Domain) -> Case:
    """A call of more documents than 16 bits count, of one token each."""
    lengths = [1] * CROWD
    return Case(level="kernel", lengths=tuple(lengths), **options(draw, domain, "kernel", lengths))  # type: ignore[arg-type]


def longest_of(domain: Domain) -> tuple[int, ...]:
    """Lengths that are drawn seldom; none where what is compiled, or aimed at, has many heads, for what both cost
    together."""
    compiled = any(configuration.heads > USUAL_HEADS for configuration in domain.capabilities.configurations)
    aimed = min((heads for heads, _ in domain.aim.get("heads", ())), default=0) > _MANY_HEADS
    return () if compiled or aimed else VERY_LONG


def capacities(capabilities: Capabilities) -> st.SearchStrategy[int]:
    """How many rows lie behind a call's last document."""
    return among([0, 0, 0, 1, 17] if capabilities.capacity is not False else [0])


def draws_long_rows(draw: st.DrawFn, domain: Domain) -> bool:
    """Whether a call is one of long rows: all of them where that is aimed at, seldom where nothing is compiled."""
    if (aimed := domain.decided("long_rows")) is not None:
        return aimed
    return not domain.capabilities.configurations and draw(seldom(_LONG_ROWS_ONCE_IN))


def long_rows(draw: st.DrawFn, domain: Domain) -> Case | None:
    """A call whose last document has thousands of queries, or None where the backend does not take what was chosen.

    They have few keys; once in a while as many as there are queries, causal.
    """
    capabilities = domain.capabilities
    square = draw(seldom(_LONG_SQUARE_ONCE_IN)) and True in domain.towards("causal", (True, False))
    ways = [causal for causal in (False, True) if takes_few_keys(capabilities, causal=causal)]
    if square:
        ways = [True] if capabilities.causal else []
    if compiled := capabilities.configurations:
        ways = [causal for causal in ways if any(each.causal == causal for each in compiled)]
    if not ways:
        return None
    causal = draw(among(domain.towards("causal", ways)))
    rows = draw(among(LONG_SQUARES[domain.device] if square else LONG_ROWS))
    keys = rows if square else draw(st.integers(1, FEW_KEYS))
    others = draw(_few_tiny(0 if capabilities.empty_documents else 1))
    compiled = tuple(each for each in compiled if each.causal == causal)
    masked = dataclasses.replace(capabilities, causal=causal, noncausal=not causal, configurations=compiled)
    narrow = dataclasses.replace(domain, capabilities=masked)
    if square and domain.device == "cpu" and "fp32" in domain.towards("dtype", domain.dtypes):
        # Budgets of the others take three times as long there; which row it is does not depend on them.
        narrow = dataclasses.replace(narrow, dtypes=("fp32",))
    chosen = options(draw, narrow, "kernel", [*others, rows], keys - rows)
    return Case(
        level="kernel",
        lengths=(*others, rows),
        key_lengths=None if square else (*others, keys),
        capacity=draw(capacities(capabilities)),
        lse_gradient=draw(lse_gradients(domain)),
        **placed(draw, domain, len(others) + 1),
        **chosen,  # type: ignore[arg-type]
    )


@functools.lru_cache(maxsize=2)
def _few_tiny(smallest: int) -> st.SearchStrategy[list[int]]:
    """Lengths of documents beside a long one."""
    return st.lists(st.integers(smallest, 4), max_size=3)


@st.composite
def layer_cases(draw: st.DrawFn, domain: Domain) -> Case:
    """A packed sequence cut into micro-sequences."""
    ranks, tensor_ranks = draw(among(domain.ranks)), draw(among(domain.tensor_ranks))
    if ranks * tensor_ranks > 1:
        return rank_cases(draw, domain, ranks, tensor_ranks)
    capabilities = domain.capabilities
    number = draw(layout_numbers(capabilities))
    if number is None:
        lengths = draw(
            document_lengths(empty=capabilities.empty_documents, long=LONG_EDGES[:3], many=MANY, very_long=LONG_LAYERS)
        )
        case = layers(draw, domain, lengths, draw(among([0, 0, 1, 5])))
    else:
        case = layers(draw, domain, pooled_lengths(number, capabilities), 0, number)
    return in_multiples(case, capabilities.slice_multiple) or case


def layers(draw: st.DrawFn, domain: Domain, lengths: Sequence[int], padding: int, number: int | None = None) -> Case:
    """A layer over these documents, and cuts: drawn, or those of a pooled layout's number."""
    capabilities = domain.capabilities
    packed = [*lengths, padding] if padding else list(lengths)
    chosen = options(draw, domain, "layer", packed)
    width = int(chosen["heads"]) * int(chosen["head_dim"])  # type: ignore[call-overload]
    # A selection narrower than the heads would repeat channels, whose roundings then agree.
    weights = draw(among(["gaussian", "selection"])) if width <= _MAX_SELECTION else "gaussian"
    if number is None:
        whole = not (chosen["causal"] or capabilities.noncausal_cuts)
        cuts = () if whole else draw(cut_points(packed, causal=bool(chosen["causal"])))
    else:
        cuts = pooled_cuts(number, packed, causal=bool(chosen["causal"]))
    # What is computed is a document, and drawn as one.
    between = capabilities.padding_between and capabilities.padding != "computed" and len(lengths) > 1
    norm = among(["none", "rms"] if capabilities.norms else ["none"])
    rotary, pairs = "none", int(chosen["head_dim"]) // 2  # type: ignore[call-overload]
    if pairs * 2 == chosen["head_dim"]:
        rotary = draw(among(capabilities.rotaries))
    return Case(
        lengths=tuple(lengths),
        padding=padding,
        padding_ids=draw(_padding_ids(len(lengths))) if between else (),
        cuts=cuts,
        hidden=width if weights == "selection" else draw(among([16, 8, max(4, min(width, 64))])),
        query_norm=draw(norm),
        key_norm=draw(norm),
        value_norm=draw(norm),
        shared_key_value=draw(st.booleans()) if capabilities.shared_key_value else False,
        rotary=rotary,
        rotary_theta=draw(among(_ROTARY_THETAS)) if rotary != "none" else 10000.0,
        # Whole numbers of pairs only: what becomes of a broken one is a question of taste.
        rotary_fraction=draw(among([f for f in _ROTARY_FRACTIONS if (f * pairs).is_integer()]))
        if rotary == "proportional"
        else 0.5,
        weights=weights,
        capacity=draw(among([0, 0, 1, 17])),
        **chosen,  # type: ignore[arg-type]
    )


@functools.lru_cache(maxsize=16)
def _padding_ids(documents: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Which of at least two documents are padding: none as often as not, and never the last."""
    some = st.sets(st.integers(0, documents - 2), max_size=2).map(lambda ids: tuple(sorted(ids)))
    return st.one_of(st.just(()), some)


@functools.lru_cache(maxsize=2)
def _few_lengths(smallest: int) -> st.SearchStrategy[list[int]]:
    """Lengths of a few short documents, the last of which may lie at a tile's edge."""
    several = st.lists(st.integers(smallest, 9), min_size=1, max_size=4)
    beside_tile = st.tuples(several, among(TILE_EDGES)).map(lambda parts: [*parts[0], parts[1]])
    return st.one_of(several, beside_tile).filter(any)


def rank_cases(draw: st.DrawFn, domain: Domain, ranks: int, tensor_ranks: int = 1) -> Case:
    """A packed sequence that several ranks share: short documents, which put many borders of many kinds between them.

    Documents end anywhere, so that padding fills the last rank's slice, more or less of it; long ones leave ranks whose
    slice holds no document's beginning. Non-causal documents cannot be spread, so there every rank has its own.
    """
    capabilities, together = domain.capabilities, ranks * tensor_ranks
    lengths = list(draw(_few_lengths(0 if capabilities.empty_documents else 1)))
    padding = draw(among([0, 0, 1, 5]))
    if draw(st.booleans()):
        lengths[-1] += -(sum(lengths) + padding) % (together * capabilities.slice_multiple)
    least = max(capabilities.head_dim_multiple, domain.narrowest)
    widest = max(least, min(capabilities.max_head_dim, _MAX_RANK_HEAD_DIM))
    narrow = dataclasses.replace(domain, capabilities=dataclasses.replace(capabilities, max_head_dim=widest))
    case = layers(draw, narrow, lengths, padding)
    if tensor_ranks > 1:
        heads = tensor_ranks * draw(among([1, 2]))
        hidden = heads * case.head_dim if case.weights == "selection" else case.hidden
        case = case.replace(heads=heads, kv_heads=1, hidden=hidden)
    spread = {"ranks": ranks, "tensor_ranks": tensor_ranks}
    if not case.causal:
        lengths[-1] += -sum(lengths) % capabilities.slice_multiple
        return case.replace(**spread, lengths=lengths * together, padding=0, cuts=())
    padding, cuts = fitted(together * capabilities.slice_multiple, lengths, padding, case.cuts)
    return case.replace(**spread, padding=padding, cuts=cuts)


def cases(level: str, domain: Domain) -> st.SearchStrategy[Case]:
    """Cases of a level."""
    return kernel_cases(domain) if level == "kernel" else layer_cases(domain.for_layers)


def straddling(case: Case) -> bool:
    """Whether some cut of a layer case is inside a document: what a campaign must not go without."""
    boundaries = {span.end for span in document_spans(case.packed_lengths)}
    return any(cut not in boundaries for cut in case.cuts)
