"""What to try: Hypothesis strategies for cases.

The simplest choice stands first everywhere, so that shrinking walks towards one document, one micro-sequence, one head
and the defaults. Values are never drawn, only their mode and seed: a shrinker would turn them into constants, whose
rounding errors are not independent (docs/oracle.md).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from hypothesis import strategies as st

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.cases.repair import fitted
from attn_fuzz.generation.fixed_layouts import pooled_cuts, pooled_keys, pooled_lengths
from attn_fuzz.generation.layouts import (
    FEW_KEYS,
    LONG_EDGES,
    LONG_LAYERS,
    LONG_ROWS,
    LONG_SQUARES,
    MANY,
    MAX_PAIRS,
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
from attn_fuzz.reference.case import VALUES, Case
from attn_fuzz.reference.layout import document_spans

_ROTARY_THETAS = (10000.0, 10000.0, 500.0, 1e6)
_ROTARY_FRACTIONS = (0.5, 0.25, 0.75, 1.0)

HEAD_GROUPS: tuple[tuple[int, int], ...] = (
    *((1, 1), (2, 1), (2, 2), (4, 2), (3, 1), (6, 2), (4, 1), (8, 8)),
    *((5, 1), (8, 1), (6, 3), (12, 12), (16, 2), (14, 2), (32, 4)),
)
"""(heads, kv_heads): MHA, GQA and MQA, groups of 1 to 8."""

MANY_HEADS: tuple[tuple[int, int], ...] = (
    *((16, 1), (9, 1), (40, 40), (32, 1), (32, 2), (64, 1)),
    *((71, 1), (64, 8), (64, 64), (128, 8), (128, 1), (128, 128)),
)
"""Drawn seldom, for short documents: groups above 8, as Gemma's, Llama's and Falcon's, and more heads than a warp has
threads, as DeepSeek's."""

_MANY_HEADS_ONCE_IN = 16
_LONG_ROWS_ONCE_IN = 48
_LONG_SQUARE_ONCE_IN = 32
"""Of long rows; one takes as long as fifteen other cases do."""

HEAD_DIMS: tuple[int, ...] = (16, 8, 32, 64, 24, 5, 80, 96, 128, 192, 256, 1, 320, 48, 36, 40, 72, 100, 112, 160, 224)

