"""Options that kernel and layer cases share: heads, masks, dtypes, values and memory, as large as lengths allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.layouts import MAX_PAIRS, among, seldom
from attn_fuzz.reference.case import VALUES

_MANY_HEADS_ONCE_IN = 12
_ANY_HEAD_DIM_ONCE_IN = 4
_VALUE_DIM_ONCE_IN = 12

# A float64 reference keeps several [samples, heads, q, k] tensors: this bounds heads * longest^2 where it can.
_MAX_SCORES = {"kernel": 1 << 17, "layer": 1 << 14}
# Pairs of a call (layouts.py) times head_dim.
_MAX_PRODUCTS = 1 << 24
# And this what projections cost: tokens * heads * head_dim.
_MAX_CHANNELS = {"kernel": 1 << 17, "layer": 1 << 15}
# Of a layer, heads * head_dim: probes with whole numbers take as many hidden channels, and weights the square of them.
_MAX_WIDTH = 2048
# Pairs of a call that only one head is given.
_MAX_SHARED_PAIRS = 1 << 21
# What a kernel case has of each of these; a large one takes as long as ten others, and seldom finds what they do not.
_SHARES = (4, 4, 4, 1)


def _usual_sides(longest: int) -> set[int]:
    return {0, 1, 2, 7, 15, 16, 31, 63, 64, max(longest - 1, 0), longest, longest + 5}


def sides_of(window: str, sides: Sequence[int], choose: Callable[[Sequence[Any]], Any]) -> tuple[int, int]:
    """(left, right) of a window that is bounded on these sides (``Configuration.window``).

    Args:
        window: which are.
        sides: sizes that one may have.
        choose: one of several.
    """
    left = choose(sides) if window in ("left", "both") else -1
    return left, choose(sides) if window in ("right", "both") else -1


def window_towards(
    domain: Domain, sides: Sequence[int], choose: Callable[[Sequence[Any]], Any], *, causal: bool
) -> tuple[int, int] | None:
    """A window that is aimed at, where such attention has one; None where none is aimed at.

    Args:
        domain: what is aimed at.
        sides: sizes that one side may have.
        choose: one of several.
        causal: whether the attention is.
    """
    if (wanted := domain.aim.get("window")) is None:
        return None
    capabilities = domain.capabilities
    narrow = not capabilities.window or (capabilities.window_needs_causal and not causal)
    there = ("none",) if narrow else ("none", "left") if causal else ("none", "left", "right", "both")
    return sides_of(choose([name for name in there if name in wanted] or ["none"]), sides, choose)


def windows(draw: st.DrawFn, domain: Domain, *, causal: bool, longest: int) -> tuple[int, int]:
    """None most often; otherwise from the row alone to wider than any document."""
    capabilities = domain.capabilities
    sizes = sorted(capabilities.window_sizes or _usual_sides(longest))
    aimed = window_towards(domain, sizes, lambda some: draw(among(some)), causal=causal)
    if aimed is not None:
        return aimed
    if not capabilities.window or (capabilities.window_needs_causal and not causal) or not draw(st.booleans()):
        return (-1, -1)
    side = among(sizes)
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


def options_within(
    configuration: Configuration,
    capabilities: Capabilities,
    sides: Sequence[int],
    choose: Callable[[Sequence[Any]], Any],
) -> dict[str, object]:
    """Options of a case of a configuration; what it leaves open, the sizes of windows and the scale, is chosen.

    Args:
        configuration: one that is taken.
        capabilities: of the backend.
        sides: sizes that one side of a window may have.
        choose: one of several.
    """
    window = sides_of(configuration.window, sides, choose)
    scale = choose(usual_scales(capabilities, configuration.head_dim))
    return {**configuration._asdict(), "window": window, "scale": scale}


def compiled(draw: st.DrawFn, domain: Domain, longest: int) -> dict[str, object]:
    """Options that a compiling backend has compiled."""
    capabilities = domain.capabilities
    chosen = draw(among(domain.aimed([c for c in capabilities.configurations if c.dtype in domain.dtypes])))
    sides = sorted(capabilities.window_sizes or _usual_sides(longest))
    return options_within(chosen, capabilities, sides, lambda some: draw(among(some)))


def lse_gradients(domain: Domain) -> st.SearchStrategy[bool]:
    """Whether the LSE of a kernel case has a gradient, where it is known to take one."""
    choices = [False, False, False, True] if domain.capabilities.lse_gradient else [False]
    return among(domain.towards("lse_gradient", choices))


_FAR_ONCE_IN = 48
"""Kernel calls whose rows or heads are far apart; where that is aimed at, all of them."""


def memories(draw: st.DrawFn, domain: Domain, level: str) -> st.SearchStrategy[str]:
    """Memory layouts that are taken at a level."""
    usual, far = domain.capabilities.memories, domain.capabilities.far_memories if level == "kernel" else ()
    near = [each for each in usual if level == "kernel" or each != "broadcast"]
    if (wanted := domain.aim.get("memory")) is not None and not set(wanted).isdisjoint((*near, *far)):
        return among(domain.towards("memory", (*near, *far)))
    seldom_far: bool = bool(far) and draw(seldom(_FAR_ONCE_IN))
    return among(far if seldom_far else near)


def free_options(draw: st.DrawFn, domain: Domain, level: str) -> dict[str, object]:
    """What no backend compiles for: values and memory."""
    return {
        "values": draw(among(VALUES)),
        "seed": draw(st.integers(0, 7)),
        "memory": draw(memories(draw, domain, level)),
    }


def channels(draw: st.DrawFn, domain: Domain, level: str, narrow: Callable[[int], bool]) -> tuple[int, int | None]:
    """(head_dim, head_dim_v): the usual ones most often, then any that is taken, and two that differ.

    Args:
        draw: Hypothesis's.
        domain: what to draw from.
        level: ``kernel`` or ``layer``, whose values have as many channels as keys.
        narrow: whether there is time for so many channels.
    """
    if level == "kernel" and domain.value_dims and domain.differing is not False:
        differ: bool = domain.differing or draw(seldom(_VALUE_DIM_ONCE_IN))
        pairs = [pair for pair in domain.value_dims if narrow(max(pair))] if differ else []
        if pairs := domain.towards("values", pairs, sorted(domain.value_dims, key=max) if differ else ()):
            head_dim, head_dim_v = draw(among(pairs))
            return head_dim, head_dim_v
    aimed = "head_dim" in domain.aim
    some = domain.every_head_dim if aimed or draw(seldom(_ANY_HEAD_DIM_ONCE_IN)) else domain.head_dims
    dims = [dim for dim in some if narrow(dim)] or domain.head_dims[:1]
    return draw(among(domain.towards("head_dim", dims, sorted(some) if aimed else ()))), None


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
        return {**compiled(draw, domain, longest), **free_options(draw, domain, level)}
    domain = domain.parted(lambda: draw(seldom(_VALUE_DIM_ONCE_IN)))
    # Of layers more are causal: what is not cannot be cut inside a document.
    choices = (True, False, True) if level == "layer" else (True, False)
    causal_choices = [choice for choice in choices if (capabilities.causal if choice else capabilities.noncausal)]
    causal = draw(among(domain.towards("causal", causal_choices)))
    many = draw(seldom(_MANY_HEADS_ONCE_IN))
    # What is aimed at may be large.
    sparing = level == "kernel" and not many and past >= 0 and not domain.aim
    share = draw(among(_SHARES)) if sparing else 1

    def narrow(heads: int, dim: int) -> bool:
        return (
            (tokens + past // 2) * heads * dim * share <= _MAX_CHANNELS[level]
            and pairs * heads * dim * share <= _MAX_PRODUCTS
            and (level == "kernel" or heads * dim <= _MAX_WIDTH)
        )

    def fitting(groups: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        limit = min(_MAX_SCORES[level] / scores, MAX_PAIRS / pairs) / share
        return [group for group in groups if group[0] <= limit and narrow(group[0], domain.narrowest)]

    groups = (fitting(domain.many_heads) if many else []) or fitting(domain.head_groups)
    every = sorted((*domain.head_groups, *domain.many_heads)) if "heads" in domain.aim else []
    if every:
        groups = fitting((*domain.head_groups, *domain.many_heads))
    least = domain.head_groups[: 2 if pairs <= _MAX_SHARED_PAIRS else 1]
    heads, kv_heads = draw(among(domain.towards("heads", groups or least, every)))
    head_dim, head_dim_v = channels(draw, domain, level, lambda dim: narrow(heads, dim))
    softcaps = domain.towards("softcap", [0.0, 0.0, 20.0, 2.5], of=bool)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "causal": causal,
        "window": windows(draw, domain, causal=causal, longest=longest),
        "scale": draw(scales(capabilities, head_dim)),
        "softcap": draw(among(softcaps)) if capabilities.softcap else 0.0,
        "dtype": draw(among(domain.towards("dtype", domain.dtypes))),
        **free_options(draw, domain, level),
    }
