"""What a campaign draws from: the part of the space that a backend takes, and the sizes that there are in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from attn_fuzz.backends.kernel import Capabilities

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

HEAD_DIMS: tuple[int, ...] = (16, 8, 32, 64, 24, 5, 80, 96, 128, 192, 256, 1, 320, 48, 36, 40, 72, 100, 112, 160, 224)


_T = TypeVar("_T")


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
    """What draws are to have where they can: ``dtype``, ``head_dim``, ``heads`` (pairs of ``HEAD_GROUPS``), ``causal``
    and ``memory``, by name; a campaign aims at what has had too few."""

    def towards(self, name: str, choices: Sequence[_T]) -> list[_T]:
        """Those of some choices that are aimed at; all of them where none is."""
        wanted = self.aim.get(name)
        return [choice for choice in choices if wanted is not None and choice in wanted] or list(choices)

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
