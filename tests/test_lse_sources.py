"""Calls as people write them that give the LSE too, run over stand-ins of the packages: what scripts have of them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.loop import Loop, attend
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.findings.scripts.kernel import kernel_source
from attn_fuzz.reference.case import Case

LENGTHS, KEYS = (3, 2), (5, 4)


def answered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, side: int) -> tuple[torch.Tensor, ...]:
    metadata = VarlenMetadata(lengths_q=LENGTHS, lengths_k=KEYS, device=q.device)
    return attend(Loop(), q, k, v, metadata, AttentionOptions(scale=scale, causal=True, window=(side, -1)))


def flash(q: Any, k: Any, v: Any, *sums: Any, return_attn_probs: bool = False, **options: Any) -> Any:
    """FlashAttention 2: (out, LSE, probabilities), or out."""
    assert len(sums) == 4
    assert options["window_size"] == (2, 0)
    found = answered(q, k, v, options["softmax_scale"], options["window_size"][0])
    return (*found, None) if return_attn_probs else found[0]


def flash4(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
    """FlashAttention 4: (out, LSE) in any case; without ``return_lse`` and gradients the LSE is None."""
    assert options["window_size"] == (2, None)
    out, lse = answered(q, k, v, options["softmax_scale"], options["window_size"][0])
    return out, lse if return_lse else None


class AuxRequest(NamedTuple):
    """As torch's."""

    lse: bool = False


def varlen(q: Any, k: Any, v: Any, *sums: Any, scale: float, window_size: Any, return_aux: Any = None) -> Any:
    """torch's: out, or (out, LSE) on request."""
    assert len(sums) == 4
    assert window_size == (2, 0)
    found = answered(q, k, v, scale, window_size[0])
    return found if return_aux is not None and return_aux.lse else found[0]


MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "flash": ("flash_attn", {"flash_attn_varlen_func": flash}),
    "flash_deterministic": ("flash_attn", {"flash_attn_varlen_func": flash}),
    "flash4": ("flash_attn.cute", {"flash_attn_varlen_func": flash4}),
    "torch_varlen": ("torch.nn.attention.varlen", {"varlen_attn": varlen, "AuxRequest": AuxRequest}),
}


def installed(monkeypatch: pytest.MonkeyPatch, name: str, functions: dict[str, Any]) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    if name.startswith("flash_attn."):
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", sorted(MODULES))
@pytest.mark.parametrize("with_lse", [True, False])
def test_a_call_as_people_write_it_gives_what_a_script_asks_for(
    monkeypatch: pytest.MonkeyPatch, name: str, with_lse: bool
) -> None:
    installed(monkeypatch, *MODULES[name])
    case = Case(level="kernel", lengths=LENGTHS, key_lengths=KEYS, heads=4, head_dim=16, lse_gradient=with_lse)
    # A limit's script is of the kernel with its limits set aside.
    for backend in (registry.load(name), registry.load(f"unrestricted:{name}")):
        source = kernel_source(backend, case, every=False)
        assert "attn_fuzz" not in source
        there: dict[str, Any] = {"SCALE": 0.25, "CAUSAL": True, "WINDOW": (2, -1), "SOFTCAP": 0.0, "torch": torch}
        exec(source, there)
        torch.manual_seed(0)
        q, k, v = (torch.randn(sum(rows), heads, 16) for rows, heads in ((LENGTHS, 4), (KEYS, 2), (KEYS, 2)))
        sums = [torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32) for lengths in (LENGTHS, KEYS)]
        got = there["kernel"](q, k, v, *sums, max(LENGTHS), max(KEYS))
        expected = answered(q, k, v, 0.25, 2)
        if with_lse:
            assert len(got) == 2
            assert all(torch.equal(mine, wanted) for mine, wanted in zip(got, expected, strict=True))
        else:
            assert torch.equal(got, expected[0])
