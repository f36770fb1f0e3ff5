"""The packed mode at layer level: thousands of documents through a buffered layer, cut into micro-sequences.

Projections are exact, so that each document's verdict is about buffer, metadata and kernel (reference/exact_layer.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from random import Random
from typing import Final

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.output import MisshapenResult
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch import fused_look
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.batch.verdicts import OFF, float32_is_plain, look_pays
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.layer_tensors import LayerTensors
from attn_fuzz.execution.poison import poisoned
from attn_fuzz.execution.process import in_words, raise_lack_of_memory
from attn_fuzz.execution.runner import LayerRun
from attn_fuzz.generation.domain import USUAL_HEADS, Domain
from attn_fuzz.generation.length_sweeps import draw_options, edge_lengths
from attn_fuzz.oracle.deviations import LIMIT, deviations, limit
from attn_fuzz.reference.answer import Expected, Inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.exact_layer import EXACT_TENSORS, exact_layer_answer
from attn_fuzz.reference.layer import LayerInputs, layer_inputs
from attn_fuzz.reference.layout import document_spans
from attn_fuzz.reference.packed import packed
from attn_fuzz.reference.profile import Profile

_MOST_CUTS = 7
_ATTEMPTS = 20
_WIDEST = 2048
"""Channels of all heads together: weights have the square of them."""
_SHORT = 16
"""Tokens of the longest document where there are many heads: its scores are their number times its square."""


def draw_layer_case(random: Random, backend: Backend, domain: Domain, documents: int, longest: int) -> Case | None:
    """A packed sequence of many documents with a few cuts, or None where the backend takes none of twenty.

    Args:
        random: decides everything.
        backend: what will run it.
        domain: the options that it takes.
        documents: how many.
        longest: tokens of the longest document.
    """
    domain = domain.for_layers
    for _ in range(_ATTEMPTS):
        options = draw_options(random, domain)
        width = int(options["heads"]) * int(options["head_dim"])  # type: ignore[call-overload]
        if options["memory"] == "broadcast" or width > _WIDEST:
            continue
        many = int(options["heads"]) > USUAL_HEADS  # type: ignore[call-overload]
        lengths = edge_lengths(random, documents, min(longest, _SHORT) if many else longest)
        if not domain.capabilities.empty_documents:
            lengths = lengths[lengths > 0]
        total = int(lengths.sum())
        if total < 2:
            continue
        places = range(1, total)
        if not options["causal"]:
            places = sorted({span.begin for span in document_spans(lengths.tolist())} - {0, total})  # type: ignore[assignment]
        cuts = sorted(random.sample(places, min(random.randint(1, _MOST_CUTS), len(places))))
        case = Case(
            lengths=tuple(lengths.tolist()),
            cuts=tuple(cuts),
            hidden=width,
            weights="selection",
            **options,  # type: ignore[arg-type]
        )
        if backend.refusal(case, domain.device) is None:
            return case
    return None


def run_through(case: Case, inputs: LayerInputs, backend: Backend) -> LayerRun:
    """All micro-sequences forward, then backward in reverse, from memory of NaN; buffers are not compared by step."""
    device = inputs.x.device
    run = LayerRun(backend, case, LayerTensors.of_one(case, inputs, device, "nan"), watched=False)
    with poisoned("nan", device, free_blocks=backend.kernel.compiled):
        run.forward()
        run.backward()
    return run


def judge_layer(case: Case, backend: Backend, device: torch.device, *, first_look: bool | None = None) -> Judged:
    """Runs a layer and judges every document by its largest deviation.

    Args:
        case: a layer case whose projections are exact.
        backend: whose layer.
        device: where.
        first_look: whether the answer is computed in float32 at first, and in float64 for those documents alone that
            this leaves a doubt about; None where it pays: on a GPU, for half precision.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    inputs = layer_inputs(case, device)
    count = len(case.packed_lengths)
    z = torch.zeros(count, len(EXACT_TENSORS), dtype=torch.float64, device=device)
    judged = Judged(CallBatch(case, (count,)), z.cpu(), Question("nan"), names=EXACT_TENSORS)
    try:
        run = run_through(case, inputs, backend)
        results = run.results()
    except (UnsupportedCase, NotImplementedError) as refusal:
        return dataclasses.replace(judged, refused={0: str(refusal)})
    except Exception as error:
        raise_lack_of_memory(error)
        incomplete = frozenset({0} if isinstance(error, MisshapenResult) else ())
        return dataclasses.replace(judged, broken={0: in_words(error)}, incomplete=incomplete)
    results = {name: results[name] for name in EXACT_TENSORS if name in results}
    for name, got in results.items():
        if got.shape != (case.tokens, *_SHAPES[name](case)):
            return dataclasses.replace(judged, broken={0: f"{name} is of another shape"}, incomplete=frozenset({0}))
    profile = backend.kernel.profile_on(device.type)
    if first_look is None:
        first_look = look_pays(case, device)
    if first_look and float32_is_plain():
        z = _largest(case, inputs, results, profile, torch.float32)
        _look_again(case, inputs, results, profile, z)
    else:
        z = _largest(case, inputs, results, profile, torch.float64)
    return dataclasses.replace(judged, z=z.cpu() * (LIMIT / limit(case)), touched=bool(run.changed()))


