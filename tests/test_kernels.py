"""Kernel adapters: their names, what they say about themselves, what they refuse, and that the rest is right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from devices import but_forced_slow

from attn_fuzz.backends.kernel import AttentionOptions, Capabilities, Kernel, UnsupportedCase
from attn_fuzz.backends.layer import BufferedLayer
from attn_fuzz.backends.legacy import LegacyLayer
from attn_fuzz.backends.registry import UnknownBackend, kernel_names, load
from attn_fuzz.execution.runner import require_support
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reference.case import MEMORIES, Case

CPU = torch.device("cpu")
DEVICES = ("cpu", "cuda")
every_kernel = pytest.mark.parametrize("name", kernel_names())


def runs_on_cpu(name: str) -> bool:
    return load(name).kernel.why_unavailable("cpu") is None


CPU_KERNELS = [name for name in kernel_names() if runs_on_cpu(name)]
EACH_KERNEL = but_forced_slow(CPU_KERNELS)

# The registry.


@every_kernel
def test_a_file_holds_the_kernel_of_its_name(name: str) -> None:
    assert load(name).kernel.name == name


@every_kernel
def test_a_kernel_is_backend_at_both_levels(name: str) -> None:
    backend = load(name)
    assert isinstance(backend.kernel, Kernel)
    assert (backend.name, backend.layer, set(backend.levels)) == (name, BufferedLayer, {"kernel", "layer"})


@every_kernel
def test_legacy_is_a_layer_around_the_same_kernel(name: str) -> None:
    backend = load(f"legacy:{name}")
    assert backend.kernel is load(name).kernel
    assert (backend.name, backend.layer, backend.levels) == (f"legacy:{name}", LegacyLayer, ("layer",))


def test_legacy_refuses_kernel_cases() -> None:
    assert load("legacy:loop").refusal(Case(level="kernel"), "cpu") == "kernel cases"


def test_names_are_sorted_and_hold_the_stand_in() -> None:
    assert list(kernel_names()) == sorted(set(kernel_names()))
    assert "loop" in kernel_names()


@pytest.mark.parametrize("name", ["flsh", "", "legacy:", "legacy:flsh", "__init__", "../loop"])
def test_unknown_names_are_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownBackend) as caught:
        load(name)
    message = str(caught.value)
    assert repr(name) in message
    assert all(known in message for known in (*kernel_names(), "legacy:"))


_IMPORTS = """
import sys, torch
class Log:
    def find_spec(self, name, path=None, target=None):
        asked.add(name.partition(".")[0])
asked, before = set(), {name.partition(".")[0] for name in sys.modules}
sys.meta_path.insert(0, Log())
import attn_fuzz.backends.registry
attn_fuzz.backends.registry.kernel_names()
print(*sorted(asked - before - sys.stdlib_module_names))
print(*sorted(name for name in sys.modules if name.startswith("attn_fuzz.backends.kernels.")))
"""


@pytest.mark.slow
def test_the_registry_imports_no_kernel() -> None:
    """Not even an attempt: a package that is installed and broken must not matter to the other backends."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{_IMPORTS}"],
        capture_output=True,
        text=True,
        check=True,
    )
    asked, adapters = done.stdout.split("\n")[:2]
    assert set(asked.split()) <= {"attn_fuzz"}
    assert adapters == ""


# Availability.


@pytest.mark.parametrize("device", DEVICES)
@every_kernel
def test_unavailable_kernels_say_why_in_one_line(name: str, device: str) -> None:
    reason = load(name).kernel.why_unavailable(device)
    if reason is not None:
        assert reason.strip() == reason != ""
        assert "\n" not in reason


@every_kernel
def test_availability_follows_the_declared_devices(name: str) -> None:
    kernel = load(name).kernel
    for device in set(DEVICES) - set(kernel.capabilities.devices):
        reason = kernel.why_unavailable(device)
        assert reason is not None
        assert " and ".join(kernel.capabilities.devices) in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@every_kernel
