"""What one packed call is made of: a configuration, and thousands of documents that tile edges and sweeps pick."""

from __future__ import annotations

import dataclasses
import math
from random import Random
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.generation.domain import USUAL_HEADS, Domain
from attn_fuzz.generation.layouts import TILE_EDGES
from attn_fuzz.generation.long_rows import LONG_WORK, with_long_row
from attn_fuzz.generation.options import options_within, usual_scales, window_towards
from attn_fuzz.generation.placement import placed_at_random
from attn_fuzz.reference.case import MAX_HEAD_DIM, Case

LONGEST: Final = {"cuda": ((64, 128), (16, 32), (256, 400)), "cpu": ((16, 32), (16, 32), (64, 128))}
"""(queries, keys) of the longest documents of calls, in turn; (256, 400) has 103,057 different pairs."""

_OPTIONS: Final = {"cuda": 7, "cpu": 4}
"""How many of the head dimensions and head groups are drawn, simplest first: a CPU would rather see more documents."""

WINDOW_SIDES: Final = (0, 1, 2, 7, 15, 16, 31, 63, 64)

VALUES: Final = ("gaussian", "gaussian", "gaussian", "large", "offset")
"""Continuous modes only: what is structured on purpose is the case mode's."""

_MANY_HEADS: Final = 0.15
"""Share of calls with groups above 8, or more heads than 32."""

_WIDEST: Final = 1024
"""Channels of so many heads together, where head dimensions that small are taken: a layer's weights take the square."""

_ANY_HEAD_DIM: Final = 0.4
"""Share of calls from all options whose head dimension is any that is taken, usual or not."""

_VALUE_DIMS: Final = 0.1
"""Share of calls whose values have another number of channels than their keys, where those are taken."""

_LONG_ROWS: Final = 0.35
"""Share of calls in which one document has thousands of queries, where it may."""

LSE_GRADIENTS: Final = 0.25
"""Share of calls whose LSE has a gradient, where it takes one."""

_ATTEMPTS: Final = 50


@dataclasses.dataclass
class Sweep:
    """Walks through all (queries, keys) pairs up to a size without repeating one, in an order that looks random.

    A fault that needs one exact pair is met after at most as many documents as there are pairs.
    """

    longest: tuple[int, int]
    position: int
    """Pairs taken so far, from a start of the walk's own."""

    def take(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next pairs: (queries, keys), int64 ``[count]`` each."""
        queries, keys = (side + 1 for side in self.longest)
        total = queries * keys
        # A step near the golden section spreads any run of pairs over both sides; coprime, it visits all of them.
        step = next(s for s in range(int(total * 0.6180339887) | 1, 2 * total) if math.gcd(s, total) == 1)
        places = (torch.arange(self.position, self.position + count) * step) % total
        self.position += count
        return places // keys, places % keys


def edge_lengths(random: Random, count: int, longest: int) -> torch.Tensor:
    """Lengths at tile edges."""
    edges = torch.tensor([edge for edge in (0, *TILE_EDGES, 127, 128, 129, 255, 256, 257) if edge <= longest])
    return edges[torch.randint(len(edges), (count,), generator=_generator(random))]


def _generator(random: Random) -> torch.Generator:
    return torch.Generator().manual_seed(random.getrandbits(62))


def draw_lengths(random: Random, sweep: Sweep, documents: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries, keys) of each document, int64: two thirds by sweep, one third by edges, in any order."""
    swept = documents - documents // 3
    queries, keys = sweep.take(swept)
    edge_q = edge_lengths(random, documents - swept, sweep.longest[0])
    # Edges of both sides, or as many keys as queries, or a past whose length is an edge.
    edge_k = edge_lengths(random, documents - swept, sweep.longest[1])
    kind = torch.randint(3, (len(edge_q),), generator=_generator(random))
    edge_k = torch.where(kind == 1, edge_q, torch.where(kind == 2, edge_q + edge_k, edge_k))
    order = torch.randperm(documents, generator=_generator(random))
    return torch.cat([queries, edge_q])[order], torch.cat([keys, edge_k.clamp_max(sweep.longest[1])])[order]


def _tamed(lengths: torch.Tensor, keys: torch.Tensor, domain: Domain, *, causal: bool, equal: bool) -> torch.Tensor:
    """Numbers of keys that the backend takes."""
    capabilities = domain.capabilities
    if equal or (causal and capabilities.causal_needs_equal_lengths):
        return lengths
    if not capabilities.queries_without_keys:
        keys = torch.maximum(keys, lengths) if causal else torch.where((lengths > 0) & (keys == 0), lengths, keys)
    if not capabilities.keys_without_queries:
        keys = torch.where(lengths == 0, 0, keys)
    return keys


def draw_options(random: Random, domain: Domain, *, every: bool = False) -> dict[str, object]:
    """Everything about a case but its documents; ``every``: of all head dimensions, head groups and scales."""
    capabilities = domain.capabilities
    if capabilities.configurations:
        return _compiled(random, domain, every=every)
    some = None if every else _OPTIONS[domain.device]
    masks = [choice for choice in (True, True, False) if (capabilities.causal if choice else capabilities.noncausal)]
    causal = random.choice(domain.towards("causal", masks))
    window = _window(random, domain, causal=causal)
    heads, kv_heads, head_dim, head_dim_v = _draw_heads(random, domain, some)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "causal": causal,
        "window": window,
        "softcap": _softcap(random, domain),
        "dtype": random.choice(domain.towards("dtype", domain.dtypes)),
        **_values(random),
        "scale": random.choice(usual_scales(capabilities, head_dim)) if every else None,
        "memory": _memory(random, domain),
    }


