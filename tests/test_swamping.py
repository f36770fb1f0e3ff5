"""Swamping: silent on right kernels however they split and round, and it sees sums over keys in the storage dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.loop import Call, Document, Loop, attend
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.oracle.checks.swamping import sums_not_swamped
from attn_fuzz.oracle.known_answer.swamping import FEWEST_KEYS, LARGE, REFERENCE_CHANNEL, Swamping
from attn_fuzz.oracle.symptoms import NotExact, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

CPU = torch.device("cpu")
CASE = Case(level="kernel", lengths=(2, 129, 1), key_lengths=(2, 129, 300), heads=4, kv_heads=2, dtype="bf16")
CPU_BACKENDS = (
    "loop",
    "backup",
    "sdpa_dense",
    "sdpa_dense_flash",
    "sdpa_dense_math",
    "sdpa_nested",
    "sdpa_nested_math",
)


def symptoms(backend: Backend, case: Case) -> list[Symptom]:
    return list(sums_not_swamped(Trial(case, backend, CPU)))


class OfLoop(Kernel):
    """A loop as a kernel."""

    name = "of_loop"
    capabilities = Capabilities()

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        out, lse = attend(self.loop, q, k, v, metadata, options)
        return Attended(out, lse, "of_loop")


class Tiled(Loop):
    """Sums over tiles of keys, each stored by a function.

    Args:
        tile: keys of a tile.
        stored: what becomes of a running sum.
        normalised: whether P is normalised before it is stored, within each tile as splits of the keys do it, and
            not after.
    """

    def __init__(self, tile: int, stored: Callable[[torch.Tensor], torch.Tensor], *, normalised: bool = False) -> None:
        self.tile, self.stored, self.normalised = tile, stored, normalised

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(document.q)
        for p, rows in zip(probabilities.split(self.tile, -1), document.v.split(self.tile, 1), strict=True):
            share = p.sum(-1, keepdim=True) if self.normalised else p.amax(-1, keepdim=True)
            weights = (p / torch.where(share == 0, 1.0, share)).to(call.dtype).float()
            total = self.stored(total + share * (weights @ rows))
        return total

    def dq(self, call: Call, document: Document, ds: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(document.q)
        for part, rows in zip(ds.split(self.tile, -1), document.k.split(self.tile, 1), strict=True):
            total = self.stored(total + part @ rows)
        return call.options.scale * total


@pytest.mark.slow
@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_silent_on_the_backends(name: str, dtype: str) -> None:
    backend = registry.load(name)
    asked = 0
    for causal in (True, False):
        for heads, kv_heads, head_dim in ((1, 1, 16), (4, 2, 64), (2, 1, 2)):
            shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "causal": causal, "dtype": dtype}
            for lengths, keys in (
                ((129, 256), None),
                ((300, 3), (300, 3)),
                ((1, 2), (1025, 97)),
                ((5,), (2049,)),
                ((1, 2), (260, 257)),
                ((33, 2, 47), None),
            ):
                case = Case(level="kernel", lengths=lengths, key_lengths=keys, **shape)  # type: ignore[arg-type]
                if backend.refusal(case, "cpu") is None:
                    assert symptoms(backend, case) == []
                    asked += 1
    assert asked


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("tile", [16, 48, 64, 128])
@pytest.mark.parametrize("normalised", [True, False])
def test_silent_on_float32_sums_over_tiles(dtype: str, tile: int, normalised: bool) -> None:
    backend = Backend("tiled", OfLoop(Tiled(tile, lambda x: x, normalised=normalised)))
    for keys in (32, 39, 96, 129, 300, 1025, 8193):
        case = CASE.replace(key_lengths=(2, keys, 300), lengths=(2, 3, 1), dtype=dtype)
        assert symptoms(backend, case) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("tile", "keys"), [(16, 96), (32, 96), (64, 96), (64, 1025), (128, 256), (128, 8193)])
def test_sums_in_the_dtype_are_seen(dtype: str, tile: int, keys: int) -> None:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    backend = Backend("tiled", OfLoop(Tiled(tile, lambda x: x.to(half).float())))
    for seed in range(4):
        case = Case(level="kernel", lengths=(1,), key_lengths=(keys,), head_dim=8, dtype=dtype, seed=seed)
        found = symptoms(backend, case)
        assert [(type(symptom), symptom.tensor) for symptom in found] == [(NotExact, "out"), (NotExact, "dq")]


@pytest.mark.parametrize(("fault", "tensor"), [("X37", "out"), ("X38", "dq")])
def test_planted_sums_are_named(fault: str, tensor: str) -> None:
    (symptom,) = symptoms(registry.load(f"fault:{fault}"), CASE)
    assert (type(symptom), symptom.tensor, symptom.check) == (NotExact, tensor, "swamping")
    assert "document 1, row 128, head 0" in symptom.message
    assert symptom.element is not None
    assert symptom.element.place.document == 1
    assert symptom.element.got != symptom.element.expected


@pytest.mark.parametrize("keys", [32, 33, 97, 130, 1023])
def test_large_values_cancel(keys: int) -> None:
    """Per channel, and with K's signs in either half; what is left is about a quarter of the middle."""
    case = CASE.replace(lengths=(1,), key_lengths=(keys,), dtype="fp16")
    probe = Swamping.of(case, CPU, Profile())
    assert probe is not None
    large = int(probe.large[0])
    k, v = probe.inputs.k.double(), probe.inputs.v.double()
    assert v[..., 0].sum() == 0
    assert not v[..., REFERENCE_CHANNEL].sum().any()
    for x in (v[..., 1:], k * v[..., :1]):
        assert (x == LARGE["fp16"]).sum(0).eq(large).all()
        assert (x == -LARGE["fp16"]).sum(0).eq(large).all()
    nothing = {name: torch.zeros_like(probe.inputs.q) for name in ("out", "dq")}
    for compared in probe.judge(nothing):
        small = compared.expected[0, :, REFERENCE_CHANNEL + 1 :] / probe.unit(compared.tensor)[0]
        assert (small - (keys - 2 * large) / 4).abs().max() < 4 * keys**0.5


@pytest.mark.parametrize(
    "case",
    [
        CASE.replace(dtype="fp32"),
        CASE.replace(head_dim=1),
        CASE.replace(key_lengths=(2, FEWEST_KEYS - 1, 5)),
        CASE.replace(lengths=(2, 0, 0)),
        CASE.replace(window=(100, -1)),
        CASE.replace(scale=0.0),
        Case(lengths=(129,), dtype="bf16"),
    ],
)
def test_nothing_is_asked_where_nothing_can_be_seen(case: Case) -> None:
    assert Swamping.of(case, CPU, Profile()) is None


def test_a_window_as_wide_as_the_document_is_none() -> None:
    probe = Swamping.of(CASE.replace(window=(128, -1)), CPU, Profile())
    assert probe is not None
    assert probe.judged.tolist() == [False, True, False]
