"""torch's varlen attention as serving calls it (torch 2.12 and later): a forward alone, told how long each slot is."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from attn_fuzz.backends.forward_only import forward_only
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.torch_varlen import TorchVarlen, refusals
from attn_fuzz.backends.metadata import VarlenMetadata


@functools.cache
def _function() -> Callable[..., Any] | None:
    """The function that is given its output, or the plain one where there is none; None where neither has these
    arguments."""
    module = importlib.import_module("torch.nn.attention.varlen")
    function = getattr(module, "varlen_attn_out", module.varlen_attn)
    return function if {"seqused_k", "num_splits"} <= set(inspect.signature(function).parameters) else None


class TorchVarlenInference(TorchVarlen):
    """``varlen_attn_out`` with ``seqused_k`` and ``num_splits=1``, which promises the same bits in any company."""

    name = "torch_varlen_inference"
    paths = frozenset({"varlen_attn inference"})
    capabilities = dataclasses.replace(
        TorchVarlen.capabilities, backward=False, batch_invariant=True, gaps=("k",), graphs=None, traceable=False
    )

    call_source = ""
    lse_source = ""

    def why_unavailable(self, device: str) -> str | None:
        if reason := super().why_unavailable(device):
            return reason
        return None if _function() is not None else "this torch's varlen_attn has no seqused_k and num_splits"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        return forward_only(_attend, q, k, v, metadata, options)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
) -> Attended:
    from torch.nn.attention.varlen import AuxRequest

    function = _function()
    assert function is not None
    m = metadata
    # Given to the function that asks for it, which has to write every row of a document.
    given = (torch.empty_like(q),) if function.__name__ == "varlen_attn_out" else ()
    with refusals():
        out, lse = function(
            *given,
            q,
            k,
            v,
            m.cu_seqlens_q,
            m.cu_seqlens_k,
            m.max_seqlen_q,
            m.max_seqlen_k,
            return_aux=AuxRequest(lse=True),
            scale=options.scale,
            window_size=options.effective_window,
            enable_gqa=True,
            seqused_k=m.seqused_k,
            num_splits=1,
        )
    return Attended(out, lse, "varlen_attn inference")


KERNEL = TorchVarlenInference()
"""The adapter; ``block_table`` is not given: a case has no pages."""
