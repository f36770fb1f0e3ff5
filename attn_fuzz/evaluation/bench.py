"""How fast the two modes are, measured beside the bare kernels on the same layouts in the same run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.trigger import PREFIX as RARE
from attn_fuzz.batch import fused_look
from attn_fuzz.batch.layer import judge_layer, run_through
from attn_fuzz.batch.packed import judge_packed, packed_failure
from attn_fuzz.batch.verdicts import largest_z
from attn_fuzz.campaign.plan import available_backends
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.subsets import subset
from attn_fuzz.evaluation.bench_calls import batch_of, batches_shared_of
from attn_fuzz.evaluation.bench_cases import bare, cases_of, plain_of, shared_of
from attn_fuzz.evaluation.bench_plan import PLANS, Plan, layout
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import run_batch
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.process import lacks_memory, set_up_process
from attn_fuzz.execution.timing import median, now, once
from attn_fuzz.generation.length_sweeps import Sweep
from attn_fuzz.oracle.symptoms import Crashed
from attn_fuzz.reduction.minimise import minimise
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import layer_inputs
from attn_fuzz.reference.values import fused_agrees

Say = Callable[[str], None]


SLOW: Final = 0.4
"""Seconds of a bare call beyond which no more documents are asked for."""

MUCH_SLOWER: Final = 1.3
"""A kernel whose time per document grows by so much when documents are doubled is given no more of them."""


def fitting(plan: Plan, backend: Backend, device: torch.device) -> tuple[Case, float] | None:
    """The plan's layout and the kernel's bare time, with fewer documents where they are faster that way."""
    documents = min(plan.fewest, plan.documents)
    best: tuple[Case, float] | None = None
    while documents <= plan.documents:
        case = layout(plan, documents)
        if backend.refusal(case, device.type) is not None:
            return None
        try:
            seconds = median(bare(case, backend, device), device)
        except Exception as error:
            if not lacks_memory(error) and not isinstance(error, UnsupportedCase):
                raise
            return best
        # What forms masks over the whole pack takes the square of its growth.
        if best is not None and seconds / documents > best[1] / len(best[0].lengths) * MUCH_SLOWER:
            return best
        best = case, seconds
        if seconds > SLOW:
            return best
        documents *= 2
    return best


def _compiled(judged: Callable[[], object]) -> None:
    """Has compiled what is compiled for cases that are met again, which is not part of what they take."""
    for _ in range(2):
        judged()
    fused_look.settle()


def packed_of(case: Case, backend: Backend, device: torch.device) -> dict[str, Any]:
    """The whole verification of a backend on a packed case, and where its time goes, in seconds."""
    _compiled(lambda: judge_packed(case, backend, device))
    whole = median(lambda: judge_packed(case, backend, device), device)
    batch, inputs = CallBatch.of_one(case), kernel_inputs(case, device)
    tensors = BatchTensors(batch, inputs, device)
    values = median(lambda: BatchTensors(batch, kernel_inputs(case, device), device), device)
    kernels = median(lambda: run_batch(tensors, backend, "nan"), device)
    profile = backend.kernel.profile_on(device.type)
    results = run_batch(tensors, backend, "none").results
    reference = median(lambda: largest_z(case, inputs, profile, [results]), device)
    count = len(case.lengths)
    return {
        "documents": count,
        "seconds": whole,
        "documents_per_s": count / whole,
        "fused_answer": fused_look.state(case, inputs.q.device),
        "parts": {
            "values": values,
            "kernels": kernels,
            "reference": reference,
            "checks_and_rest": max(whole - values - kernels - reference, 0.0),
        },
    }


def layer_of(plan: Plan, backend: Backend, device: torch.device, documents: int) -> dict[str, float] | None:
    """The packed mode at layer level: nine micro-sequences, with the layer's own time; None where it is not taken."""
    lengths = layout(plan, documents).lengths
    total = sum(lengths)
    case = Case(
        lengths=lengths,
        cuts=tuple(total * cut // 9 for cut in range(1, 9)),
        heads=plan.heads,
        kv_heads=plan.kv_heads,
        head_dim=plan.head_dim,
        hidden=plan.heads * plan.head_dim,
        weights="selection",
        dtype=plan.dtype,
    )
    if backend.refusal(case, device.type) is not None:
        return None
    inputs = layer_inputs(case, device)
    _compiled(lambda: judge_layer(case, backend, device))
    whole = median(lambda: judge_layer(case, backend, device), device)
    alone = median(lambda: run_through(case, inputs, backend), device)
    return {"documents": documents, "seconds": whole, "documents_per_s": documents / whole, "bare_layer_s": alone}


def _is_wrong(case: Case, backend: Backend, device: torch.device) -> bool:
    """Whether the backend takes a case and gives wrong results."""
    if backend.refusal(case, device.type) is not None:
        return False
    failure = packed_failure(case, backend, device)
    return failure is not None and failure.symptom is not Crashed


def rare_of(plan: Plan, name: str, device: torch.device) -> dict[str, Any]:
    """How long a fault in documents of one size stays hidden, and what it shrinks to."""
    queries, keys = plan.rare
    backend = registry.load(f"{RARE}{queries},{keys}:{name}")
    sweep = Sweep(plan.rare_longest, 0)
    sizes = (plan.rare_longest[0] + 1) * (plan.rare_longest[1] + 1)
    case, seen, taken = layout(plan, 1), 0, 0.0
    for turn in range(-(-sizes // plan.rare_documents) + 1):
        lengths, key_lengths = sweep.take(plan.rare_documents)
        case = case.replace(
            lengths=tuple(lengths.tolist()),
            # No query without a key: some backends refuse a whole call for one such document.
            key_lengths=tuple(torch.maximum(lengths, key_lengths).tolist()),
            heads=1,
            kv_heads=1,
        )
        if turn == 0:
            judge_packed(case, backend, device)
        found = None

        def look(case: Case = case) -> None:
            nonlocal found
            found = packed_failure(case, backend, device)

        taken += once(look, device)
        seen += len(lengths)
        if found is not None:
            small = subset(case, found.documents[:1])
            assert small is not None
            shrinking = now(device)
            small = minimise(small, lambda each: _is_wrong(each, backend, device), 20.0)
            return {
                "sizes": sizes,
                "documents": seen,
                "seconds": taken,
                "shrunk": small.to_dict(),
                "shrink_s": now(device) - shrinking,
            }
    return {"sizes": sizes, "documents": seen, "seconds": taken, "shrunk": None}


def row_of(plan: Plan, backend: Backend, device: str, say: Say) -> dict[str, Any] | None:
    """One backend's figures; None when it does not take the layout."""
    name, place = backend.name, torch.device(device)
    say(f"{name}: bare kernel and packed mode")
    found = fitting(plan, backend, place)
    if found is None:
        say(f"{name}: does not take the layout")
        return None
    case, seconds = found
    packed = packed_of(case, backend, place)
    say(f"{name}: {packed['documents_per_s']:,.0f} documents/s packed, {packed['seconds'] / seconds:.1f} times bare")
    # A micro-sequence is one of nine.
    layer = layer_of(plan, backend, place, min(4 * len(case.lengths), plan.layer_documents))
    if layer is not None:
        say(f"{name}: {layer['documents_per_s']:,.0f} documents/s packed at layer level")
    batch = batch_of(layout(plan, plan.batch_documents), backend, place)
    say(f"{name}: {batch['cases_per_s']:,.0f} cases/s in batches, {batch['over_bare']:.1f} times bare")
    cases = cases_of(name, device, plan.case_hunt, plan.drawn_cases)
    say(f"{name}: {cases['cases_per_s']:,.0f} cases/s one by one")
    return {
        "name": name,
        "bare_kernel_s": seconds,
        # Scripts of others read this key, and the two below, by the names that the modes once had.
        "wide_documents_per_s": packed["documents_per_s"],
        "packed_over_bare": packed["seconds"] / seconds,
        "packed": packed,
        "packed_layer": layer,
        "batch": batch,
        "narrow_cases_per_s": cases["cases_per_s"],
        "narrow_documents_per_s": cases["documents_per_s"],
        "case": cases,
        "packed_over_case": packed["documents_per_s"] / max(cases["documents_per_s"], 1e-9),
    }


Part = tuple[str, dict[str, Any]]


def others_of(plan: Plan, fitted: Sequence[Backend], device: str, say: Say) -> Iterator[Part]:
    """What is measured of several processes, or on the first backend alone: (key, figures), one after another."""
    place = torch.device(device)
    first = fitted[0].name
    say(f"{first}: a fault in one size of {plan.rare_longest}")
    yield "rare", rare_of(plan, first, place) | {"backend": first}
    say(f"{first}: {' and '.join(map(str, plan.processes))} processes on one device")
    shared = {str(n): shared_of(first, device, n, plan.case_seconds) for n in plan.processes}
    yield "processes", {"backend": first, "cases_per_s": shared}
    batches: dict[str, dict[str, float | None]] = {}
    for index, backend in enumerate(fitted):
        for count in plan.batch_processes if index == 0 else plan.batch_processes[:1]:
            rate = batches_shared_of(backend.name, device, count, plan.batch_seconds)
            told = "not measured: too little came back in time" if rate is None else f"{rate:,.0f} cases/s"
            say(f"{backend.name}, in batches of {count} processes: {told}")
            batches.setdefault(backend.name, {})[str(count)] = rate
    yield "batch_processes", batches
    say(f"{first}: a plain pytest loop")
    yield "plain", (plain_of(first, device, plan.plain_cases) or {}) | {"backend": first}


def bench(device: str, names: Sequence[str], say: Say) -> dict[str, Any]:
    """Everything, as the JSON object of ``bench --json``; after an interruption, what had been measured until then.

    Args:
        device: ``cpu`` or ``cuda``.
        names: backends; none for all available.
        say: told what is being measured.
    """
    set_up_process(device)
    place = torch.device(device)
    plan = PLANS[place.type]
    result: dict[str, Any] = {
        "device": device,
        "environment": environment(device),
        # Of the minute before: what is measured on the wall clock (several processes) depends on it.
        "load_average": os.getloadavg()[0],
        "plan": dataclasses.asdict(plan),
        "fused_values": fused_agrees(place),
        "interrupted": False,
        "backends": [],
    }
    fitted: list[Backend] = []
    try:
        for name in names or available_backends(device, (plan.dtype,)):
            backend = registry.load(name)
            if (found := row_of(plan, backend, device, say)) is not None:
                result["backends"].append(found)
                fitted.append(backend)
        if fitted:
            # One after another, so that an interruption keeps those before it.
            for part in others_of(plan, fitted, device, say):
                result.update([part])
    except KeyboardInterrupt:
        result["interrupted"] = True
    return result
