"""The keys of a batch's calls in two parts (attn_fuzz/oracle/relations/merged.py), merged: a verdict per document."""

from __future__ import annotations

import itertools
from typing import Final

import torch

from attn_fuzz.batch.batch_run import PROBED, BatchRun, Results
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.subsets import subset
from attn_fuzz.execution.calls import How
from attn_fuzz.oracle.relations.autograd import INFERENCE
from attn_fuzz.oracle.relations.merged import MERGED, PART_RESULTS, Parts
from attn_fuzz.oracle.symptoms import NotMerged
from attn_fuzz.reference.answer import KERNEL_TENSORS, Expected, kernel_inputs
from attn_fuzz.reference.batched import kernel_answer

_COLUMNS: Final = dict(zip(KERNEL_TENSORS, PROBED, strict=True))


def merging(batch_run: BatchRun) -> None:
    """Of calls whose keys come apart, each part is run; what both gave is merged, and held to its budgets."""
    if "lse" not in batch_run.first:
        return
    apart = _apart(batch_run)
    if not apart:
        return
    batch, device = batch_run.batch, batch_run.device
    documents = [document for index in apart for document in range(*batch.spans[index])]
    small = subset(batch.case, documents)
    assert small is not None
    parts = Parts(small, tuple(itertools.chain.from_iterable(each.cuts for each in apart.values())))
    ends = tuple(itertools.accumulate(len(each.cuts) for each in apart.values()))
    drawn = kernel_inputs(small, device)
    results, answers = list[Results](), list[dict[str, Expected]]()
    for case, inputs in zip(parts.cases, parts.inputs(drawn), strict=True):
        tensors = batch_run.load(CallBatch(case, ends), inputs)
        found = batch_run.run_batch(tensors, batch_run.other_poison, How(INFERENCE), every=True)
        numbers = list(apart)
        # Of a smaller batch: calls are told by their numbers in the whole one.
        found.broken, found.refused = (
            {numbers[index]: words for index, words in each.items()} for each in (found.broken, found.refused)
        )
        found.incomplete = {numbers[index] for index in found.incomplete}
        results.append(found.results)
        answers.append(kernel_answer(case, inputs, batch_run.profile, degrees=False))
    if any(name not in got for got in results for name in PART_RESULTS):
        return
    batch_run.counted[MERGED] = torch.tensor(len(apart))
    batch_run.symptoms = dict.fromkeys(PART_RESULTS, NotMerged)
    places = torch.tensor(documents).to(device)
    for compared in parts.compared(results, answers):
        wrong = torch.zeros(len(batch.case.packed_lengths), dtype=torch.float64, device=device)
        wrong[places] = compared.of_documents(len(documents)).double()
        batch_run.accused[_COLUMNS[compared.tensor]] = wrong


def _apart(batch_run: BatchRun) -> dict[int, Parts]:
    """Calls both of whose parts the backend takes, by number."""
    parts = (Parts.taken(call, batch_run.backend, batch_run.device.type) for call in batch_run.batch.calls)
    return {index: each for index, each in enumerate(parts) if each is not None}
