"""What a layer's class may declare of itself: right layers of each kind are clean, wrong ones are convicted."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable, Capabilities, UnsupportedCase
from attn_fuzz.backends.user import InsideLayer
from attn_fuzz.campaign.limit_questions import plain_case
from attn_fuzz.campaign.messages import Assignment, Candidate, Failed, Finished, Found, Message
from attn_fuzz.campaign.plan import takes_batches
from attn_fuzz.campaign.serve import WORK
from attn_fuzz.cases.earlier import earlier_sequence
from attn_fuzz.evaluation.seeded_faults import drawn
from attn_fuzz.generation.domain import Domain
from attn_fuzz.oracle.examine import Verdict, examine, some_probes
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.conventions import Conventions
from attn_fuzz.reference.layer import layer_answer, layer_inputs
from attn_fuzz.reference.profile import Profile

KINDS = Path(__file__).resolve().parent / "kinds_of_layers.py"
SMALL = Case(lengths=(3, 2), cuts=(2,), heads=2, kv_heads=1, head_dim=4, hidden=8)
CUT = Case(lengths=(5, 3), cuts=(2, 4, 6), heads=2, kv_heads=1, head_dim=4, hidden=8)
BETWEEN = SMALL.replace(lengths=(3, 2, 4, 1, 2), padding_ids=(1, 3), padding=2, cuts=(4, 8))
PADDED = SMALL.replace(padding=3, cuts=(2, 6))
ROTARY = CUT.replace(rotary="default", dtype="bf16", key_norm="rms")
NONCAUSAL = SMALL.replace(causal=False, cuts=())


def kind(name: str) -> registry.Backend:
    return registry.load(f"layer:{KINDS}:{name}")


def verdict(name: str, case: Case) -> Verdict:
    return examine(case, kind(name), "cpu")


RIGHT = {
    "Packed": (ROTARY, ROTARY.replace(dtype="fp32", lengths=(3, 40)), PADDED.replace(rotary="proportional")),
    "PackedInFloat32": (ROTARY, ROTARY.replace(dtype="fp32", lengths=(30, 40), cuts=(33,))),
    "PackedInDtype": (ROTARY, ROTARY.replace(dtype="fp16", lengths=(30, 40), cuts=(33,))),
    "Consuming": (CUT.replace(dtype="bf16"), SMALL.replace(cuts=()), NONCAUSAL.replace(cuts=(3,)), PADDED),
    "WritingOver": (CUT.replace(dtype="fp16", seed=3), PADDED),
    "Reusable": (CUT, CUT.replace(seed=4), SMALL.replace(lengths=(1,), cuts=(), seed=4), PADDED),
    "LiveGradients": (CUT, CUT.replace(seed=5, query_norm="rms")),
    "Evaluating": (CUT, NONCAUSAL.replace(seed=4)),
    "ForwardOnly": (CUT.replace(dtype="bf16", seed=4), NONCAUSAL, PADDED),
    "Inference": (CUT.replace(dtype="bf16", seed=4), PADDED.replace(seed=4)),
    "ZeroPadding": (PADDED.replace(dtype="bf16", key_norm="rms", seed=1), SMALL),
    "SkippedPadding": (PADDED.replace(dtype="fp16", cuts=(2, 5, 7), seed=2), SMALL),
    "ZeroBetween": (
        BETWEEN.replace(dtype="bf16", rotary="default"),
        BETWEEN.replace(padding=0, cuts=()),
        PADDED,
        SMALL,
    ),
    "SkippedBetween": (BETWEEN.replace(dtype="fp16", seed=2), BETWEEN.replace(causal=False, cuts=(5,)), PADDED),
    "UncutNonCausal": (NONCAUSAL, CUT),
}
"""Layers that are as right as the canonical one, and what each is tried with."""


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_layer_is_left_alone(name: str) -> None:
    for case in RIGHT[name]:
        assert verdict(name, case).symptoms == (), case.to_json()


WRONG = {
    "PackedUndeclared": (ROTARY, "WrongBuffer", "budget"),
    "NotPackedAtAll": (ROTARY, "WrongBuffer", "budget"),
    "PackedFromEveryCut": (ROTARY, "WrongOutput", "budget"),
    "ConsumingUndeclared": (CUT, "WrongGradK", "budget"),
    "ConsumingTooMuch": (CUT, "WrongGradK", "budget"),
    "ConsumingLate": (CUT, "DeadRowsNotZero", "dead_rows"),
    "KeepsGradients": (SMALL, "KeepsState", "second_sequence"),
    "KeepsGradientRows": (SMALL, "KeepsState", "second_sequence"),
    "KeepsLengths": (SMALL.replace(lengths=(1, 4)), "KeepsState", "second_sequence"),
    "KeepsRows": (SMALL, "KeepsState", "second_sequence"),
    "LiveLeak": (SMALL, "PoisonLeaked", "unwritten"),
    "LiveShared": (SMALL, "WrongParameterGradient", "budget"),
    "EvaluatingWrongly": (CUT, "WrongWhenAsked", "evaluated"),
    "NeedingAutograd": (CUT, "WrongWhenAsked", "evaluated"),
    "ForwardOnlyWrongly": (CUT, "WrongOutput", "budget"),
    "SkippedUndeclared": (PADDED, "PoisonLeaked", "unwritten"),
    "PaddingLeaks": (PADDED, "WrongParameterGradient", "budget"),
    "PaddingNotZero": (PADDED, "WrongOutput", "budget"),
    "OnlyBehind": (BETWEEN, "WrongOutput", "budget"),
    "BetweenLeaks": (BETWEEN, "WrongParameterGradient", "budget"),
    "BetweenSeen": (BETWEEN.replace(causal=False, cuts=()), "WrongOutput", "budget"),
    "UncutNonCausalWrongly": (NONCAUSAL, "WrongOutput", "budget"),
}
"""Layers that are wrong, or do not declare what they do: a small case, and what it is convicted of."""


ELSEWHERE = "KeepsState", "WrongWhenAsked"
"""Symptoms of runs of another kind: the runs that every case makes are right."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layer_is_convicted(name: str) -> None:
    case, symptom, check = WRONG[name]
    found = verdict(name, case).symptoms
    assert (symptom, check) in {(type(each).__name__, each.check) for each in found}, [str(each) for each in found]
    assert symptom not in ELSEWHERE or {type(each).__name__ for each in found} == {symptom}


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_drawn_cases_find_nothing_in_a_right_layer(name: str) -> None:
    backend = kind(name)
    for case in drawn(backend, seed=1, count=6):
        assert examine(case, backend, "cpu", probes=some_probes(case)).symptoms == (), case.to_json()