# A float64 reference keeps several [samples, heads, q, k] tensors: this bounds heads * longest^2 where it can.
_MAX_SCORES = {"kernel": 1 << 17, "layer": 1 << 14}
# Pairs of a call (layout_strategies.py) times head_dim.
_MAX_PRODUCTS = 1 << 24
# And this what projections cost: tokens * heads * head_dim.
_MAX_CHANNELS = {"kernel": 1 << 17, "layer": 1 << 15}
# Of a layer, heads * head_dim: probes with whole numbers take as many hidden channels, and weights the square of them.
_MAX_WIDTH = 2048
# Pairs of a call that only one head is given.
_MAX_SHARED_PAIRS = 1 << 21
# What a kernel case has of each of these; a large one takes as long as ten others, and seldom finds what they do not.
_SHARES = (4, 4, 4, 1)
_MAX_SELECTION = 128
# Which channels there are is nothing to ranks; borders are, and narrow heads let more of them be tried.
_MAX_RANK_HEAD_DIM = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """What to draw from: the options that a backend takes, so that few draws are refused."""

    capabilities: Capabilities
    device: str
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...] = (1,)
    """How many ranks layer cases are spread over; one of these."""
    tensor_ranks: tuple[int, ...] = (1,)
    """Over how many ranks each of those spreads its query heads; one of these."""

    @classmethod
    def of(
        cls,
        capabilities: Capabilities,
        device: str,
        dtypes: Sequence[str] = (),
        ranks: Sequence[int] = (1,),
        tensor_ranks: Sequence[int] = (1,),
    ) -> Domain:
        """The domain of a backend, narrowed to ``dtypes`` where some are given, on one of so many ranks.

        Raises:
            ValueError: when the backend takes none of them.
        """
        taken = tuple(dtype for dtype in dtypes or capabilities.dtypes if dtype in capabilities.dtypes)
        if not taken:
            raise ValueError(
                f"none of the dtypes {', '.join(dtypes)} is taken; there are {', '.join(capabilities.dtypes)}"
            )
        return cls(
            capabilities=capabilities,
            device=device,
            dtypes=taken,
            ranks=tuple(sorted(ranks)),
            tensor_ranks=tuple(sorted(tensor_ranks)),
        )

    @property
    def head_dims(self) -> tuple[int, ...]:
        multiple = self.capabilities.head_dim_multiple
        limit = self.capabilities.max_head_dim
        some = self.capabilities.head_dims or HEAD_DIMS
        dims = tuple(dim for dim in some if dim % multiple == 0 and dim <= limit)
        return dims or (min(multiple, limit),)

    @property
    def head_groups(self) -> tuple[tuple[int, int], ...]:
        return self._taken(HEAD_GROUPS)

    @property
    def many_heads(self) -> tuple[tuple[int, int], ...]:
        return self._taken(MANY_HEADS)

    def _taken(self, groups: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple(pair for pair in groups if self.capabilities.gqa or pair[0] == pair[1])


def window_sides(capabilities: Capabilities, longest: int) -> st.SearchStrategy[int]:
    """Sizes of one side of a window, about documents of up to ``longest`` tokens."""
    usual = {0, 1, 2, 7, 15, 16, 31, 63, 64, max(longest - 1, 0), longest, longest + 5}
    return among(sorted(capabilities.window_sizes or usual))


def windows(draw: st.DrawFn, domain: Domain, *, causal: bool, longest: int) -> tuple[int, int]:
    """None most often; otherwise from the row alone to wider than any document."""
    capabilities = domain.capabilities
    if not capabilities.window or (capabilities.window_needs_causal and not causal) or not draw(st.booleans()):
        return (-1, -1)
    side = window_sides(capabilities, longest)
    left = draw(side)
    if causal:
        # No bound on the right, and none beyond the row itself, mean the same.
        return (left, draw(among([-1, -1, 0])))
    return draw(among([(left, left), (left, -1), (-1, left), (left, 0), (left, draw(side))]))


def usual_scales(capabilities: Capabilities, head_dim: int) -> tuple[float | None, ...]:
    """The usual scale, or powers of two around it.

    Far from it scores grow so large that their rounding in the storage dtype, where a backend does that, moves
    probabilities by more than any first-order budget describes.
    """
    half = 2.0 ** math.floor(math.log2(head_dim**-0.5))
    return (None, None, half, 2 * half) if capabilities.scale else (None,)


def scales(capabilities: Capabilities, head_dim: int) -> st.SearchStrategy[float | None]:
    """One of those."""
    return among(usual_scales(capabilities, head_dim)) if capabilities.scale else st.none()


def compiled(draw: st.DrawFn, domain: Domain, longest: int) -> dict[str, object]:
    """Options that a compiling backend has compiled."""
    chosen = draw(among([c for c in domain.capabilities.configurations if c.dtype in domain.dtypes]))
    sides = window_sides(domain.capabilities, longest)
    left = draw(sides) if chosen.window in ("left", "both") else -1
    right = draw(sides) if chosen.window in ("right", "both") else -1
    scale = draw(scales(domain.capabilities, chosen.head_dim))
    return {**chosen._asdict(), "window": (left, right), "scale": scale}


def free_options(draw: st.DrawFn, capabilities: Capabilities, level: str) -> dict[str, object]:
    """What no backend compiles for: values and memory."""
    memories = [memory for memory in capabilities.memories if level == "kernel" or memory != "broadcast"]
    return {
        "values": draw(among(VALUES)),
        "seed": draw(st.integers(0, 7)),
        "memory": draw(among(memories)),
    }


def options(draw: st.DrawFn, domain: Domain, level: str, lengths: Sequence[int], past: int = 0) -> dict[str, object]:
    """Everything that kernel and layer cases share.

    Args:
        draw: Hypothesis's. Functions that take it cost less than composites, which are made anew at each use.
        domain: what to draw from.
        level: ``kernel`` or ``layer``.
        lengths: of all documents, padding included.
        past: keys that stand before those, where there is a long past; less than 0 where long rows have fewer keys.
    """
    capabilities, longest, tokens = domain.capabilities, max(lengths), sum(lengths)
    pairs = tokens * (tokens + past)
    scores = longest * (longest + min(past, 0))
    if capabilities.configurations:
        return {**compiled(draw, domain, longest), **free_options(draw, capabilities, level)}
    # Of layers more are causal: what is not cannot be cut inside a document.
    choices = (True, False, True) if level == "layer" else (True, False)
    causal_choices = [choice for choice in choices if (capabilities.causal if choice else capabilities.noncausal)]
    causal = draw(among(causal_choices))
    many = draw(seldom(_MANY_HEADS_ONCE_IN))
    share = draw(among(_SHARES)) if level == "kernel" and not many and past >= 0 else 1

    def fitting(groups: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        limit = min(_MAX_SCORES[level] / scores, MAX_PAIRS / pairs) / share
        return [group for group in groups if group[0] <= limit]

    groups = (fitting(domain.many_heads) if many else []) or fitting(domain.head_groups)
    least = domain.head_groups[: 2 if pairs <= _MAX_SHARED_PAIRS else 1]
    heads, kv_heads = draw(among(groups or least))
    dims = [
        dim
        for dim in domain.head_dims
        if (tokens + past // 2) * heads * dim * share <= _MAX_CHANNELS[level]
        and pairs * heads * dim * share <= _MAX_PRODUCTS
        and (level == "kernel" or heads * dim <= _MAX_WIDTH)
    ]
    head_dim = draw(among(dims or list(domain.head_dims[:1])))
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "causal": causal,
        "window": windows(draw, domain, causal=causal, longest=longest),
        "scale": draw(scales(capabilities, head_dim)),
        "softcap": draw(among([0.0, 0.0, 20.0, 2.5])) if capabilities.softcap else 0.0,
        "dtype": draw(among(domain.dtypes)),
        **free_options(draw, capabilities, level),
    }


def layout_numbers(capabilities: Capabilities) -> st.SearchStrategy[int | None]:
    """Which layout of the pool, for a backend that compiles for shapes."""
    return st.integers(0, capabilities.layouts - 1) if capabilities.layouts else st.none()


@st.composite
def kernel_cases(draw: st.DrawFn, domain: Domain) -> Case:
    """A single varlen call."""
    capabilities = domain.capabilities
    number = draw(layout_numbers(capabilities))
    if number is None and not capabilities.configurations and draw(seldom(_LONG_ROWS_ONCE_IN)):
        long = long_rows(draw, domain)
        if long is not None:
            return long
    if number is None:
        lengths = draw(document_lengths(empty=capabilities.empty_documents, many=MANY, very_long=VERY_LONG))
    else:
        lengths = pooled_lengths(number, capabilities)
    straddling_one, past = long_pasts(draw, lengths) if number is None else (0, 0)
    chosen = options(draw, domain, "kernel", lengths, past)
    key_lengths = None
    if number is not None:
        keys = pooled_keys(number, lengths, capabilities, causal=bool(chosen["causal"]))
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
        **chosen,  # type: ignore[arg-type]
    )


def capacities(capabilities: Capabilities) -> st.SearchStrategy[int]:
    """How many rows lie behind a call's last document."""
    return among([0, 0, 0, 1, 17] if capabilities.capacity is not False else [0])


def long_rows(draw: st.DrawFn, domain: Domain) -> Case | None:
    """A call whose last document has thousands of queries, or None where the backend does not take what was chosen.

    They have few keys; once in a while as many as there are queries, causal.
    """
    capabilities = domain.capabilities
    square = draw(seldom(_LONG_SQUARE_ONCE_IN))
    ways = [causal for causal in (False, True) if takes_few_keys(capabilities, causal=causal)]
    if square:
        ways = [True] if capabilities.causal else []
    if not ways:
        return None
    causal = draw(among(ways))
    rows = draw(among(LONG_SQUARES[domain.device] if square else LONG_ROWS))
    keys = rows if square else draw(st.integers(1, FEW_KEYS))
    others = draw(_few_tiny(0 if capabilities.empty_documents else 1))
    masked = dataclasses.replace(capabilities, causal=causal, noncausal=not causal)
    narrow = dataclasses.replace(domain, capabilities=masked)
    if square and domain.device == "cpu" and "fp32" in domain.dtypes:
        # Budgets of the others take three times as long there; which row it is does not depend on them.
        narrow = dataclasses.replace(narrow, dtypes=("fp32",))
    chosen = options(draw, narrow, "kernel", [*others, rows], keys - rows)
    return Case(
        level="kernel",
        lengths=(*others, rows),
        key_lengths=None if square else (*others, keys),
        capacity=draw(capacities(capabilities)),
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
        return layers(draw, domain, lengths, draw(among([0, 0, 1, 5])))
    return layers(draw, domain, pooled_lengths(number, capabilities), 0, number)


def layers(draw: st.DrawFn, domain: Domain, lengths: Sequence[int], padding: int, number: int | None = None) -> Case:
    """A layer over these documents, and cuts: drawn, or those of a pooled layout's number."""
    capabilities = domain.capabilities
    packed = [*lengths, padding] if padding else list(lengths)
    chosen = options(draw, domain, "layer", packed)
    width = int(chosen["heads"]) * int(chosen["head_dim"])  # type: ignore[call-overload]
    # A selection narrower than the heads would repeat channels, whose roundings then agree.
    weights = draw(among(["gaussian", "selection"])) if width <= _MAX_SELECTION else "gaussian"
    if number is None:
        cuts = draw(cut_points(packed, causal=bool(chosen["causal"])))
    else:
        cuts = pooled_cuts(number, packed, causal=bool(chosen["causal"]))
    norm = among(["none", "rms"] if capabilities.norms else ["none"])
    rotary, pairs = "none", int(chosen["head_dim"]) // 2  # type: ignore[call-overload]
    if pairs * 2 == chosen["head_dim"]:
        rotary = draw(among(capabilities.rotaries))
    return Case(
        lengths=tuple(lengths),
        padding=padding,
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
    capabilities = domain.capabilities
    lengths = list(draw(_few_lengths(0 if capabilities.empty_documents else 1)))
    padding = draw(among([0, 0, 1, 5]))
    if draw(st.booleans()):
        lengths[-1] += -(sum(lengths) + padding) % (ranks * tensor_ranks)
    widest = max(capabilities.head_dim_multiple, min(capabilities.max_head_dim, _MAX_RANK_HEAD_DIM))
    narrow = dataclasses.replace(domain, capabilities=dataclasses.replace(capabilities, max_head_dim=widest))
    case = layers(draw, narrow, lengths, padding)
    if tensor_ranks > 1:
        heads = tensor_ranks * draw(among([1, 2]))
        hidden = heads * case.head_dim if case.weights == "selection" else case.hidden
        case = case.replace(heads=heads, kv_heads=1, hidden=hidden)
    spread = {"ranks": ranks, "tensor_ranks": tensor_ranks}
    if not case.causal:
        return case.replace(**spread, lengths=lengths * ranks * tensor_ranks, padding=0, cuts=())
    padding, cuts = fitted(ranks * tensor_ranks, lengths, padding, case.cuts)
    return case.replace(**spread, padding=padding, cuts=cuts)


def cases(level: str, domain: Domain) -> st.SearchStrategy[Case]:
    """Cases of a level."""
    return kernel_cases(domain) if level == "kernel" else layer_cases(domain)


def straddling(case: Case) -> bool:
    """Whether some cut of a layer case is inside a document: what a campaign must not go without."""
    boundaries = {span.end for span in document_spans(case.packed_lengths)}
    return any(cut not in boundaries for cut in case.cuts)
