"""What a campaign draws from: the part of the space that a backend takes, and the sizes that there are in it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.reference.case import MAX_HEAD_DIM

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

USUAL_HEADS: Final = 16
"""Of more heads fewer documents are drawn, or shorter ones."""

HEAD_DIMS: tuple[int, ...] = (16, 8, 32, 64, 24, 5, 80, 96, 128, 192, 256, 1, 320, 48, 36, 40, 72, 100, 112, 160, 224)
"""The usual ones, and one of each odd kind; drawn most often."""

EVERY_HEAD_DIM: tuple[int, ...] = tuple(dict.fromkeys((*HEAD_DIMS, *range(8, 513, 8), MAX_HEAD_DIM)))
"""The usual ones, and all else that kernels name: each multiple of 8."""

VALUE_DIMS: tuple[tuple[int, int], ...] = (
    *((16, 32), (32, 16), (192, 128), (64, 128), (8, 16), (16, 8), (64, 32), (128, 64), (24, 40), (96, 64), (5, 3)),
    *((2, 9), (64, 256), (128, 96), (40, 24), (256, 128), (72, 128), (80, 48), (576, 512), (64, 512), (1, 8)),
)
"""(head_dim, head_dim_v): either may be larger; those of latent attention are 192 and 128, and 576 and 512."""


_T = TypeVar("_T")


@functools.lru_cache(maxsize=64)
def _value_dims(dims: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Those pairs of which both are taken; where that is none, of all that are, simplest first."""
    return tuple(pair for pair in VALUE_DIMS if set(pair) <= set(dims)) or tuple(itertools.permutations(dims[:4], 2))


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
    aim: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict, hash=False)
    """What draws are to have where they can, by name; one of several.

    ``dtype``, ``head_dim``, ``causal`` and ``memory`` are as in a case, ``heads`` pairs of ``HEAD_GROUPS``, and
    ``window`` the bounded sides as ``Configuration`` has them. ``values`` are pairs of ``value_dims``, or None for as
    many channels as keys have. ``softcap``, ``lse_gradient`` and ``max_seqlen`` are whether there is one, and whether
    bounds are loose; ``gaps`` is whether there are some, (of queries, of keys). ``long_rows`` is True for a document of
    thousands of queries in every kernel call, which backends that compile for shapes have in none.
    """
    differs: bool = False
    """Whether values have another number of channels than keys wherever they may, whatever is aimed at."""

    def towards(
        self,
        name: str,
        choices: Sequence[_T],
        every: Iterable[_T] = (),
        of: Callable[[_T], Any] = lambda choice: choice,
    ) -> list[_T]:
        """Those of some choices that are aimed at; all of them where nothing is.

        Args:
            name: in ``aim``.
            choices: that would be drawn from.
            every: what there is beside them, cheapest first: where no choice is aimed at, the first of these that is.
            of: what ``aim`` says of a choice.
        """
        if (wanted := self.aim.get(name)) is None:
            return list(choices)
        found = [choice for choice in choices if of(choice) in wanted]
        return found or [choice for choice in every if of(choice) in wanted][:1] or list(choices)

    def decided(self, name: str) -> bool | None:
        """Of what there is or is not: which of both is aimed at; None where neither is, or both are."""
        wanted = set(self.aim.get(name, ()))
        return bool(wanted.pop()) if len(wanted) == 1 else None

    @property
    def differing(self) -> bool | None:
        """Whether values have another number of channels than keys: always, never, or now and then (None)."""
        if self.differs:
            return True
        wanted = self.aim.get("values")
        if wanted is None:
            return False if "head_dim" in self.aim else None
        return None if None in wanted and len(wanted) > 1 else None not in wanted

    @property
    def narrowest(self) -> int:
        """Channels of the narrowest head that is aimed at; 0 where none is."""
        pairs = (pair for pair in self.aim.get("values", ()) if pair is not None)
        return min((*self.aim.get("head_dim", ()), *map(max, pairs)), default=0)

    def aimed(self, configurations: Sequence[Configuration]) -> list[Configuration]:
        """Those that have all that is aimed at; all of them where none has."""
        return [each for each in configurations if self.hits(each)] or list(configurations)

    def hits(self, configuration: Configuration) -> bool:
        """Whether a configuration has all that is aimed at, as far as it says."""
        c = configuration
        mine = {
            "dtype": c.dtype,
            "head_dim": c.head_dim,
            "heads": (c.heads, c.kv_heads),
            "causal": c.causal,
            "window": c.window,
            "softcap": bool(c.softcap),
            "values": None if c.head_dim_v is None else (c.head_dim, c.head_dim_v),
        }
        return all(value in self.aim.get(name, (value,)) for name, value in mine.items())

    @classmethod
    def of(
        cls,
        capabilities: Capabilities,
        device: str,
        dtypes: Sequence[str] = (),
        ranks: Sequence[int] = (1,),
        tensor_ranks: Sequence[int] = (1,),
        aim: Mapping[str, tuple[Any, ...]] | None = None,
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
            aim=dict(aim or {}),
        )

    @property
    def for_layers(self) -> Domain:
        """The same for layers, whose values have as many channels as their keys, and whose rows lie side by side."""
        stated = self.capabilities
        configurations = tuple(each._replace(head_dim_v=None) for each in stated.configurations)
        narrow = dataclasses.replace(stated, head_dims_v=False, far_memories=(), configurations=configurations)
        return dataclasses.replace(self, capabilities=narrow)

    @functools.cached_property
    def _parts(self) -> tuple[Domain, Domain] | None:
        """Where values are as wide as keys and where they are not, if grouped heads are taken in the former only."""
        stated = self.capabilities
        if stated.gqa_head_dims_v or not stated.gqa or not self.value_dims:
            return None
        same, other = dataclasses.replace(stated, head_dims_v=False), dataclasses.replace(stated, gqa=False)
        return (
            dataclasses.replace(self, capabilities=same),
            dataclasses.replace(self, capabilities=other, differs=True),
        )

    def parted(self, differ: Callable[[], bool]) -> Domain:
        """What one case is drawn from: a part of it where grouped heads are taken beside values as wide as keys only.

        Heads and channels then depend on each other, so that what is drawn first is which of both there may be. Where
        they do not, this is the whole domain, and nothing is drawn.

        Args:
            differ: draws whether values have another number of channels than keys, where that is not aimed at.
        """
        if self._parts is None:
            return self
        differing = self.differing
        if differing is None:
            aimed = self.aim.get("heads", ())
            only_groups = bool(aimed) and all(heads != kv_heads for heads, kv_heads in aimed)
            differing = not only_groups and differ()
        return self._parts[differing]

    @functools.cached_property
    def head_dims(self) -> tuple[int, ...]:
        """The usual ones that are taken, simplest first; where only a few are taken, those."""
        stated = self.capabilities.head_dims
        if len(stated) > len(HEAD_DIMS):
            stated = tuple(dim for dim in stated if dim in HEAD_DIMS) or stated
        return self._dims(stated or HEAD_DIMS)

    @functools.cached_property
    def every_head_dim(self) -> tuple[int, ...]:
        """All that are taken, the usual ones first."""
        return self._dims(self.capabilities.head_dims or EVERY_HEAD_DIM)

    def _dims(self, some: Sequence[int]) -> tuple[int, ...]:
        multiple, limit = self.capabilities.head_dim_multiple, self.capabilities.max_head_dim
        return tuple(dim for dim in some if dim % multiple == 0 and dim <= limit) or (min(multiple, limit),)

    @functools.cached_property
    def value_dims(self) -> tuple[tuple[int, int], ...]:
        """Pairs of a head_dim and another one of values that are taken."""
        pairs = self.capabilities.head_dims_v
        if isinstance(pairs, tuple):
            return pairs
        # Not where it is not known: what a user's kernel takes is found out before.
        return _value_dims(self.every_head_dim) if pairs else ()

    @property
    def head_groups(self) -> tuple[tuple[int, int], ...]:
        return self._taken(HEAD_GROUPS)

    @property
    def many_heads(self) -> tuple[tuple[int, int], ...]:
        return self._taken(MANY_HEADS)

    def _taken(self, groups: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple(pair for pair in groups if self.capabilities.gqa or pair[0] == pair[1])