def test_padding_between_documents_is_drawn_where_it_is_declared_and_not_computed() -> None:
    cases = {name: drawn(kind(name), seed=3, count=60) for name in ("SkippedBetween", "SkippedPadding", "Plain")}
    between = [case for case in cases["SkippedBetween"] if case.padding_ids]
    assert 10 < len(between) < 50
    # The last document is nobody's padding.
    assert all(max(case.padding_ids) < len(case.lengths) - 1 for case in between)
    assert not any(case.padding_ids for name in ("SkippedPadding", "Plain") for case in cases[name])
    for name in ("SkippedPadding", "Plain"):
        assert kind(name).refusal(BETWEEN, "cpu") == "padding between documents"


# One object for several sequences.


@pytest.mark.parametrize("case", [CUT, SMALL, NONCAUSAL, PADDED, SMALL.replace(lengths=(0, 3, 0)), Case(lengths=(1,))])
def test_an_earlier_sequence_is_longer_or_shorter(case: Case) -> None:
    for seed in range(4):
        now = case.replace(seed=seed)
        earlier = earlier_sequence(now)
        assert (earlier.tokens > now.tokens) is (seed & 4 == 0)
        assert (earlier.tokens == now.tokens) is (bool(seed & 4) and now.tokens == 1)
        assert earlier.seed != now.seed
        same = ("heads", "kv_heads", "head_dim", "hidden", "causal", "dtype", "padding", "memory", "capacity", "rotary")
        assert all(getattr(earlier, name) == getattr(now, name) for name in same)


def test_what_is_left_over_of_a_longer_sequence_and_of_a_shorter_one() -> None:
    # A buffer that is kept is large enough for the second sequence in one of the two only.
    assert [bool(verdict("KeepsGradientRows", SMALL.replace(seed=seed)).symptoms) for seed in (0, 4)] == [True, False]


def test_a_layer_that_does_not_say_so_is_asked_for_no_second_sequence() -> None:
    assert verdict("Plain", SMALL).symptoms == ()
    assert not kind("Plain").kernel.capabilities.reusable


# Gradient rows.


def test_rows_before_their_own_step_hold_what_later_queries_added() -> None:
    inputs, profile = layer_inputs(CUT, "cpu"), Profile()
    whole = layer_answer(CUT, inputs, profile)
    before = layer_answer(CUT, inputs, profile, conventions=Conventions(gradient_rows="consumed"))
    # By another way: the gradient of what stands behind each row's own micro-sequence.
    for begin, end in ((0, 2), (2, 4), (4, 6), (6, 8)):
        dout = inputs.dout.clone()
        dout[:end] = 0
        later = layer_answer(CUT, dataclasses.replace(inputs, dout=dout), profile)
        for name in ("dk", "dv"):
            assert torch.allclose(before[name].value[begin:end], later[name].value[begin:end], atol=1e-15)
            assert not before[name].variance[6:].any()
    for name in set(whole) - {"dk", "dv"}:
        assert torch.equal(whole[name].value, before[name].value), name


# Non-causal attention.


def test_non_causal_micro_sequences_are_neither_drawn_nor_taken() -> None:
    backend = kind("UncutNonCausal")
    domain = Domain.of(backend.kernel.capabilities, "cpu")
    assert backend.refusal(NONCAUSAL.replace(cuts=(3,)), "cpu") == "non-causal micro-sequences"
    with pytest.raises(UnsupportedCase, match="does not take non-causal micro-sequences"):
        examine(NONCAUSAL.replace(cuts=(3,)), backend, "cpu")
    assert plain_case(backend, domain, "fp32").cuts
    only = dataclasses.replace(domain, capabilities=dataclasses.replace(domain.capabilities, causal=False))
    assert not plain_case(backend, only, "fp32").cuts