def _window(random: Random, domain: Domain, *, causal: bool) -> tuple[int, int]:
    aimed = window_towards(domain, domain.capabilities.window_sizes or WINDOW_SIDES, random.choice, causal=causal)
    if aimed is not None:
        return aimed
    if not domain.capabilities.window or random.random() >= 0.4:
        return (-1, -1)
    left = random.choice(WINDOW_SIDES)
    return (left, -1) if causal else random.choice(_both_sides(left, random.choice(WINDOW_SIDES)))


def _softcap(random: Random, domain: Domain) -> float:
    choices = (0.0, 0.0, 0.0, 20.0)
    return random.choice(domain.towards("softcap", choices, of=bool)) if domain.capabilities.softcap else 0.0


def draw_lse_gradient(random: Random, domain: Domain) -> bool:
    if not domain.capabilities.lse_gradient:
        return False
    aimed = domain.decided("lse_gradient")
    return random.random() < LSE_GRADIENTS if aimed is None else aimed


def _compiled(random: Random, domain: Domain, *, every: bool) -> dict[str, object]:
    """Options that a compiling backend has compiled."""
    capabilities = domain.capabilities
    configurations = [each for each in capabilities.configurations if each.dtype in domain.dtypes]
    chosen = random.choice(domain.aimed(configurations))
    options = options_within(chosen, capabilities, capabilities.window_sizes or WINDOW_SIDES, random.choice)
    free = {**_values(random), "memory": _memory(random, domain)}
    return {**options, **free} if every else {**options, **free, "scale": None}


def _values(random: Random) -> dict[str, object]:
    return {"values": random.choice(VALUES), "seed": random.randrange(1 << 16)}


def _memory(random: Random, domain: Domain) -> str:
    """Rows that are far apart only where they are aimed at: they take gigabytes of a GPU's memory."""
    memories = ("contiguous", *(m for m in domain.capabilities.memories if m != "broadcast"))
    if "memory" in domain.aim:
        memories = (*memories, *domain.capabilities.far_memories)
        if not set(memories) & set(domain.aim["memory"]):
            memories = tuple(m for m in memories if m not in domain.capabilities.far_memories)
    return random.choice(domain.towards("memory", memories))


def _both_sides(left: int, right: int) -> tuple[tuple[int, int], ...]:
    """Windows of non-causal attention: alike on both sides or not, or bounded on one side only."""
    return (left, left), (left, right), (left, -1), (-1, right)


