"""That a kernel compiles is noticed by the time of the calls that find out its limits, and what it compiles for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from compiling import Compiling, Key, compiling, configuration

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended
from attn_fuzz.backends.registry import Backend
from attn_fuzz.campaign import limits
from attn_fuzz.campaign.compile_probe import LEAST, TIMES, compiled_in, slower, together
from attn_fuzz.campaign.isolated import Report, Subject, report_of
from attn_fuzz.execution.compilers import triton_variants
from attn_fuzz.reference.case import Case

SMALL: dict[str, Any] = {"head_dims": (8, 16, 32), "dtypes": ("bf16",), "gqa": False, "memories": ("contiguous",)}
Found = Callable[..., dict[str, Any]]


@pytest.fixture
def noticed(monkeypatch: pytest.MonkeyPatch) -> Found:
    """What is found out about a backend, in this process and by its own clock; the cases, where a list is given."""

    def found(backend: Backend, asked: list[Case] | None = None) -> dict[str, Any]:
        kernel = backend.kernel
        assert isinstance(kernel, Compiling)

        class Here:
            def __init__(self, subject: Subject, timeout: float, soon: float | None = None) -> None:
                self.subject = subject

            def report(self, case: Case, *, operators: bool = False, judged: bool | None = None) -> Report:
                if asked is not None:
                    asked.append(case)
                return report_of(case, self.subject, backend, operators=operators, clock=kernel.clock)

            def end(self) -> None: ...

        monkeypatch.setattr(registry, "load", lambda name: backend)
        monkeypatch.setattr(limits, "Isolated", Here)
        return dict(limits.infer_limits("compiling", "cpu", (), 1, lambda limit: None).without)

    return found


def test_a_kernel_that_does_not_compile_is_asked_nothing_more(noticed: Found) -> None:
    unknown, stated = list[Case](), list[Case]()
    assert noticed(compiling(None, **SMALL), unknown) == {}
    assert noticed(compiling(None, **SMALL | {"compiles": False}), stated) == {}
    assert sorted(map(repr, unknown)) == sorted(map(repr, stated))


def test_a_kernel_that_compiles_is_noticed_and_begins_with_what_was_called(noticed: Found) -> None:
    found = noticed(compiling(**SMALL))
    assert found.keys() == {"compiles", "compiled_first"}
    assert found["compiles"]
    first = {each.words() for each in found["compiled_first"]}
    assert first == {
        *(f"bf16 {head_dim} 2/2 causal" for head_dim in (8, 16, 32)),
        # Values of another head_dim.
        *(f"bf16 {head_dims} 2/2 causal" for head_dims in ("8-16", "16-32", "32-16")),
        "bf16 32 2/2 causal left",
        "bf16 32 2/2 full left right",
    }


def test_one_that_says_that_it_compiles_is_believed(noticed: Found) -> None:
    assert noticed(compiling(None, **SMALL | {"compiles": True}))["compiles"]


def _class(queries: int, keys: int) -> tuple[object, ...]:
    """What a compiler tells apart of a document."""
    return *((n == 1, n % 16 == 0, n // 64) for n in (queries, keys)), queries > keys, (keys - queries) % 16 == 0


KEYS: dict[str, tuple[Key, dict[str, Any]]] = {
    "layouts": (lambda q, m, o: (q.dtype, q.shape, m.lengths_q), {"layouts": 12, "capacity": False}),
    "many classes of lengths": (
        lambda q, m, o: (
            configuration(q, m, o),
            *(_class(n, k) for n, k in zip(m.lengths_q, m.lengths_k, strict=True)),
        ),
        {"layouts": 12, "capacity": False},
    ),
    "scales": (lambda q, m, o: (configuration(q, m, o), o.scale), {"scale": False}),
    "window sizes": (lambda q, m, o: (configuration(q, m, o), o.window), {"window_sizes": (0, 7, 64)}),
    "a second layout, and no third": (lambda q, m, o: (configuration(q, m, o), len(q) != 54), {}),
    "multiples of 16": (lambda q, m, o: (configuration(q, m, o), len(q) % 16 == 0), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", KEYS)
def test_what_else_it_compiles_for_is_found_out(what: str, noticed: Found) -> None:
    key, wanted = KEYS[what]
    found = noticed(compiling(key, **SMALL))
    del found["compiled_first"]
    assert found == {"compiles": True, **wanted}


@pytest.mark.slow
def test_a_kernel_that_is_wrong_compiles_too(noticed: Found) -> None:
    def nan_of_many_keys(q: Any, options: Any, attended: Attended) -> Attended:
        return attended._replace(out=attended.out * float("nan")) if len(q) in (1, 5, 65) else attended

    key, wanted = KEYS["many classes of lengths"]
    found = noticed(compiling(key, nan_of_many_keys, **SMALL))
    del found["compiled_first"]
    assert found == {"compiles": True, **wanted}


def test_configurations_that_came_back_wrong_are_not_those_to_begin_with(noticed: Found) -> None:
    def nan_of_16(q: Any, options: Any, attended: Attended) -> Attended:
        return attended._replace(out=attended.out * float("nan")) if q.shape[2] == 16 else attended

    found = noticed(compiling(None, **SMALL | {"compiles": True}), None)
    wrong = noticed(compiling(configuration, nan_of_16, **SMALL))
    assert wrong["compiles"]
    begun, right = ({each.head_dim for each in some["compiled_first"]} for some in (found, wrong))
    assert right == begun - {16}


def test_memory_layouts_that_take_long_to_compile_are_few(noticed: Found) -> None:
    def key(q: Any, metadata: Any, options: Any) -> Any:
        return configuration(q, metadata, options), q.stride()[0] // q.stride()[1]

    few = SMALL | {"memories": ("contiguous", "sliced", "fused"), "window": False}
    assert "memories" not in noticed(compiling(key, **few)), "three seconds are not long"
    assert noticed(compiling(key, seconds=9.0, **few))["memories"] == ("contiguous", "sliced")


def test_one_slow_call_is_no_compiler(noticed: Found) -> None:
    assert noticed(compiling(lambda q, m, o: q.shape[2] == 8, **SMALL)) == {}


def test_a_kernel_of_one_configuration_needs_no_pool(noticed: Found) -> None:
    assert noticed(compiling(**SMALL | {"head_dims": (8,), "window": False})) == {}


def test_slower_needs_both_seconds_and_a_factor() -> None:
    assert slower(2.0, 0.01)
    assert not slower(LEAST, 0.01), "too quick to wait for"
    assert not slower(TIMES * 10.0, 10.0), "a slow kernel"


def test_what_triton_tells_needs_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(case: Case) -> Report:
        raise AssertionError("asked again")

    runtime = SimpleNamespace(jit_post_compile_hook=None)
    monkeypatch.setitem(sys.modules, "triton.knobs", SimpleNamespace(runtime=runtime))  # type: ignore[arg-type]
    before = triton_variants()
    runtime.jit_post_compile_hook(key="", repr="", fn=None, compile={}, is_manual_warmup=False, already_compiled=False)
    assert triton_variants() == before + 1
    case = Case(level="kernel", lengths=(3,))
    assert compiled_in(Report(seconds=0.01, variants=1), case, never)
    assert not compiled_in(Report(seconds=0.01), case, never)


def test_memories_that_are_no_limit_and_are_compiled_quickly_are_left() -> None:
    both = {"memories": ("contiguous", "sliced"), "compiles": True}
    assert together(both, {"memories": ("contiguous", "fused")}) == {"memories": ("contiguous",), "compiles": True}
    assert together({"compiles": True}, {"gqa": False}) == {"compiles": True, "gqa": False}
