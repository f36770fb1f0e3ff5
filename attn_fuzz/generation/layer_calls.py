"""Draws batches of layer calls: packed sequences of a few documents each, with cuts of their own."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any, Final

from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.call_batch import PADDING, CallBatch
from attn_fuzz.cases.repair import fitted
from attn_fuzz.cases.spread import in_multiples
from attn_fuzz.generation.calls import VALUES
from attn_fuzz.generation.domain import USUAL_HEADS, Domain
from attn_fuzz.generation.length_sweeps import draw_options, edge_lengths
from attn_fuzz.reference.case import Case

LONGEST: Final = {"cuda": (32, 128, 16), "cpu": (9, 33, 9)}
"""Tokens of the longest documents of batches, in turn: what a layer's step costs hardly depends on them on a GPU, and
the budgets, whose roundings are simulated, do."""

MOST: Final = {"cuda": 256, "cpu": 48}
"""Calls of a batch: a layer's takes a CPU as long as some five of its kernel's, and questions have to come round."""

_DOCUMENTS: Final = (1, 1, 1, 2, 2, 3, 4, 7)
"""How many documents a call may have."""

MOST_DOCUMENTS: Final = max(_DOCUMENTS) + 1
"""With padding behind them."""

_PADDINGS: Final = (0, 0, 0, 1, 5)
"""Tokens of padding behind a call's last document."""

_CUTS: Final = (0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 3, 6)
"""How often a call may be cut: each step is a forward and a backward more. Of 80 faults that batches of layers find, 78
show with one cut or none (results/outside/faults_batches_6.json)."""

_ANY_OPTIONS: Final = 0.3
"""Share of batches whose head dimension, head group and scale are any that are taken."""

_MOST_WORK: Final = {"cuda": 3.2e8, "cpu": 4e6}
"""Of the reference in a batch, in products of channels: of a query and a key, and of a token and weights. Of eight
of a GPU's batches the one that took most memory took 4.8 GiB."""

MOST_WIDTH: Final = {"cuda": 1024, "cpu": 256}
"""Channels of all heads together: weights and their gradients have the square of them."""

_PLACES: Final = 64

_ROTARY_THETAS: Final = (10000.0, 10000.0, 500.0, 1e6)
_ROTARY_FRACTIONS: Final = (0.25, 0.5, 0.75, 1.0)
_ATTEMPTS: Final = 20


def _layer_options(random: Random, domain: Domain, width: int, head_dim: int) -> dict[str, Any]:
    """What layer cases alone have: norms, rotary, projections, rows of the buffer behind the last token."""
    capabilities, pairs = domain.capabilities, head_dim // 2
    norms = ("none", "rms") if capabilities.norms else ("none",)
    rotary = random.choice(capabilities.rotaries) if head_dim % 2 == 0 else "none"
    weights = random.choice(("gaussian", "selection")) if width <= MOST_WIDTH[domain.device] // 2 else "gaussian"
    fractions = [fraction for fraction in _ROTARY_FRACTIONS if (fraction * pairs).is_integer()]
    return {
        "hidden": width if weights == "selection" else random.choice((16, 8, max(4, min(width, 64)))),
        "weights": weights,
        **{f"{name}_norm": random.choice(norms) for name in ("query", "key", "value")},
        "shared_key_value": capabilities.shared_key_value and random.random() < 0.5,
        "rotary": rotary,
        "rotary_theta": random.choice(_ROTARY_THETAS) if rotary != "none" else 10000.0,
        "rotary_fraction": random.choice(fractions) if rotary == "proportional" else 0.5,
        "capacity": random.choice((0, 0, 1, 17)),
    }


def _spread(random: Random, domain: Domain) -> dict[str, Any]:
    """Over how many ranks; tensor-parallel ones share the query heads of one K/V head."""
    if max(domain.ranks) * max(domain.tensor_ranks) == 1:
        return {}
    ranks, tensor_ranks = random.choice(domain.ranks), random.choice(domain.tensor_ranks)
    if ranks * tensor_ranks == 1:
        return {}
    heads = {"heads": tensor_ranks * random.choice((1, 2)), "kv_heads": 1} if tensor_ranks > 1 else {}
    return {"ranks": ranks, "tensor_ranks": tensor_ranks, **heads}


def _on_ranks(
    random: Random, lengths: tuple[int, ...], padding: int, *, causal: bool, ranks: int, multiple: int
) -> tuple[tuple[int, ...], int]:
    """(lengths, padding) of documents that ranks share: as often without more padding as with it.

    Non-causal ones cannot be spread, so there every rank has its own.

    Args:
        random: decides.
        lengths: of documents.
        padding: behind them.
        causal: whether they are.
        ranks: that share them, in all.
        multiple: of which a rank's tokens have to be one.
    """
    *others, last = lengths
    if not causal:
        return (*others, last + -sum(lengths) % multiple) * ranks, 0
    if random.random() < 0.5:
        return (*others, last + -(sum(lengths) + padding) % (ranks * multiple)), padding
    return lengths, padding


