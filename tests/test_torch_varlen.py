"""The adapter of torch's varlen_attn, over modules of the releases: by what their functions take, not by version."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, UnsupportedCase
from attn_fuzz.backends.kernels import torch_varlen, torch_varlen_inference
from attn_fuzz.backends.loop import Loop, attend
from attn_fuzz.backends.metadata import VarlenMetadata

OPTIONS = AttentionOptions(scale=0.25, causal=True, window=(3, -1))
METADATA = VarlenMetadata(lengths_q=(4, 3), lengths_k=(6, 1), device=torch.device("cpu"))


class AuxRequest(NamedTuple):
    """As torch's."""

    lse: bool = False


def computed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: tuple[Any, ...], **told: Any) -> Any:
    """What the function of any release gives: the LSE is ``[heads, tokens]``, +inf for rows that see no key."""
    cu_seq_q, cu_seq_k, max_q, max_k = sums
    lengths = [tuple(x.diff().tolist()) for x in (cu_seq_q, cu_seq_k)]
    assert (max_q, max_k) == (max(lengths[0]), max(lengths[1]))
    metadata = VarlenMetadata(lengths_q=lengths[0], lengths_k=lengths[1], device=q.device)
    left, right = told["window_size"]
    options = AttentionOptions(scale=told["scale"], causal=False, window=(left, right))
    out, lse = attend(Loop(), q, k, v, metadata, options)
    lse = torch.where(lse == -math.inf, math.inf, lse)
    return (out, lse) if told["return_aux"] is not None and told["return_aux"].lse else out