_SHAPES: Final[dict[str, Callable[[Case], tuple[int, ...]]]] = {
    "out": lambda case: (case.hidden,),
    "dx": lambda case: (case.hidden,),
    "dk": lambda case: (case.kv_heads, case.head_dim),
    "dv": lambda case: (case.kv_heads, case.head_dim),
}
"""Of a token's results."""


def _largest(
    case: Case, inputs: LayerInputs, results: Mapping[str, torch.Tensor], profile: Profile, dtype: torch.dtype
) -> torch.Tensor:
    """The largest deviation of each document, float64 ``[documents, tensors]``, by an answer in this dtype."""
    expected = exact_layer_answer(case, inputs, profile, dtype, _fused if dtype == torch.float32 else None)
    owner = packed(case.packed_lengths, inputs.x.device).owner
    z = torch.zeros(len(case.packed_lengths), len(EXACT_TENSORS), dtype=torch.float64, device=inputs.x.device)
    for column, name in enumerate(EXACT_TENSORS):
        if name in results:
            worst = deviations(case, results[name], expected[name]).flatten(1).amax(1)
            if dtype != torch.float64 and not expected[name].variance.amax().isfinite():
                # A budget that has overflowed lets everything pass.
                worst.fill_(torch.inf)
            z[:, column].scatter_reduce_(0, owner, worst.double(), "amax")
    return z


def _fused(case: Case, inputs: Inputs, profile: Profile) -> dict[str, Expected] | None:
    """A fused answer to one call of a layer, where there is one."""
    look = fused_look.look(case, inputs, profile)
    if look is None:
        return None
    return {name: Expected(each.value, each.inverse.pow(-2)) for name, each in look.found.items()}


def _look_again(
    case: Case, inputs: LayerInputs, results: Mapping[str, torch.Tensor], profile: Profile, z: torch.Tensor
) -> None:
    """Judges those documents by the float64 answer that float32 leaves a doubt about; writes over their ``z``."""
    # NaN is a doubt, too.
    doubtful = (~(z < LIMIT - OFF).all(1)).nonzero()[:, 0]
    places = doubtful.tolist()
    if not places:
        return
    small, device = None if case.padding else subset(case, places), inputs.x.device
    if small is None:
        z.copy_(_largest(case, inputs, results, profile, torch.float64))
        return
    spans = document_spans(case.packed_lengths)
    rows = torch.cat([torch.arange(*spans[place], device=device) for place in places])
    some = {name: got[rows] for name, got in results.items()}
    z[doubtful] = _largest(small, layer_inputs(small, device), some, profile, torch.float64)
