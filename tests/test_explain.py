"""A finding about a kernel that is right but computes otherwise says so; one about a kernel that is wrong does not."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from emulated import KINDS, How, bf16, kernel

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.user import UserKernel
from attn_fuzz.campaign.messages import Assignment, Found, Message
from attn_fuzz.campaign.worker import work
from attn_fuzz.evaluation.seeded_faults import drawn
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.explain import explained_by
from attn_fuzz.oracle.facts import declaring
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case

HERE = Path(__file__).parent
CPU = torch.device("cpu")

FEW = Case(level="kernel", lengths=(6, 9), heads=2, kv_heads=1, head_dim=16, causal=False, seed=1)
ONE = Case(level="kernel", lengths=(40,), head_dim=8, values="large", seed=2)


def user(name: str) -> Backend:
    return registry.load(f"{HERE / 'emulated.py'}:{name}")


def explained(backend: Backend, case: Case) -> str | None:
    return explained_by(Trial(case, backend, CPU))


def declared(sentence: str) -> dict[str, object]:
    """What it says to declare."""
    return ast.literal_eval(sentence.split(" = ")[1].removesuffix(", or mend it"))


# bf16 exponentials are weights that are rounded to bf16, before they are added up rather than afterwards.
OTHERWISE = {
    "bf16_exponentials": [{"exp_error": 2.0**-8}, {"probabilities_dtype": "bf16"}],
    "bf16_exponentials_of_fp16": [{"exp_error": 2.0**-8}, {"probabilities_dtype": "bf16"}],
    "atomic_sums_in_bf16": [{"atomic_sums": ["dq"]}],
    "atomic_sums_in_fp16": [{"atomic_sums": ["dq"]}],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_kernel_is_accused_and_told_what_to_declare(kind: str) -> None:
    _, facts, dtype = KINDS[kind]
    for case in (ONE,) if "atomic" in kind else (FEW, ONE):
        assert examine(case.replace(dtype=dtype), user(kind), CPU).symptoms
        sentence = explained(user(kind), case.replace(dtype=dtype))
        assert sentence is not None
        assert declared(sentence) in OTHERWISE.get(kind, [facts]), sentence


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tf32_cut_off", "bf16_weights_of_fp16"])
def test_within_a_layer_too(kind: str) -> None:
    _, facts, dtype = KINDS[kind]
    case = Case(lengths=(20, 9), cuts=(11,), heads=2, head_dim=8, hidden=16, dtype=dtype, values="large", seed=3)
    if (sentence := explained(user(kind), case)) is None:
        assert not examine(case, user(kind), CPU).symptoms
    else:
        assert declared(sentence) == facts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_declares_it_is_clean_with(kind: str) -> None:
    """The long run of this, 60 cases for each level, is in docs/oracle.md."""
    backend, count = user(f"{kind}_declared"), 0
    for case in drawn(backend, 3, 4):
        try:
            verdict = examine(case, backend, CPU)
        except UnsupportedCase:
            continue
        count += 1
        assert not verdict.symptoms, case.to_json()
    assert count >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS)[::3])
def test_with_a_key_too_few_it_is_convicted_and_nothing_explains_it(kind: str) -> None:
    _, _, dtype = KINDS[kind]
    for case in (FEW, ONE):
        assert examine(case.replace(dtype=dtype), user(f"{kind}_faulty"), CPU).symptoms
        assert explained(user(f"{kind}_faulty"), case.replace(dtype=dtype)) is None


FAULTS = ["M15", "B9", "X06", "X07", "M46-forward", "X09", "X27", "X37", "X10"]
"""Of backends/faults/numerics.py and masks.py, those that a value shows."""


TABLE = json.loads((HERE.parent / "results" / "faults.json").read_text())["faults"]
SMALLEST = {row["id"]: Case.from_dict(row["case"]) for row in TABLE if row["case"]["level"] == "kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_no_planted_fault_is_explained(fault: str) -> None:
    backend = registry.load(f"fault:{fault}")
    shown = [SMALLEST[fault]] if fault in SMALLEST else []
    small = (case for case in drawn(backend, 1, 26) if case.level == "kernel" and case.tokens <= 60)
    for case in small:
        if len(shown) < 2 and examine(case, backend, CPU, probes=()).symptoms:
            shown.append(case)
    assert shown
    for case in shown:
        assert examine(case, backend, CPU).symptoms, case.to_json()
        assert explained(backend, case) is None, case.to_json()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.01, 1.003, 0.98])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_wrong_scale_is_no_arithmetic(factor: float, dtype: str) -> None:
    backend = of_function(kernel(How(scale_by=factor)))
    assert explained(backend, ONE.replace(dtype=dtype)) is None
    assert explained(backend, FEW.replace(dtype=dtype)) is None


def of_function(function: object) -> Backend:
    """A backend of a user's function that lies in no file."""
    import emulated

    emulated.tried = function  # type: ignore[attr-defined]
    backend = Backend("tried", UserKernel("emulated:tried"))
    del emulated.tried  # type: ignore[attr-defined]
    return backend


