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


def window_sides(capabilities: Capabilities, longest: int) -> st.SearchStrategy[int]:
    """Sizes of one side of a window, about documents of up to ``longest`` tokens."""
    return among(sorted(capabilities.window_sizes or _usual_sides(longest)))


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
    left = choose(sides) if configuration.window in ("left", "both") else -1
    right = choose(sides) if configuration.window in ("right", "both") else -1
    scale = choose(usual_scales(capabilities, configuration.head_dim))
    return {**configuration._asdict(), "window": (left, right), "scale": scale}


def compiled(draw: st.DrawFn, domain: Domain, longest: int) -> dict[str, object]:
    """Options that a compiling backend has compiled."""
    capabilities = domain.capabilities
    chosen = draw(among([c for c in capabilities.configurations if c.dtype in domain.dtypes]))
    sides = sorted(capabilities.window_sizes or _usual_sides(longest))
    return options_within(chosen, capabilities, sides, lambda some: draw(among(some)))


def lse_gradients(capabilities: Capabilities) -> st.SearchStrategy[bool]:
    """Whether the LSE of a kernel case has a gradient, where it is known to take one."""
    return among([False, False, False, True] if capabilities.lse_gradient else [False])


_FAR_ONCE_IN = 48
"""Kernel calls whose rows or heads are far apart; where that is aimed at, all of them."""


def memories(draw: st.DrawFn, domain: Domain, level: str) -> st.SearchStrategy[str]:
    """Memory layouts that are taken at a level."""
    usual, far = domain.capabilities.memories, domain.capabilities.far_memories if level == "kernel" else ()
    wanted = domain.aim.get("memory", ())
    if far and (not set(wanted).isdisjoint(far) or draw(seldom(_FAR_ONCE_IN))):
        return among(domain.towards("memory", far))
    return among(domain.towards("memory", [each for each in usual if level == "kernel" or each != "broadcast"]))


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
    aimed, values = "head_dim" in domain.aim, "values" in domain.aim
    if level == "kernel" and domain.value_dims and (values or not aimed):
        differ: bool = values or draw(seldom(_VALUE_DIM_ONCE_IN))
        if pairs := [pair for pair in domain.value_dims if narrow(max(pair))] if differ else []:
            head_dim, head_dim_v = draw(among(domain.towards("values", pairs)))
            return head_dim, head_dim_v
    some = domain.every_head_dim if aimed or draw(seldom(_ANY_HEAD_DIM_ONCE_IN)) else domain.head_dims
    dims = [dim for dim in some if narrow(dim)] or domain.head_dims[:1]
    return draw(among(domain.towards("head_dim", dims))), None


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
    # Of layers more are causal: what is not cannot be cut inside a document.
    choices = (True, False, True) if level == "layer" else (True, False)
    causal_choices = [choice for choice in choices if (capabilities.causal if choice else capabilities.noncausal)]
    causal = draw(among(domain.towards("causal", causal_choices)))
    many = draw(seldom(_MANY_HEADS_ONCE_IN))
    # What is aimed at may be large.
    sparing = level == "kernel" and not many and past >= 0 and not domain.aim
    share = draw(among(_SHARES)) if sparing else 1

    def fitting(groups: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        limit = min(_MAX_SCORES[level] / scores, MAX_PAIRS / pairs) / share
        return [group for group in groups if group[0] <= limit]

    groups = (fitting(domain.many_heads) if many else []) or fitting(domain.head_groups)
    if "heads" in domain.aim:
        groups = fitting((*domain.head_groups, *domain.many_heads))
    least = domain.head_groups[: 2 if pairs <= _MAX_SHARED_PAIRS else 1]
    heads, kv_heads = draw(among(domain.towards("heads", groups or least)))

    def narrow(dim: int) -> bool:
        return (
            (tokens + past // 2) * heads * dim * share <= _MAX_CHANNELS[level]
            and pairs * heads * dim * share <= _MAX_PRODUCTS
            and (level == "kernel" or heads * dim <= _MAX_WIDTH)
        )

    head_dim, head_dim_v = channels(draw, domain, level, narrow)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "causal": causal,
        "window": windows(draw, domain, causal=causal, longest=longest),
        "scale": draw(scales(capabilities, head_dim)),
        "softcap": draw(among([0.0, 0.0, 20.0, 2.5])) if capabilities.softcap else 0.0,
        "dtype": draw(among(domain.towards("dtype", domain.dtypes))),
        **free_options(draw, domain, level),
    }
