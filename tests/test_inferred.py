"""What is not stated about a backend is found out by one call each; what is stated is believed."""

from __future__ import annotations

import pytest
import torch
from doubles import Double, double

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended
from attn_fuzz.backends.loop import Call, Loop
from attn_fuzz.backends.registry import Backend
from attn_fuzz.execution.inferred import InferredCapabilities, inferred
from attn_fuzz.reference.case import Case

UNSTATED = {"capacity": None, "isolates_nonfinite": None}


class Counts(Loop):
    """Notes every forward."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return super().forward(call, q, k, v)


class MixesNaN(Loop):
    """0 * NaN, as a product with an explicit mask has it."""

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().forward(call, q, k, v)
        return out + (0 * v.float().sum()).to(out.dtype), lse


class MixesNaNBackward(Loop):
    """The same in dK only."""

    def backward(
        self, call: Call, q: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = super().backward(call, q, *rest)
        return dq, dk + (0 * q.float().sum()).to(dk.dtype), dv


class DropsSpareRows(Double):
    """Builds its output document by document, so that nothing lies behind the last one."""

    def attend(self, *args: object) -> Attended:
        attended = super().attend(*args)  # type: ignore[arg-type]
        rows = int(args[3].cu_seqlens_q[-1])  # type: ignore[attr-defined]
        return attended._replace(out=attended.out[:rows])


class Crashes(Loop):
    def forward(self, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("loop", "capacity", "isolates"),
    [(Loop, True, True), (MixesNaN, False, False), (MixesNaNBackward, False, False), (Crashes, False, False)],
)
def test_a_call_tells(loop: type[Loop], capacity: bool, isolates: bool) -> None:
    assert inferred(double(loop(), **UNSTATED), "cpu") == InferredCapabilities(capacity, isolates)


def test_who_drops_spare_rows_takes_none() -> None:
    backend = Backend("double", DropsSpareRows(Loop(), **UNSTATED))
    assert inferred(backend, "cpu") == InferredCapabilities(capacity=False, isolates_nonfinite=True)


@pytest.mark.parametrize("capacity", [True, False])
@pytest.mark.parametrize("isolates", [True, False])
def test_statements_are_believed_without_a_call(capacity: bool, isolates: bool) -> None:
    loop = Counts()
    assert inferred(double(loop, capacity=capacity, isolates_nonfinite=isolates), "cpu") == InferredCapabilities(
        capacity, isolates
    )
    assert loop.calls == 0


def test_a_backend_is_asked_once() -> None:
    loop = Counts()
    backend = double(loop, **UNSTATED)
    for _ in range(3):
        inferred(backend, "cpu")
    assert loop.calls == 2


@pytest.mark.parametrize(
    "narrow",
    [
        {"dtypes": ("bf16",)},
        {"causal": False},
        {"noncausal": False},
        {"head_dim_multiple": 8},
        {"max_head_dim": 4},
        {"head_dim_multiple": 24, "max_head_dim": 48},
        {"scale": False, "window": False, "softcap": False, "gqa": False, "empty_documents": False},
        {"memories": ("contiguous",), "queries_without_keys": False, "keys_without_queries": False},
    ],
    ids=str,
)
def test_only_what_a_backend_takes_is_asked(narrow: dict[str, object]) -> None:
    """A kernel that is asked for more raises, and would be taken for one that mixes documents."""
    backend = double(Loop(), **UNSTATED, **narrow)
    kernel = backend.kernel
    assert isinstance(kernel, Double)
    attend = kernel.attend

    def strict(q: torch.Tensor, k: torch.Tensor, *rest: object) -> Attended:
        options = rest[2]
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        asked = Case(
            level="kernel",
            lengths=(len(q),),
            head_dim=q.shape[2],
            heads=q.shape[1],
            kv_heads=k.shape[1],
            dtype=names[q.dtype],
            causal=options.causal,  # type: ignore[attr-defined]
        )
        if (reason := backend.refusal(asked, "cpu")) is not None:
            raise NotImplementedError(reason)
        return attend(q, k, *rest)  # type: ignore[arg-type]

    kernel.attend = strict  # type: ignore[method-assign, assignment]
    assert inferred(backend, "cpu") == InferredCapabilities(capacity=True, isolates_nonfinite=True)


def test_a_layer_cannot_be_asked() -> None:
    loop = Counts()
    backend = Backend("double", Double(loop, **UNSTATED), levels=("layer",))
    assert inferred(backend, "cpu") == InferredCapabilities(capacity=False, isolates_nonfinite=False)
    assert loop.calls == 0


@pytest.mark.parametrize(("name", "isolates"), [("loop", True), ("sdpa_dense", False)])
def test_the_backends_that_are_here(name: str, isolates: bool) -> None:
    assert inferred(registry.load(name), "cpu").isolates_nonfinite == isolates