def _draw_heads(random: Random, domain: Domain, some: int | None) -> tuple[int, int, int, int | None]:
    """(heads, kv_heads, head_dim, head_dim_v), of the first ``some`` of each; many heads now and then, narrow.

    What is aimed at is of all of them.
    """
    domain = domain.parted(lambda: random.random() < _VALUE_DIMS)
    some_dims = None if "head_dim" in domain.aim else some
    every = "head_dim" in domain.aim or (some is None and random.random() < _ANY_HEAD_DIM)
    all_dims = domain.every_head_dim if every else domain.head_dims
    groups, dims = domain.head_groups[:some], all_dims[:some_dims]
    some_groups = groups
    if "heads" in domain.aim:
        groups = (*domain.head_groups, *domain.many_heads)
    elif domain.many_heads and random.random() < _MANY_HEADS:
        groups = domain.many_heads
    # Many heads are narrow, unless nothing that is aimed at is.
    narrow_groups = [pair for pair in groups if not _many(*pair) or pair[0] * domain.narrowest <= _WIDEST]
    every_group = sorted(groups) if "heads" in domain.aim else ()
    heads, kv_heads = random.choice(domain.towards("heads", narrow_groups or some_groups, every_group))
    if _many(heads, kv_heads):
        dims = tuple(dim for dim in all_dims if heads * dim <= _WIDEST)[:some_dims] or (min(domain.head_dims),)
    pairs = domain.value_dims if domain.differing is not False else ()
    if pairs and (domain.differing or random.random() < _VALUE_DIMS):
        most = _WIDEST if _many(heads, kv_heads) or some is not None else heads * MAX_HEAD_DIM
        narrow = [pair for pair in pairs if heads * max(pair) <= most]
        if narrow := domain.towards("values", narrow, sorted(pairs, key=max)):
            return heads, kv_heads, *random.choice(narrow)
    return heads, kv_heads, random.choice(domain.towards("head_dim", dims, sorted(all_dims))), None


def _many(heads: int, kv_heads: int) -> bool:
    return heads > USUAL_HEADS or heads > 8 * kv_heads


def draw_case(
    random: Random,
    sweep: Sweep,
    backend: Backend,
    domain: Domain,
    documents: int,
    *,
    every: bool = False,
    long: int = LONG_WORK,
) -> Case | None:
    """A packed call that the backend takes, or None where fifty draws were all refused.

    Args:
        random: decides everything but the sweep's pairs.
        sweep: where the walk through pairs of lengths stands; it moves on.
        backend: what will run it.
        domain: the options that it takes.
        documents: how many; fewer where they have many heads.
        every: from all options, rather than those that cost least.
        long: the most work of a document of thousands of queries, which there may be; 0 for none.
    """
    aimed = domain.decided("long_rows")
    with_long = long and (random.random() < _LONG_ROWS if aimed is None else aimed)
    for attempt in range(_ATTEMPTS):
        options = draw_options(random, domain, every=every)
        fewer = max(1, min(documents, documents * USUAL_HEADS // int(options["heads"])))  # type: ignore[call-overload]
        lengths, keys = draw_lengths(random, dataclasses.replace(sweep), fewer)
        # Some limits concern certain pairs of lengths under all options: later draws are plainer.
        if attempt > 10 and not domain.capabilities.configurations and "window" not in domain.aim:
            options["window"] = (-1, -1)
        keys = _tamed(lengths, keys, domain, causal=bool(options["causal"]), equal=attempt > 30)
        if not domain.capabilities.empty_documents:
            there = (lengths > 0) | (keys > 0)
            lengths, keys = lengths[there], keys[there]
        if attempt > 5:
            keys = torch.maximum(keys, lengths)
        if with_long and len(lengths) and (aimed or attempt <= 5):
            lengths, keys = with_long_row(random, (lengths, keys), options, domain, long)
        if not lengths.sum() or not keys.sum():
            continue
        case = Case(
            level="kernel",
            lengths=tuple(lengths.tolist()),
            key_lengths=tuple(keys.tolist()),
            lse_gradient=draw_lse_gradient(random, domain),
            **placed_at_random(random, domain, len(lengths), int(lengths.sum() + keys.sum())),
            **options,  # type: ignore[arg-type]
        )
        if backend.refusal(case, domain.device) is None:
            sweep.take(fewer - fewer // 3)
            return case
    return None