def test_nothing_runs_on_cuda_without_cuda(name: str) -> None:
    assert load(name).kernel.why_unavailable("cuda") is not None


# Refusals.

KERNEL = Case(level="kernel", lengths=(3, 2))
REFUSALS: dict[str, tuple[Capabilities, Case, str]] = {
    "device": (Capabilities(devices=("cuda",)), KERNEL, "device cpu"),
    "dtype": (Capabilities(dtypes=("bf16", "fp16")), KERNEL, "dtype fp32"),
    "head_dim too large": (Capabilities(max_head_dim=8), KERNEL, "head_dim 16, above 8"),
    "head_dim multiple": (
        Capabilities(head_dim_multiple=8),
        KERNEL.replace(head_dim=20),
        "head_dim 20, no multiple of 8",
    ),
    "gqa": (Capabilities(gqa=False), KERNEL.replace(heads=2), "fewer kv_heads than heads"),
    "causal": (Capabilities(causal=False), KERNEL, "causal attention"),
    "noncausal": (Capabilities(noncausal=False), KERNEL.replace(causal=False), "non-causal attention"),
    "top-left": (
        Capabilities(causal_needs_equal_lengths=True),
        KERNEL.replace(key_lengths=(3, 4)),
        "different numbers of queries and keys",
    ),
    "window": (Capabilities(window=False), KERNEL.replace(window=(2, -1)), "a sliding window"),
    "right window": (
        Capabilities(window=False),
        KERNEL.replace(causal=False, window=(-1, 1)),
        "a sliding window",
    ),
    "softcap": (Capabilities(softcap=False), KERNEL.replace(softcap=2.0), "softcap"),
    "empty documents": (Capabilities(empty_documents=False), KERNEL.replace(lengths=(3, 0)), "empty documents"),
    "no keys": (
        Capabilities(queries_without_keys=False),
        KERNEL.replace(causal=False, key_lengths=(3, 0)),
        "queries without a key",
    ),
    "more queries than keys": (
        Capabilities(queries_without_keys=False),
        KERNEL.replace(key_lengths=(3, 1)),
        "queries without a key",
    ),
    "more queries than keys, window closed on the right": (
        Capabilities(queries_without_keys=False),
        KERNEL.replace(key_lengths=(3, 1), causal=False, window=(1, 0)),
        "queries without a key",
    ),
    "no queries": (
        Capabilities(keys_without_queries=False),
        KERNEL.replace(lengths=(3, 0), key_lengths=(3, 1)),
        "documents with keys and no queries",
    ),
    "memory": (Capabilities(memories=("contiguous",)), KERNEL.replace(memory="sliced"), "memory layout sliced"),
}


BLIND = KERNEL.replace(lengths=(5,), key_lengths=(2,), causal=False, window=(1, 1))
"""Query 0 stands at key -3 and sees to key -2."""


def pairs_of(case: Case) -> list[tuple[int, int]]:
    return list(zip(case.packed_lengths, case.packed_key_lengths, strict=True))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_declared_is_refused_by_name(name: str) -> None:
    capabilities, case, reason = REFUSALS[name]
    refusal = capabilities.refusal(case, "cpu", pairs_of(case))
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize("name", REFUSALS)
def test_full_capabilities_refuse_nothing(name: str) -> None:
    _, case, _ = REFUSALS[name]
    assert Capabilities().refusal(case, "cpu", pairs_of(case)) is None


def test_blind_rows_of_a_two_sided_window_are_refused() -> None:
    assert Capabilities(queries_without_keys=False).refusal(BLIND, "cpu", pairs_of(BLIND)) == "queries without a key"


