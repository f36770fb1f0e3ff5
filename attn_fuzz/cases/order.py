"""The order of cases: which of two is simpler. Shrinkers go down in it, and never up."""

from __future__ import annotations

from typing import Any, Final

from attn_fuzz.reference.case import Case

SIMPLEST: Final[dict[str, tuple[object, ...]]] = {
    "key_lengths": (None,),
    "document_ids": (None,),
    "padding_ids": ((),),
    "window": ((-1, -1),),
    "lse_gradient": (False,),
    "loose_max_seqlen": ((0, 0),),
    "gaps": ((0, 0),),
    "head_dim_v": (None,),
    "scale": (None,),
    "softcap": (0.0,),
    "query_norm": ("none",),
    "key_norm": ("none",),
    "value_norm": ("none",),
    "shared_key_value": (False,),
    "rotary": ("none", "default"),
    "rotary_fraction": (0.5,),
    "rotary_theta": (10000.0,),
    "values": ("gaussian",),
    "weights": ("gaussian",),
    "memory": ("contiguous", "fused", "head_major", "sliced"),
    "causal": (True,),
    # One bit of the seed is of an interfering call's strides, one of the order in which it is taken back.
    "seed": (0, 1, 4, 5),
    "dtype": ("fp32", "bf16"),
}
"""An option's values, simplest first; all that are not listed are equally far from simple."""


def place(field: str, value: object) -> int:
    """How far an option's value is from the simplest."""
    choices = SIMPLEST[field]
    return choices.index(value) if value in choices else len(choices)


def tokens(case: Case) -> int:
    """Tokens on the side that has more of them."""
    return max(sum(case.packed_lengths), sum(case.packed_key_lengths))


def simplicity(case: Case) -> tuple[Any, ...]:
    """A case's place in the order: the smaller, the simpler.

    Fewer ranks are worth padding and cuts, and so come first; then less to read, and options last: no option, such as
    as many keys as queries, is worth a token more.
    """
    return (
        case.all_ranks,
        # Queries and keys; documents with none of either are documents, too.
        sum(case.packed_lengths) + sum(case.packed_key_lengths),
        len(case.packed_lengths),
        case.padding,
        (len(case.cuts), sum(case.cuts)),
        (case.heads, case.kv_heads, case.head_dim, case.hidden, case.head_dim_v or 0),
        case.capacity,
        tuple(place(field, getattr(case, field)) for field in SIMPLEST),
        case.window,
        case.loose_max_seqlen,
        case.gaps,
    )