def test_declaring_more_leaves_the_rest_as_it_is() -> None:
    backend = user("tf32_cut_off")
    more = declaring(backend, {"products": "tf32"})
    before, after = (each.kernel.profile_on("cpu") for each in (backend, more))
    assert (before.products, after.products) == ("", "tf32")
    assert before.rounds_scores == after.rounds_scores
    assert more.kernel.capabilities == backend.kernel.capabilities


STRICT = {
    "scales_inputs": False,
    "scales_gradients": False,
    "rounds_scores": False,
    "rounds_dp": False,
    "stores_probabilities": False,
    "delta_from_probabilities": False,
    "expands_kv": False,
    "stores_partial_sums": False,
}
STEEP = [
    Case(level="kernel", lengths=(300,), heads=2, kv_heads=1, head_dim=8, dtype=dtype, values="large", causal=causal)
    for dtype in ("bf16", "fp16")
    for causal in (False, True)
]


def _stores_in_dtype(x: torch.Tensor) -> torch.Tensor:
    return bf16(x)


@pytest.mark.slow
@pytest.mark.parametrize("how", [How(scaled_query=_stores_in_dtype), How(score=_stores_in_dtype)], ids=["q", "scores"])
def test_a_stricter_profile_convicts_what_the_default_lets_pass(how: How) -> None:
    case = STEEP[0]
    assert not examine(case, of_function(kernel(how)), CPU).symptoms
    strict = of_function(kernel(how, STRICT))
    assert examine(case, strict, CPU).symptoms
    sentence = explained(strict, case)
    assert sentence is not None
    assert set(declared(sentence)) >= set(STRICT)


def test_either_alone_hides_behind_the_other() -> None:
    """Scores that are rounded are as far off as scores of rounded queries: what does neither has to say both."""
    case, how = STEEP[0], How(scaled_query=_stores_in_dtype)
    assert not examine(case, of_function(kernel(how, {"scales_inputs": False})), CPU, probes=()).symptoms
    both = {"scales_inputs": False, "rounds_scores": False}
    assert examine(case, of_function(kernel(how, both)), CPU, probes=()).symptoms


@pytest.mark.slow
@pytest.mark.parametrize("case", STEEP, ids=lambda case: f"{case.dtype}-{case.causal}")
def test_what_keeps_to_a_strict_profile_is_clean(case: Case) -> None:
    backend = of_function(kernel(How(by_head=lambda x: x), STRICT))
    assert not examine(case, backend, CPU).symptoms
    assert json.dumps(STRICT)


@pytest.mark.slow
def test_a_finding_says_it_second(tmp_path: Path) -> None:
    """Where few messages are shown, the fact is among them."""
    messages: list[Message] = []
    job = Assignment(
        backend=f"{HERE / 'emulated.py'}:tf32_cut_off",
        device="cpu",
        seed=1,
        levels=("kernel",),
        dtypes=("fp32",),
        cases=5,
        stop_at_first=True,
    )
    work(job, messages.append)
    (finding,) = [message.finding for message in messages if isinstance(message, Found)]
    assert finding.messages[0].startswith(finding.symptom)
    assert finding.messages[1].startswith("looks like TF32 products")
    assert sum("looks like" in message for message in finding.messages) == 1
