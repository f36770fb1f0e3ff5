"""Batches for backends that compile for shapes: each call is one of a few layouts, its documents in any order."""

from __future__ import annotations

from random import Random

from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.fixed_layouts import pooled_keys, pooled_lengths
from attn_fuzz.generation.length_sweeps import draw_lse_gradient, draw_options
from attn_fuzz.generation.long_rows import pooled_long
from attn_fuzz.reference.case import Case, CaseError


def fixed_call(number: int, options: dict[str, object], domain: Domain, random: Random | None = None) -> Case | None:
    """The call of a layout, its documents in an order that is drawn where something draws; None where it has no key.

    Args:
        number: of the layout.
        options: everything about the call but its documents.
        domain: what is taken.
        random: decides the order.
    """
    lengths = pooled_lengths(number, domain.capabilities)
    keys = pooled_keys(number, lengths, domain.capabilities, causal=bool(options["causal"]))
    if (long := pooled_long(number, options, domain)) is not None:
        lengths, keys = [*lengths, long[0]], [*keys, long[1]]
    order = list(range(len(lengths)))
    if random is not None:
        random.shuffle(order)
    if not any(keys) or not any(lengths):
        return None
    try:
        return Case(
            level="kernel",
            lengths=tuple(lengths[place] for place in order),
            key_lengths=tuple(keys[place] for place in order),
            **options,  # type: ignore[arg-type]
        )
    except CaseError:
        return None


def together(calls: list[Case]) -> CallBatch | None:
    """Calls that differ in nothing but their documents as a batch; None of none."""
    if not calls:
        return None
    ends: list[int] = []
    for call in calls:
        ends.append(len(call.packed_lengths) + (ends[-1] if ends else 0))
    packed = calls[0].replace(
        lengths=tuple(length for call in calls for length in call.packed_lengths),
        key_lengths=tuple(count for call in calls for count in call.packed_key_lengths),
    )
    return CallBatch(packed, tuple(ends))


def draw_fixed_calls(
    random: Random, backend: Backend, domain: Domain, calls: int, most_work: float
) -> CallBatch | None:
    """Calls that a backend takes, up to so many, or None where none of those drawn is one.

    Args:
        random: decides everything.
        backend: what will run them.
        domain: the options that it takes, and how many layouts there are.
        calls: how many are drawn.
        most_work: products of a query's and a key's channels in all of them.
    """
    options = {**draw_options(random, domain, every=True), "lse_gradient": draw_lse_gradient(random, domain)}
    drawn: list[Case] = []
    work = 0.0
    for _ in range(calls):
        call = fixed_call(random.randrange(domain.capabilities.layouts), options, domain, random)
        if call is None or backend.refusal(call, domain.device) is not None:
            continue
        pairs = zip(call.packed_lengths, call.packed_key_lengths, strict=True)
        work += sum(queries * keys for queries, keys in pairs) * call.heads * max(call.head_dim, call.value_dim)
        if drawn and work > most_work:
            break
        drawn.append(call)
    return together(drawn)
