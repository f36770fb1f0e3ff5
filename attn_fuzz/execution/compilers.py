"""What kernels' compilers are told in every process that runs cases: keep what was compiled, and never give up.

Triton, torch's Inductor and the CuTe DSL keep what they compile in folders of their own (``~/.triton/cache``, a folder
for the user among temporary files); processes find one another's work there, and so do later campaigns. What they, or
JAX, keep only when asked is asked for here. A variable that is set already stays.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any, Final

_ENOUGH: Final = 4096
"""Configurations and layouts of one function, which torch's compiler would give up on after eight."""

_LIMITS: Final = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")


def keep_compiled() -> None:
    """Has compilers that are loaded from now on keep what they compile, and which of Triton's variants was fastest."""
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    if multiprocessing.parent_process() is not None:
        # One of many that compile at a time, mostly a kernel each: a pool of compilers beside every one holds all up.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(base) / "attn-fuzz" / "jax")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def compile_without_end() -> None:
    """Lets torch's compiler, where it is loaded, compile one function for as many configurations as there are."""
    dynamo = sys.modules.get("torch._dynamo")
    config: Any = getattr(dynamo, "config", None)
    for name in _LIMITS:
        if isinstance(limit := getattr(config, name, None), int):
            setattr(config, name, max(limit, _ENOUGH))


class _Variants:
    """Counts the kernels that Triton tells of: each is new to this process, compiled in it or found on disk."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, **facts: Any) -> None:
        """Called by Triton."""
        self.count += 1


_VARIANTS: Final = _Variants()


def triton_variants() -> int:
    """Kernels that have been new to this process since this was first asked with Triton loaded; 0 without it.

    One that somebody else listens to says nothing of them.
    """
    runtime: Any = getattr(sys.modules.get("triton.knobs"), "runtime", None)
    if getattr(runtime, "jit_post_compile_hook", _VARIANTS) is None:
        runtime.jit_post_compile_hook = _VARIANTS.note
    return _VARIANTS.count
