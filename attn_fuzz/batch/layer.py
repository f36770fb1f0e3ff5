"""The packed mode at layer level: thousands of documents through a buffered layer, cut into micro-sequences.

Projections are exact, so that each document's verdict is about buffer, metadata and kernel (reference/exact_layer.py).
"""

from __future__ import annotations

import dataclasses
from random import Random

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judged import Judged, Question
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.layer_tensors import LayerTensors
from attn_fuzz.execution.poison import poisoned
from attn_fuzz.execution.process import in_words, raise_lack_of_memory
from attn_fuzz.execution.runner import LayerRun
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.length_sweeps import USUAL_HEADS, draw_options, edge_lengths
from attn_fuzz.oracle.deviations import LIMIT, deviations, limit
from attn_fuzz.reference.answer import Expected, Inputs
from attn_fuzz.reference.batched import kernel_answer
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
    with poisoned("nan", device, compiled=backend.kernel.compiled):
        run.forward()
        run.backward()
    return run


def _answer(case: Case, inputs: Inputs, profile: Profile) -> dict[str, Expected]:
    """The answer to some micro-sequences."""
    return kernel_answer(case, inputs, profile, degrees=False)


def judge_layer(case: Case, backend: Backend, device: torch.device) -> Judged:
    """Runs a layer and judges every document by its largest deviation.

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
        return dataclasses.replace(judged, broken={0: in_words(error)})
    expected = exact_layer_answer(case, inputs, backend.kernel.profile_on(device.type), _answer)
    owner = packed(case.packed_lengths, device).owner
    for column, name in enumerate(EXACT_TENSORS):
        if name not in results:
            continue
        if results[name].shape != expected[name].value.shape:
            return dataclasses.replace(judged, broken={0: f"{name} is of another shape"})
        worst = deviations(case, results[name], expected[name]).flatten(1).amax(1)
        z[:, column].scatter_reduce_(0, owner, worst, "amax")
    return dataclasses.replace(judged, z=z.cpu() * (LIMIT / limit(case)), touched=bool(run.changed()))