def of_2_11(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
    *, return_aux: Any = None, scale: Any = None, window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    """Grouped heads are taken as they are."""
    sums = cu_seq_q, cu_seq_k, max_q, max_k
    return computed(query, key, value, sums, return_aux=return_aux, scale=scale, window_size=window_size)


def of_2_12(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
    *, return_aux: Any = None, scale: Any = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    seqused_k: Any = None, block_table: Any = None, num_splits: Any = None,
) -> Any:  # fmt: skip
    """Grouped heads have to be asked for; what has no backward is refused by the function itself."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("heads differ")
    if seqused_k is not None or block_table is not None:
        raise RuntimeError("no backward")
    assert num_splits is None
    return of_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        return_aux=return_aux, scale=scale, window_size=window_size,
    )  # fmt: skip


def serving(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
    *, return_aux: Any = None, scale: Any = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    seqused_k: Any = None, block_table: Any = None, num_splits: Any = None,
) -> Any:  # fmt: skip
    """Of 2.12 and later without autograd: keys behind ``seqused_k`` of a slot are none."""
    assert not torch.is_grad_enabled()
    assert enable_gqa
    assert num_splits == 1
    assert block_table is None
    if seqused_k is not None:
        starts = cu_seq_k.tolist()
        own = [torch.arange(at, at + used) for at, used in zip(starts, seqused_k.tolist(), strict=False)]
        key, value = (x[torch.cat(own)] for x in (key, value))
        cu_seq_k = torch.tensor([0, *seqused_k.tolist()]).cumsum(0)
    sums = cu_seq_q, cu_seq_k, max_q, max_k
    return computed(query, key, value, sums, return_aux=return_aux, scale=scale, window_size=window_size)


def varlen_attn_out(out: torch.Tensor, *tensors: Any, **told: Any) -> Any:
    """The same into memory that it is given."""
    written, lse = serving(*tensors, **told)
    return out.copy_(written), lse


varlen_attn_out.__signature__ = inspect.signature(serving)  # type: ignore[attr-defined]


@pytest.fixture(params=[of_2_11, of_2_12])
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    module: Any = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn, module.AuxRequest = request.param, AuxRequest
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    torch_varlen._options.cache_clear()
    yield request.param
    torch_varlen._options.cache_clear()


def called(kv_heads: int) -> tuple[Attended, Attended, list[torch.Tensor]]:
    """(what the adapter gives, what the loop gives, inputs)."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(rows, heads, 16, requires_grad=True) for rows, heads in ((7, 4), (7, kv_heads), (7, kv_heads))
    ]
    got = torch_varlen.KERNEL.attend(*inputs, METADATA, OPTIONS)
    out, lse = attend(Loop(), *inputs, METADATA, OPTIONS)
    return got, Attended(out, lse, "loop"), inputs


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_release_is_asked_as_it_wants_to_be(release: Callable[..., Any], kv_heads: int) -> None:
    got, expected, inputs = called(kv_heads)
    torch.testing.assert_close(got.out, expected.out)
    for mine, wanted in zip(
        torch.autograd.grad(got.out.square().sum(), inputs),
        torch.autograd.grad(expected.out.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted)


def test_the_lse_comes_with_it_as_the_adapter_declares_it(release: Callable[..., Any]) -> None:
    got, expected, _ = called(2)
    assert got.lse is not None
    assert expected.lse is not None
    assert got.lse.shape == (4, 7)
    # Two of three queries stand before the only key of the second document.
    blind = expected.lse == -math.inf
    assert blind.sum() == 8
    assert (got.lse[blind] == torch_varlen.KERNEL.capabilities.lse_of_blind_rows).all()
    torch.testing.assert_close(got.lse[~blind], expected.lse[~blind])


@pytest.fixture
def of_serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module: Any = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn, module.AuxRequest = serving, AuxRequest
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    torch_varlen_inference._function.cache_clear()
    yield module
    torch_varlen_inference._function.cache_clear()


@pytest.mark.parametrize("given", [True, False], ids=["out", "plain"])
def test_serving_is_told_of_slots_and_asked_for_one_split(given: bool, of_serving: Any) -> None:
    if given:
        of_serving.varlen_attn_out = varlen_attn_out
    torch.manual_seed(0)
    inputs = [torch.randn(rows, heads, 16, requires_grad=True) for rows, heads in ((7, 4), (11, 2), (11, 2))]
    gapped = VarlenMetadata(lengths_q=(4, 3), lengths_k=(6, 1), device=torch.device("cpu"), gaps=(0, 2))
    got = torch_varlen_inference.KERNEL.attend(*inputs, gapped, OPTIONS)
    out, lse = attend(Loop(), *inputs, gapped, OPTIONS)
    torch.testing.assert_close(got.out, out)
    assert got.lse is not None
    assert not got.lse.requires_grad
    seen = lse.isfinite()
    torch.testing.assert_close(got.lse[seen], lse[seen])
    # Gradients are the reference's; rows between documents are nobody's.
    own = {7: slice(None), 11: [*range(6), 8]}
    pairs = (torch.autograd.grad(x.square().sum(), inputs) for x in (got.out, out))
    for mine, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(mine[own[len(mine)]], wanted[own[len(mine)]])


def test_a_release_without_those_arguments_does_not_serve(release: Callable[..., Any]) -> None:
    torch_varlen_inference._function.cache_clear()
    assert (torch_varlen_inference._function() is None) == (release is of_2_11)
    torch_varlen_inference._function.cache_clear()


@pytest.mark.parametrize("adapter", [torch_varlen, torch_varlen_inference])
def test_what_cudnn_does_not_take_is_a_refusal(adapter: Any, of_serving: Any) -> None:
    def refuses(*tensors: Any, seqused_k: Any = None, num_splits: Any = None, **told: Any) -> Any:
        raise RuntimeError("cuDNN backend does not support window attention. Please use Flash Attention backend.")

    of_serving.varlen_attn = refuses
    torch_varlen._options.cache_clear()
    inputs = [torch.randn(7, 2, 16) for _ in range(3)]
    with pytest.raises(UnsupportedCase, match="torch has chosen cuDNN here: cuDNN backend does not support window"):
        adapter.KERNEL.attend(*inputs, METADATA, OPTIONS)
    torch_varlen._options.cache_clear()
