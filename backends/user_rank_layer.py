"""A layer from outside over several ranks: its class is handed real process groups, and does the rest itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch

from attn_fuzz.backends.collectives import Collectives
from attn_fuzz.backends.kernel import Capabilities, Kernel
from attn_fuzz.backends.layer import Layer
from attn_fuzz.backends.rank_layer import RankLayerFactory
from attn_fuzz.reference.case import Case

GROUP: Final = "group"
"""The constructor's keyword for the process group of all ranks, in the order of their tokens."""

TENSOR_GROUP: Final = "tensor_group"
"""The keyword for that of the neighbours which share this rank's query heads."""

NUMBERS_OF_RANKS: Final = ("ranks", "tensor_ranks")
"""Capabilities that are True, False, or numbers of ranks."""

MakeLayer = Callable[[Any, dict[str, torch.Tensor], Case], Layer]
"""A layer of a class of a user's, or of what builds one: that, weights, and the case."""


def keywords_of(capabilities: Capabilities) -> tuple[str, ...]:
    """The keywords by which a class that declares so much is handed its process groups; none for one that has none."""
    tensor = (TENSOR_GROUP,) if capabilities.tensor_ranks else ()
    return (GROUP, *tensor) if capabilities.ranks or tensor else ()


def takes_one(capabilities: Capabilities) -> bool:
    """Whether a layer that declares so much may be alone, without any process group."""
    return takes(capabilities.ranks, 1) and takes(capabilities.tensor_ranks, 1)


def over_ranks(made: Callable[..., Any], capabilities: Capabilities, make: MakeLayer) -> RankLayerFactory | None:
    """What builds one rank's layer of a class from outside, or None where the class declares no ranks.

    Args:
        made: the class, or what builds it, called as ``CLASS(weights, case, group=..., tensor_group=...)``, the last
            where it declares ``tensor_ranks``.
        capabilities: as it declares them.
        make: makes a layer of it.
    """
    keywords = keywords_of(capabilities)
    if not keywords:
        return None

    def build(weights: dict[str, torch.Tensor], case: Case, kernel: Kernel, collectives: Collectives) -> Layer:
        groups = {GROUP: collectives.group}
        if TENSOR_GROUP in keywords:
            groups[TENSOR_GROUP] = collectives.block(case.tensor_ranks).group
        return make(functools.partial(made, **groups), weights, case)

    return build


def spread_refusal(capabilities: Capabilities, case: Case) -> str | None:
    """What about a layer case's ranks, or about the size of their slices, is not taken, or None."""
    for stated, ranks, what in (
        (capabilities.ranks, case.ranks, "rank"),
        (capabilities.tensor_ranks, case.tensor_ranks, "tensor rank"),
    ):
        if not takes(stated, ranks):
            return f"{ranks} {what}{'s' if ranks > 1 else ''}"
    multiple = capabilities.slice_multiple * case.all_ranks
    bounds = (0, *case.cuts, case.tokens)
    if multiple > 1 and any(bound % multiple for bound in bounds):
        return f"slices of micro-sequences that are no multiple of {capabilities.slice_multiple} tokens"
    return None


def takes(stated: bool | tuple[int, ...], ranks: int) -> bool:
    """Whether so many ranks are among those stated: any number, one alone, or these."""
    return ranks in stated if isinstance(stated, tuple) else stated or ranks == 1
