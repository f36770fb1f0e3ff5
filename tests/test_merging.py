"""Results over parts of the keys, merged by their LSEs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from attn_fuzz.backends import known, registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.output import MisshapenResult
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.batch_run import PROBED
from attn_fuzz.batch.judge import judge
from attn_fuzz.batch.judged import Question
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.generation.layouts import CROWD
from attn_fuzz.oracle.checks.merging import parts_merge
from attn_fuzz.oracle.relations.merged import Partial, Parts, merged, merged_answer
from attn_fuzz.oracle.symptoms import Crashed, MissingResult, NotMerged
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference import attention
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

CPU = torch.device("cpu")
PLAIN = Case(level="kernel", lengths=(3, 2, 4, 1), key_lengths=(5, 7, 4, 2), heads=2, head_dim=8, causal=False)
PAST = Case(level="kernel", lengths=(3, 5, 0, 2), key_lengths=(7, 2, 4, 2), head_dim=8)
BATCH = CallBatch(PLAIN, (1, 2, 4))
MERGING = Question("nan", "merging")


def parts_of(case: Case, *, blind: bool = True) -> Parts:
    parts = Parts.of(case, blind=blind)
    assert parts is not None
    return parts


class Altered(LoopKernel):
    """The loop with something done to what it gives back."""

    def __init__(self, deed: Callable[[VarlenMetadata, Attended], Attended]) -> None:
        self.deed = deed

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        return self.deed(metadata, super().attend(q, k, v, metadata, options))


def altered(deed: Callable[[VarlenMetadata, Attended], Attended]) -> Backend:
    return Backend("altered", Altered(deed), levels=("kernel",))


# The formulas.


def test_parts_make_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, dtype=torch.float64, generator=generator) for n in (3, 7, 7))
    mask = attention.allowed_keys(3, 7, (-1, -1))
    mask[0, :4] = mask[1] = False

    def over(keys: slice) -> Partial:
        result = attention.forward(q, k[:, keys], v[:, keys], mask[:, keys], 0.5)
        return Partial(result.out.transpose(0, 1), result.lse.T)

    got, whole = merged(over(slice(4)), over(slice(4, 7))), over(slice(7))
    assert torch.allclose(got.out, whole.out, rtol=1e-14, atol=1e-14)
    assert torch.equal(got.lse.isinf(), whole.lse.isinf())
    finite = whole.lse.isfinite()
    assert torch.allclose(got.lse[finite], whole.lse[finite], rtol=1e-14)
    # The first row sees nothing of the first part, the second nothing at all.
    assert torch.equal(got.out[0], over(slice(4, 7)).out[0])
    assert not got.out[1].any()
    assert got.lse[1].eq(-torch.inf).all()


# What comes apart.


def test_noncausal_documents_are_cut_anywhere_and_causal_ones_before_their_own_keys() -> None:
    first, second = parts_of(PLAIN).cases
    assert first.packed_key_lengths == (2, 0, 2, 2)
    assert second.packed_key_lengths == (3, 7, 2, 0)
    assert parts_of(PLAIN, blind=False).cuts == (2, 3, 2, 1)
    first, second = parts_of(PAST).cases
    assert (first.packed_key_lengths, first.causal) == ((4, 0, 4, 0), False)
    assert (second.packed_key_lengths, second.causal) == ((3, 2, 0, 2), True)
    assert Parts.of(PAST, blind=False) is None


@pytest.mark.parametrize(
    "case",
    [
        PLAIN.replace(window=(3, -1)),
        PLAIN.replace(window=(-1, 2)),
        PLAIN.replace(values="ties", lengths=(2,), key_lengths=(70,)),
        PLAIN.replace(causal=True, key_lengths=None),
        Case(lengths=(3, 4)),
    ],
)
def test_what_does_not_come_apart_is_not_asked(case: Case) -> None:
    assert Parts.of(case, blind=False) is None
    assert Parts.of(case, blind=True) is None


@pytest.mark.parametrize("case", [PLAIN, PAST])
def test_answers_over_both_parts_merge_to_that_over_the_whole(case: Case) -> None:
    drawn, parts = kernel_inputs(case, "cpu"), parts_of(case)
    first, second = (
        kernel_answer(part, inputs, Profile()) for part, inputs in zip(parts.cases, parts.inputs(drawn), strict=True)
    )
    whole = kernel_answer(case, drawn, Profile())
    for name, got in merged_answer(first, second).items():
        right = whole[name].value
        assert torch.equal(got.value.isinf(), right.isinf())
        assert torch.allclose(got.value.nan_to_num(neginf=0.0), right.nan_to_num(neginf=0.0), rtol=1e-13, atol=1e-14)
        assert (got.variance > 0).any()


def test_both_parts_have_the_keys_of_the_whole() -> None:
    drawn = kernel_inputs(PLAIN, "cpu")
    first, second = parts_of(PLAIN).inputs(drawn)
    assert torch.equal(torch.cat([first.k[:2], second.k[:3], second.k[3:10]]), drawn.k[:12])
    assert torch.equal(second.v[-2:], drawn.v[14:16])
    assert torch.equal(first.q, drawn.q)


# Verdicts.


@pytest.mark.parametrize("case", [PLAIN, PAST, PLAIN.replace(dtype="bf16", softcap=20.0, scale=0.5, kv_heads=1)])
def test_a_right_kernel_is_clean(case: Case) -> None:
    assert not list(parts_merge(Trial(case, registry.load("loop"), CPU)))


def test_without_an_lse_nothing_is_merged() -> None:
    quiet = altered(lambda _, attended: attended._replace(lse=None))
    assert not list(parts_merge(Trial(PLAIN, quiet, CPU)))


def no_keys_at_all(metadata: VarlenMetadata, attended: Attended, value: float) -> Attended:
    """The LSE of documents without keys is some number."""
    assert attended.lse is not None
    lse = attended.lse.clone()
    begin = 0
    for queries, keys in zip(metadata.lengths_q, metadata.lengths_k, strict=True):
        lse[:, begin : begin + (0 if keys else queries)] = value
        begin += queries
    return attended._replace(lse=lse)


@pytest.mark.parametrize(("value", "moves"), [(0.0, True), (-3.0, True), (torch.nan, True), (-1e30, False)])
def test_a_part_without_keys_must_have_no_weight(value: float, moves: bool) -> None:
    """A finite number far below all others has none, either: what it is has a check of its own."""
    backend = altered(lambda metadata, attended: no_keys_at_all(metadata, attended, value))
    found = list(parts_merge(Trial(PLAIN, backend, CPU)))
    assert {symptom.tensor for symptom in found} == ({"out", "lse"} if moves else set())
    assert all(isinstance(symptom, NotMerged) for symptom in found)
    assert all(symptom.element is not None and symptom.element.place.document in (1, 3) for symptom in found)


def test_an_lse_that_is_off_by_a_little_moves_what_is_merged() -> None:
    def deed(metadata: VarlenMetadata, attended: Attended) -> Attended:
        assert attended.lse is not None
        return attended._replace(lse=attended.lse + (0.01 if sum(metadata.lengths_k) < 9 else 0.0))

    (symptom, *_) = parts_merge(Trial(PLAIN, altered(deed), CPU))
    assert "over [2, 0, 2, 2] and [3, 7, 2, 0] keys" in symptom.message


# Batches.


def test_batches_are_asked_document_by_document() -> None:
    backend = altered(lambda metadata, attended: no_keys_at_all(metadata, attended, 0.0))
    judged = judge(CallBatch(PLAIN.replace(seed=1), BATCH.ends), backend, CPU, MERGING)
    assert judged.symptoms == {"out": NotMerged, "lse": NotMerged}
    columns = [judged.names.index(name) for name in PROBED[:2]]
    wrong = (judged.z[:, columns] > 10).any(1).tolist()
    # Calls by themselves are cut by the places that their documents have there.
    cuts = [cut for index in range(3) for cut in _cuts(judged.batch.call(index))]
    assert wrong == [cut in (0, keys) and cut >= 0 for cut, keys in zip(cuts, PLAIN.packed_key_lengths, strict=True)]
    assert any(wrong)
    assert not judge(BATCH, registry.load("loop"), CPU, MERGING).failing()


def _cuts(case: Case) -> tuple[int, ...]:
    """Of a call; -1 where it does not come apart."""
    parts = Parts.of(case, blind=True)
    return (-1,) * len(case.packed_lengths) if parts is None else parts.cuts


def test_a_call_that_falls_over_a_part_is_told_by_its_number() -> None:
    whole = {BATCH.call(index).packed_key_lengths for index in range(3)}

    def deed(metadata: VarlenMetadata, attended: Attended) -> Attended:
        if len(metadata.lengths_q) == 2 and tuple(metadata.lengths_k) not in whole:
            raise RuntimeError("two documents")
        return attended

    judged = judge(BATCH, altered(deed), CPU, MERGING)
    assert judged.broken == {2: "RuntimeError: two documents"}
    assert judged.fallen(2) is Crashed

    def misshapen(metadata: VarlenMetadata, attended: Attended) -> Attended:
        if len(metadata.lengths_q) == 2 and tuple(metadata.lengths_k) not in whole:
            raise MisshapenResult("two documents")
        return attended

    assert judge(BATCH, altered(misshapen), CPU, MERGING).fallen(2) is MissingResult


def test_what_the_backend_does_not_take_is_not_asked() -> None:
    backend = altered(lambda metadata, attended: no_keys_at_all(metadata, attended, 0.0))
    stated = dataclasses.replace(LoopKernel.capabilities, noncausal=False)
    backend.kernel.capabilities = stated  # type: ignore[misc]
    assert not list(parts_merge(Trial(PAST, backend, CPU)))
    assert not judge(CallBatch.of_one(PAST.replace(key_lengths=(7, 8, 4, 9))), backend, CPU, MERGING).failing()


def test_a_crowd_is_not_taken_apart() -> None:
    one = Case(level="kernel", lengths=(1,), head_dim=8, causal=False)
    many, crowd = (one.replace(lengths=(1,) * documents) for documents in (400, CROWD))
    assert Parts.taken(many, registry.load("loop"), "cpu") is not None
    assert Parts.taken(crowd, registry.load("loop"), "cpu") is None


def test_what_compiles_for_shapes_has_one_cut_of_each_document() -> None:
    shapes = set[tuple[int, int]]()

    def met(metadata: VarlenMetadata, attended: Attended) -> Attended:
        shapes.add((sum(metadata.lengths_q), sum(metadata.lengths_k)))
        return attended

    backend = altered(met)
    found = set[int]()
    for layouts in (0, 4):
        shapes.clear()
        backend.kernel.capabilities = dataclasses.replace(LoopKernel.capabilities, layouts=layouts)  # type: ignore[misc]
        for seed in range(4):
            assert not list(parts_merge(Trial(PLAIN.replace(seed=seed), backend, CPU)))
        found.add(len(shapes))
    # The whole and its halves; more where a part may have none of a document's keys, in turn.
    assert min(found) == len(shapes) == 3
    assert max(found) > 3
    backend.kernel.compiled = True  # type: ignore[misc]
    assert Parts.taken(PLAIN, backend, "cpu") is None


@pytest.mark.parametrize("known_of", ["altered", "another"])
def test_parts_that_meet_a_known_issue_are_not_asked(known_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal documents of no more keys than queries have none in the first part; some kernels leave those unwritten."""

    def unwritten(metadata: VarlenMetadata, attended: Attended) -> Attended:
        lengths = metadata.cu_seqlens_k.diff().repeat_interleave(metadata.cu_seqlens_q.diff())
        assert attended.lse is not None
        return attended._replace(lse=attended.lse.masked_fill(lengths == 0, 7.0))

    (issue,) = (issue for issue in known.KNOWN if issue.id == "cudnn-frontend-no-keys")
    issue = dataclasses.replace(issue, backends=(known_of,), device="cpu", present=lambda: True)
    monkeypatch.setattr(known, "KNOWN", (issue,))
    case = Case(level="kernel", lengths=(3, 2), key_lengths=(5, 2), heads=2, head_dim=8, causal=True)
    backend = altered(unwritten)
    found = [type(symptom) for symptom in parts_merge(Trial(case, backend, CPU))]
    failing = judge(CallBatch(case, (2,)), backend, CPU, MERGING).failing()
    assert (bool(found), bool(failing)) == ((known_of == "another"),) * 2