ALLOWED_BY_NARROW: dict[str, tuple[Capabilities, Case]] = {
    "exact head_dim": (Capabilities(max_head_dim=16, head_dim_multiple=16), KERNEL),
    "equal heads": (Capabilities(gqa=False), KERNEL.replace(heads=2, kv_heads=2)),
    "top-left with equal lengths": (Capabilities(causal_needs_equal_lengths=True), KERNEL),
    "top-left, non-causal": (
        Capabilities(causal_needs_equal_lengths=True),
        KERNEL.replace(causal=False, key_lengths=(3, 4)),
    ),
    "every row has a key": (Capabilities(queries_without_keys=False), KERNEL.replace(key_lengths=(5, 2))),
    "a window that reaches back to the first key": (
        Capabilities(queries_without_keys=False),
        BLIND.replace(window=(0, 3)),
    ),
    "non-causal rows see all keys": (
        Capabilities(queries_without_keys=False),
        KERNEL.replace(causal=False, key_lengths=(1, 2)),
    ),
    "empty documents have no blind row": (
        Capabilities(queries_without_keys=False, keys_without_queries=False),
        KERNEL.replace(lengths=(3, 0)),
    ),
}


@pytest.mark.parametrize("name", ALLOWED_BY_NARROW)
def test_what_is_declared_is_not_refused(name: str) -> None:
    capabilities, case = ALLOWED_BY_NARROW[name]
    assert capabilities.refusal(case, "cpu", pairs_of(case)) is None


def test_layers_are_asked_about_every_micro_sequence() -> None:
    """A cut inside a document gives it more keys than queries, which a whole document has not."""

    class TopLeft(type(load("loop").kernel)):  # type: ignore[misc]
        capabilities = Capabilities(causal_needs_equal_lengths=True)

    backend = load("loop")
    narrowed = type(backend)("top_left", TopLeft())
    assert narrowed.refusal(Case(lengths=(4, 4), cuts=(4,)), "cpu") is None
    assert narrowed.refusal(Case(lengths=(4, 4), cuts=(5,)), "cpu") is not None


def test_refusals_are_typed_and_name_the_backend() -> None:
    with pytest.raises(UnsupportedCase, match=r"^sdpa_dense does not take softcap$"):
        require_support(load("sdpa_dense"), KERNEL.replace(softcap=2.0), CPU)


def test_options_fold_causality_into_the_window() -> None:
    causal = AttentionOptions.of(KERNEL.replace(window=(3, -1), scale=0.5, softcap=2.0))
    assert (causal.scale, causal.softcap, causal.effective_window) == (0.5, 2.0, (3, 0))
    assert AttentionOptions.of(KERNEL.replace(causal=False, window=(3, 1))).effective_window == (3, 1)


# Reject or correct.

HARD_KERNEL_CASES = {
    "single token": Case(level="kernel"),
    "empty documents": Case(level="kernel", lengths=(0, 3, 0, 0, 2, 0), dtype="bf16"),
    "more keys than queries": Case(level="kernel", lengths=(1, 3, 17), key_lengths=(4, 3, 33), dtype="fp16"),
    "more queries than keys": Case(level="kernel", lengths=(5, 3), key_lengths=(2, 3)),
    "more queries than keys, non-causal": Case(level="kernel", lengths=(5, 3), key_lengths=(2, 3), causal=False),
    "queries without keys": Case(level="kernel", lengths=(2, 3, 1), key_lengths=(2, 0, 1), dtype="bf16"),
    "keys without queries": Case(level="kernel", lengths=(2, 0, 1), key_lengths=(2, 3, 1), dtype="bf16"),
    "grouped heads": Case(level="kernel", lengths=(4, 7), heads=6, kv_heads=2, head_dim=24, dtype="bf16"),
    "one shared head": Case(level="kernel", lengths=(4, 7), heads=4, kv_heads=1, head_dim=5),
    "window": Case(level="kernel", lengths=(9, 1, 6), key_lengths=(9, 8, 11), window=(2, -1), dtype="bf16"),
    "own key only": Case(level="kernel", lengths=(5, 3), window=(0, -1)),
    "two-sided window": Case(level="kernel", lengths=(9, 4), key_lengths=(12, 4), causal=False, window=(2, 1)),
    "right window only": Case(level="kernel", lengths=(9, 4), causal=False, window=(-1, 2)),
    "blind rows in a two-sided window": BLIND,
    "softcap": Case(level="kernel", lengths=(6, 5), softcap=3.0, values="large", scale=1.0),
    "softcap, window, groups": Case(
        level="kernel", lengths=(6, 5), key_lengths=(9, 5), heads=2, softcap=20.0, window=(3, -1), dtype="bf16"
    ),
    "cancellation": Case(level="kernel", lengths=(16, 5), values="offset", dtype="bf16"),
    "tiny values": Case(level="kernel", lengths=(16, 5), values="tiny", dtype="fp16"),
    "non-causal": Case(level="kernel", lengths=(7, 1, 4), causal=False, dtype="fp16"),
    "widest head": Case(level="kernel", lengths=(3, 5), head_dim=320),
    **{
        f"memory {memory}": Case(level="kernel", lengths=(3, 5), key_lengths=(4, 6), heads=4, kv_heads=2, memory=memory)
        for memory in MEMORIES
    },
}