def test_layers_that_declare_nothing_are_drawn_the_same_cases() -> None:
    plain, uncut = ([*drawn(kind(name), seed=0, count=8)] for name in ("Plain", "UncutNonCausal"))
    assert [case.to_json() for case in plain] == [case.to_json() for case in drawn(kind("Reusable"), seed=0, count=8)]
    assert any(not case.causal and case.cuts for case in plain)
    assert not any(not case.causal and case.cuts for case in uncut)


# Declarations.


def test_the_docs_list_every_kind_with_its_default_first() -> None:
    text = (KINDS.parent.parent / "docs" / "your_layer.md").read_text()
    rows = [
        line.split(" | ")
        for line in text.partition("| capability |")[2].partition("\n\n")[0].splitlines()
        if line.startswith("| `")
    ]
    told = {row[0].strip("|` "): [eval(value) for value in re.findall("`(.*?)`", row[1])] for row in rows}
    kinds = (
        "rotary_positions",
        "gradient_rows",
        "padding",
        "padding_between",
        "noncausal_cuts",
        "reusable",
        "evaluation",
        "backward",
    )
    assert sorted(told) == sorted(kinds)
    for name, values in told.items():
        assert values[0] == getattr(Capabilities(), name)
    assert Conventions() == Capabilities().conventions


@pytest.mark.parametrize(
    ("capabilities", "said"),
    [
        ({"rotary_positions": "sequence"}, "rotary_positions must be 'document' or 'packed', not 'sequence'"),
        ({"gradient_rows": "zeroed"}, "gradient_rows must be 'kept' or 'consumed', not 'zeroed'"),
        ({"gradient_rows": True}, "gradient_rows must be 'kept' or 'consumed', not True"),
        ({"padding": None}, "padding must be 'computed' or 'zero' or 'skipped', not None"),
        (
            {"padding_between": True},
            "padding_between is for padding that is not computed; declare padding 'zero' or 'skipped', too",
        ),
        ({"noncausal_cuts": "no"}, "noncausal_cuts must be True or False, not 'no'"),
        ({"backward": 0}, "backward must be True or False, not 0"),
        ({"evaluation": "yes"}, "evaluation must be True or False, not 'yes'"),
        ({"reusable": None}, "reusable must be True or False, not None"),
    ],
)
def test_a_wrong_declaration_is_told_in_one_sentence(
    capabilities: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "declaring.py"
    path.write_text(f"{KINDS.read_text()}\n\nclass Own(Plain):\n    capabilities = {capabilities!r}\n")
    with pytest.raises(BackendUnavailable) as told:
        registry.load(f"layer:{path}:Own")
    assert str(told.value) == f"{path}:Own.capabilities: {said}"


def test_a_reusable_layer_has_a_method_that_says_what_comes_next(tmp_path: Path) -> None:
    path = tmp_path / "declaring.py"
    for body, said in (
        ("pass", "it has no method restart"),
        ("def restart(self): pass", "restart should be called as restart(case): too many positional arguments"),
    ):
        text = f"\n\nclass Own(Plain):\n    capabilities = {{'reusable': True}}\n    {body}\n"
        path.write_text(KINDS.read_text() + text)
        with pytest.raises(BackendUnavailable) as told:
            registry.load(f"layer:{path}:Own")
        assert str(told.value) == f"{path}:Own is no layer: {said}"


def test_what_batches_do_not_know_comes_case_by_case() -> None:
    taken = {name for name in RIGHT if takes_batches(f"layer:{KINDS}:{name}", ("layer",))}
    packed = {"Packed", "PackedInFloat32", "PackedInDtype"}
    assert taken == packed | {"Reusable", "LiveGradients", "Evaluating", "UncutNonCausal"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PackedInDtype", "UncutNonCausal", "LiveGradients"])
def test_batches_find_nothing_in_a_right_layer(name: str) -> None:
    sent: list[Message] = []
    job = Assignment(backend=f"layer:{KINDS}:{name}", device="cpu", seed=0, levels=("layer",), cases=150, mode="batch")
    WORK["batch"](job, sent.append)
    (done,) = (message for message in sent if isinstance(message, Finished))
    assert done.tally.cases >= 150
    assert not [message for message in sent if isinstance(message, (Candidate, Found, Failed))]


def test_what_is_declared_of_one_process_is_not_spread_over_several() -> None:
    spread = Case(lengths=(4,), ranks=2)
    for name, refused in (("Plain", False), ("Consuming", True), ("ZeroPadding", True), ("ForwardOnly", True)):
        kernel = kind(name).kernel
        assert isinstance(kernel, InsideLayer)
        assert bool(kernel.capabilities.refusal(spread, "cpu", [(2, 2), (2, 4)])) is refused
