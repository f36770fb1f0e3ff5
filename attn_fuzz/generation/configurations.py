"""In which order a compiling backend's configurations have their turn: what has been covered least comes next.

A configuration costs seconds to compile, and thousands of cases are drawn within it: so few of them have to see much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from random import Random
from typing import Final

from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.generation.domain import Domain

FIRST: Final = 6
"""So many are the same in every campaign of a backend, so that what compilers keep on disk serves the next one, too."""

MOST: Final = 64
"""More are not compiled: each would have few cases, and what was compiled stays in memory."""

_USUAL_DIMS: Final = 6
"""Of the head dimensions that are taken, simplest first, so many are among the first configurations."""

_WIDEST: Final = 512
"""Channels of all heads together: lengths are drawn without a look at them."""

_WIDEST_OF_MANY: Final = 1152
"""The same of many heads, beside which long documents are not drawn: 71 heads of 16 channels, or 128 of 8."""

_MANY_HEADS_ONCE_IN: Final = 6
_VALUE_DIMS_ONCE_IN: Final = 4
"""Of what is drawn so many have many heads, or values of another head_dim than keys, where those are taken."""

_CANDIDATES: Final = 48
"""So many are drawn, and the one that adds most is taken."""


def masks(capabilities: Capabilities) -> list[tuple[bool, str]]:
    """(causal, bounded sides of the window) that are taken."""
    found = [
        (causal, "none") for causal in (True, False) if (capabilities.causal if causal else capabilities.noncausal)
    ]
    if capabilities.window:
        found += [(True, "left")] if capabilities.causal else []
        if capabilities.noncausal and not capabilities.window_needs_causal:
            found += [(False, side) for side in ("left", "right", "both")]
    return found


def _drawn(random: Random, domain: Domain, dims: tuple[int, ...]) -> Iterator[Configuration]:
    """Some of those that are taken."""
    return (_any(random, domain, dims) for _ in range(_CANDIDATES))


def _any(random: Random, domain: Domain, dims: tuple[int, ...]) -> Configuration:
    """One that is taken, as narrow as it has to be."""
    domain = domain.parted(lambda: not random.randrange(_VALUE_DIMS_ONCE_IN))
    aims, differ = domain.aim, domain.differing
    every = sorted(domain.every_head_dim) if "head_dim" in aims else ()
    head_dim, head_dim_v = random.choice(domain.towards("head_dim", dims, every)), None
    if domain.value_dims and differ is not False and (differ or not random.randrange(_VALUE_DIMS_ONCE_IN)):
        usual = [pair for pair in domain.value_dims if pair[0] in dims] or list(domain.value_dims)
        head_dim, head_dim_v = random.choice(domain.towards("values", usual, sorted(domain.value_dims, key=max)))
    groups, most = domain.head_groups, _WIDEST
    if "heads" in aims or not random.randrange(_MANY_HEADS_ONCE_IN):
        groups, most = domain.many_heads, _WIDEST_OF_MANY
    if "heads" in aims:
        groups = (*domain.head_groups, *groups)
    narrow = [group for group in groups if group[0] * max(head_dim, head_dim_v or 0) <= most]
    heads = random.choice(domain.towards("heads", narrow or [domain.head_groups[0]], sorted(groups)))
    causal, window = random.choice(_masks_towards(domain))
    softcaps = domain.towards("softcap", (0.0, 0.0, 20.0), of=bool)
    softcap = random.choice(softcaps) if domain.capabilities.softcap else 0.0
    dtype = random.choice(domain.towards("dtype", domain.dtypes))
    return Configuration(dtype, head_dim, *heads, causal, window, softcap, head_dim_v)


def _masks_towards(domain: Domain) -> list[tuple[bool, str]]:
    """Masks that are taken and aimed at."""
    taken = masks(domain.capabilities)
    causal, windows = domain.aim.get("causal", (True, False)), domain.aim.get("window")
    return [mask for mask in taken if mask[0] in causal and (windows is None or mask[1] in windows)] or taken


def _traits(configuration: Configuration) -> Iterator[Hashable]:
    """What a configuration covers, alone and in pairs."""
    c = configuration
    mask, group = (c.causal, c.window), c.heads // c.kv_heads
    yield from (("dtype", c.dtype), ("dim", c.head_dim), ("group", group), ("mask", *mask), ("cap", c.softcap))
    yield from ((c.dtype, c.head_dim), (c.dtype, *mask), (c.head_dim, *mask), (c.dtype, group))


class _Covered:
    """Counts what configurations have covered so far."""

    def __init__(self) -> None:
        self.counts: Counter[Hashable] = Counter()
        self.taken: set[Configuration] = set()

    def adds(self, configuration: Configuration) -> float:
        """How much one would add: what has not been seen counts 1, what has been seen once a half."""
        return sum(1.0 / (1 + self.counts[trait]) for trait in _traits(configuration))

    def best(self, some: Iterable[Configuration]) -> Configuration | None:
        """Takes, of some, the one that adds most; None where all of them have been taken."""
        found = max((each for each in some if each not in self.taken), key=self.adds, default=None)
        if found is not None:
            self.counts.update(_traits(found))
            self.taken.add(found)
        return found

    def best_of(self, random: Random, domain: Domain, dims: tuple[int, ...]) -> Configuration | None:
        """Takes the best of some that are drawn; None where there are no more."""
        # Groups cover more than values do, so that where both are not taken together one kind has its turn alone.
        part = domain.parted(lambda: not random.randrange(_VALUE_DIMS_ONCE_IN))
        found = self.best(_drawn(random, part, dims))
        return found if found is not None or part is domain else self.best(_drawn(random, domain, dims))


_APART: Final = 5
"""Places between workers, which share what is kept on disk: each finds the others' work."""


def _rotated(some: list[Configuration], seed: int) -> Iterator[Configuration]:
    turn = seed * _APART % max(len(some), 1)
    yield from (*some[turn:], *some[:turn])


def _plain_first(some: list[Configuration]) -> list[Configuration]:
    """With one in front that layers have, too, if there is any: they have to have something to draw from."""
    place = next((place for place, each in enumerate(some) if each.head_dim_v is None), 0)
    return [*some[place : place + 1], *some[:place], *some[place + 1 :]]


def in_order(domain: Domain, seed: int) -> Iterator[Configuration]:
    """Configurations of a backend, up to ``MOST`` where it takes many.

    Those that it declares, if it does. Otherwise the first few are the same for every seed but for their order: those
    that calls have found to be taken, which may be on disk, and as many that cover much; then the seed decides.

    Args:
        domain: what is taken, and aimed at.
        seed: of the worker.
    """
    stated = domain.capabilities
    if declared := [each for each in stated.configurations if each.dtype in domain.dtypes]:
        yield from _rotated(domain.aimed(declared), seed)
        return
    covered, always, later = _Covered(), Random("first configurations"), Random(seed)
    tried = [each for each in stated.compiled_first if each.dtype in domain.dtypes and domain.hits(each)]
    first: list[Configuration | None] = []
    while len(first) < max(FIRST, 2 * len(tried)):
        known = covered.best(tried) if len(first) % 2 == 0 else None
        first.append(known or covered.best_of(always, domain, domain.head_dims[:_USUAL_DIMS]))
    yield from _plain_first(list(_rotated([each for each in first if each is not None], seed)))
    dims = domain.every_head_dim
    while len(covered.taken) < MOST and (best := covered.best_of(later, domain, dims)) is not None:
        yield best