HARD_LAYER_CASES = {
    "the issue": Case(lengths=(4, 1, 10), cuts=(7,)),
    "cut into single tokens": Case(lengths=(3, 2), cuts=(1, 2, 3, 4), dtype="bf16"),
    "empty documents": Case(lengths=(0, 4, 0, 3, 0), cuts=(2, 4), dtype="fp16"),
    "padding and spare rows": Case(lengths=(4, 3), padding=3, cuts=(5,), capacity=4),
    "grouped heads": Case(lengths=(6, 5), cuts=(3, 8), heads=4, kv_heads=2, dtype="bf16"),
    "window": Case(lengths=(9, 4), cuts=(4, 7), window=(2, -1)),
    "softcap": Case(lengths=(5, 6), cuts=(7,), softcap=3.0),
    "non-causal": Case(lengths=(5, 6), cuts=(5,), causal=False),
    "everything": Case(
        lengths=(5, 0, 9),
        cuts=(3, 10),
        heads=4,
        kv_heads=2,
        query_norm="rms",
        key_norm="rms",
        value_norm="rms",
        shared_key_value=True,
        rotary="proportional",
        dtype="bf16",
    ),
    **{
        f"memory {memory}": Case(lengths=(4, 5), cuts=(6,), heads=2, kv_heads=2, rotary="default", memory=memory)
        for memory in MEMORIES
        if memory != "broadcast"
    },
}


def assert_rejected_or_correct(name: str, case: Case) -> None:
    backend = load(name)
    if backend.refusal(case, "cpu") is not None:
        with pytest.raises(UnsupportedCase):
            examine(case, backend, CPU)
    else:
        assert examine(case, backend, CPU).symptoms == ()


@pytest.mark.slow
@pytest.mark.parametrize("case", HARD_KERNEL_CASES.values(), ids=HARD_KERNEL_CASES)
@pytest.mark.parametrize("name", EACH_KERNEL)
def test_kernel_cases_are_rejected_or_correct(name: str, case: Case) -> None:
    assert_rejected_or_correct(name, case)


@pytest.mark.parametrize("case", HARD_LAYER_CASES.values(), ids=HARD_LAYER_CASES)
@pytest.mark.parametrize("name", EACH_KERNEL)
def test_layer_cases_are_rejected_or_correct(name: str, case: Case) -> None:
    assert_rejected_or_correct(name, case)


@pytest.mark.parametrize("name", ["loop", "backup"])
def test_the_fallbacks_refuse_no_hard_case(name: str) -> None:
    cases = [*HARD_KERNEL_CASES.values(), *HARD_LAYER_CASES.values()]
    assert [load(name).refusal(case, "cpu") for case in cases] == [None] * len(cases)


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_every_cpu_kernel_takes_the_issue(name: str) -> None:
    case, causal = HARD_LAYER_CASES["the issue"], load(name).kernel.capabilities_on("cpu").causal
    assert load(name).refusal(case, "cpu") == (None if causal else "causal attention")
