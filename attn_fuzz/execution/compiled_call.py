"""A kernel call inside what ``torch.compile`` makes of it: around the call, or as part of a module."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from attn_fuzz.backends.kernel import Attended
from attn_fuzz.execution.process import device_failed, first_line, lacks_memory
from attn_fuzz.execution.runner import KernelCall

Passes = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

TRACED: Final = "aot_eager"
"""torch's compiler without code of its own: traced, differentiated, and run by the same operators."""

GENERATED: Final = "inductor"
"""With code of its own, for which Python code of a kernel may be computed otherwise."""


class NotTraceable(Exception):
    """torch's compiler does not take a call; the message is one sentence."""


def generates(device: torch.device) -> bool:
    """Whether code of its own takes seconds to compile: Triton's for a GPU; a CPU's C++ takes half a minute."""
    from torch.utils._triton import has_triton

    return device.type == "cuda" and bool(has_triton())


class _Module(torch.nn.Module):
    """Attention between two exact operations, as a model has it between others."""

    def __init__(self, attention: Passes) -> None:
        super().__init__()
        self._attention = attention

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = self._attention(*(x.neg().neg() for x in (q, k, v)))
        return out.neg().neg(), lse


class CompiledCall(KernelCall):
    """A call whose forward is compiled, and with it what autograd takes back.

    What was compiled before is forgotten: after so many recompilations torch would run calls as they are.
    """

    module = False
    """Whether it is part of a module."""
    compiler: str | None = TRACED
    """None: nothing is compiled."""

    def forward(self) -> None:
        """Raises NotTraceable where torch's compiler does not take it, else what the backend does."""
        path = ""

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            nonlocal path
            attended = self.backend.kernel.attend(q, k, v, self.metadata, self.tensors.options)
            path = attended.path
            return attended.out, attended.lse

        torch._dynamo.reset()
        called: Any = _Module(attention) if self.module else attention
        if self.compiler is not None:
            called = torch.compile(called, backend=self.compiler)
        with torch.set_grad_enabled(bool(self.asked.gradients)), _compiling():
            out, lse = called(*self.leaves.values())
        self.attended = Attended(out, lse, path)

    def backward(self) -> None:
        """Raises the same: a backward is compiled when it is first asked for."""
        with _compiling():
            super().backward()


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """What torch's compiler raises is that it does not take a call; what it warns of is what it runs as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            if lacks_memory(error) or device_failed(error) or not _of_compiler(error):
                raise
            raise NotTraceable(first_line(error)) from error


def _of_compiler(error: BaseException) -> bool:
    """Whether torch's compiler raised it, and not what it ran."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx"))