def _cuts(random: Random, lengths: tuple[int, ...], *, causal: bool) -> list[int]:
    """Where a call is cut: on its documents' borders and beside them as often as anywhere else; a non-causal one's on
    borders only, and sometimes wherever there is one."""
    total = sum(lengths)
    borders = {end for end in itertools.accumulate(lengths) if 0 < end < total}
    if not causal:
        places = sorted(borders)
        return places if random.random() < 0.2 else sorted(random.sample(places, min(len(places), 2)))
    beside = {place + step for place in (0, *borders, total) for step in (-1, 0, 1)}
    near = sorted(place for place in beside if 0 < place < total)
    if not near:
        return []
    chosen = {random.choice(near) if random.random() < 0.5 else random.randint(1, total - 1) for _ in range(9)}
    return sorted(random.sample(sorted(chosen), min(random.choice(_CUTS), len(chosen))))


def draw_layer_batch(random: Random, backend: Backend, domain: Domain, calls: int, longest: int) -> CallBatch | None:
    """Layer calls that a backend takes, up to so many, or None where none of those drawn is one.

    Args:
        random: decides everything.
        backend: what will run them.
        domain: the options that it takes.
        calls: how many are drawn.
        longest: tokens of the longest document.
    """
    domain = domain.for_layers
    for attempt in range(_ATTEMPTS):
        every = random.random() < _ANY_OPTIONS
        options: dict[str, Any] = draw_options(random, domain, every=every) | _spread(random, domain)
        heads, head_dim = options["heads"], options["head_dim"]
        wide = heads * head_dim > MOST_WIDTH[domain.device]
        # What is aimed at may all be wide.
        if options["memory"] == "broadcast" or (wide and not (domain.aim and attempt >= _ATTEMPTS // 2)):
            continue
        options |= {"values": random.choice(VALUES), **_layer_options(random, domain, heads * head_dim, head_dim)}
        # Many scores of long documents would leave a few calls to a batch, each as dear as the reference of all.
        most = min(longest, LONGEST[domain.device][0]) if heads >= USUAL_HEADS else longest
        batch = _drawn(random, backend, domain, calls, most, options)
        if batch is not None:
            return batch
    return None


def _drawn(
    random: Random, backend: Backend, domain: Domain, calls: int, longest: int, options: dict[str, Any]
) -> CallBatch | None:
    """Those of one configuration."""
    lengths, ids, cuts, ends, drawn_calls = list[int](), list[int](), list[int](), list[int](), list[Case]()
    heads, width = options["heads"], options["heads"] * options["head_dim"]
    ranks = options.get("ranks", 1) * options.get("tensor_ranks", 1)
    multiple = domain.capabilities.slice_multiple
    work, tokens = 0.0, 0
    for _ in range(calls):
        edges = edge_lengths(random, random.choice(_DOCUMENTS), longest).tolist()
        # A third of the documents has any length.
        own = tuple(random.randint(0, longest) if random.random() < 1 / 3 else length for length in edges)
        if not domain.capabilities.empty_documents:
            own = tuple(length for length in own if length)
        if not sum(own):
            continue
        padding, causal = random.choice(_PADDINGS), options["causal"]
        if ranks > 1:
            own, padding = _on_ranks(random, own, padding, causal=causal, ranks=ranks, multiple=multiple)
        packed = (*own, padding) if padding else own
        at = _cuts(random, packed, causal=causal)
        if ranks > 1:
            padding, fitting = fitted(ranks * multiple, own, padding, at if causal else ())
            at = list(fitting)
        own_ids = range(len(lengths), len(lengths) + len(own))
        drawn = Case(lengths=own, document_ids=tuple(own_ids), padding=padding, cuts=tuple(at), **options)
        small = in_multiples(drawn, domain.capabilities.slice_multiple)
        if small is None or backend.refusal(small, domain.device) is not None:
            continue
        packed, padding, at = small.packed_lengths, small.padding, list(small.cuts)
        # Of a score as of so many channels more: the reference rounds it in some sixty places.
        work += sum(length**2 for length in packed) * (width + _PLACES * heads)
        work += sum(packed) * width * (options["hidden"] + _PLACES)
        if ends and work > _MOST_WORK[domain.device]:
            break
        cuts += [tokens, *(tokens + place for place in at)] if tokens else at
        ids += own_ids
        ids += [PADDING + len(ends)] if padding else []
        lengths += packed
        ends.append(len(lengths))
        drawn_calls.append(small)
        tokens += small.tokens
    if not ends:
        return None
    whole = Case(
        lengths=tuple(lengths),
        document_ids=tuple(ids),
        cuts=tuple(cuts),
        **options,
    )
    return CallBatch.of_calls(whole, tuple(ends), drawn_calls)
