"""Kernel calls inside what ``torch.compile`` makes of them: around the call, or as part of a module."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.fx.experimental import _config as fx_config

from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.execution.calls import Call
from attn_fuzz.execution.process import device_failed, first_line, in_words, lacks_memory

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, VarlenMetadata, AttentionOptions],
    tuple[torch.Tensor, torch.Tensor | None],
]

TRACED: Final = "aot_eager"
"""torch's compiler without code of its own: traced, differentiated, and run by the same operators."""

GENERATED: Final = "inductor"
"""With code of its own, for which Python code of a kernel may be computed otherwise."""


_SIZES: Final[Any] = fx_config
"""Whose types do not say that it is patched as all of torch's configurations are."""


class NotTraceable(Exception):
    """torch's compiler does not take a call; the message is one sentence."""


class NotCompiledYet(Exception):
    """A call that nothing that is compiled so far would serve, where no more is to be compiled."""


def generates(device: torch.device) -> bool:
    """Whether code of its own takes seconds to compile: Triton's for a GPU; a CPU's C++ takes half a minute."""
    from torch.utils._triton import has_triton

    return device.type == "cuda" and bool(has_triton())


class _Module(torch.nn.Module):
    """Attention between two exact operations, as a model has it between others."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = attention

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = self._attention(q.neg().neg(), k.neg().neg(), v.neg().neg(), metadata, options)
        return out.neg().neg(), lse


class Compiled:
    """What torch's compiler makes of a backend's calls, of all that are run in it: other layouts may come any time.

    What was compiled before is forgotten: after so many recompilations torch would run calls as they are.

    Args:
        backend: whose calls.
        module: whether they are part of a module.
        compiler: ``TRACED`` or ``GENERATED``; None: nothing is compiled.
        any_sizes: whether the first call is compiled for any sizes, equal or not; else, as torch does by itself, what
            comes after it is, as far as its sizes are others.
    """

    def __init__(self, backend: Backend, *, module: bool, compiler: str | None, any_sizes: bool = False) -> None:
        self._kernel, self._path, self._any_sizes = backend.kernel, "", any_sizes
        self.graphs = 0
        """How many have been compiled."""
        self.ran = 0
        """How many that are of the kernel have run. Calls that torch gave up on run as they are, and nobody says so."""
        self._called: Any = _Module(self._attention) if module else self._attention
        if compiler is not None:
            torch._dynamo.reset()
            self._compiler = torch._dynamo.lookup_backend(compiler)
            self._called = torch.compile(self._called, backend=self._compile, dynamic=any_sizes or None)

    def _attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended = self._kernel.attend(q, k, v, metadata, options)
        self._path = attended.path
        return attended.out, attended.lse

    def _compile(self, graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Any]:
        """As torch's compiler of that name does, counted."""
        self.graphs += 1
        compiled = self._compiler(graph, examples)
        if all(node.target == "neg" for node in graph.graph.nodes if node.op.startswith("call")):
            # What a module has around the kernel.
            return compiled

        def counted(*arguments: Any) -> Any:
            self.ran += 1
            return compiled(*arguments)

        return counted

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        """Stands for the kernel's own."""
        out, lse = self._called(q, k, v, metadata, options)
        return Attended(out, lse, self._path)

    def run(self, call: Call, *, more: bool = True) -> bool:
        """Forward and backward of a call, which is compiled with it when it is first asked for.

        Args:
            call: of the backend.
            more: whether something may be compiled for it.

        Returns:
            Whether something of it ran compiled.

        Raises:
            NotTraceable: where torch's compiler does not take it; else what the backend raises.
            NotCompiledYet: where something would have to be compiled, and may not.
        """
        _knowing_all(call.metadata)
        call.attend, before = self.attend, self.ran
        # Sizes that happen to be equal in the first call would have to be in all.
        equal = _SIZES.patch(use_duck_shape=False) if self._any_sizes else contextlib.nullcontext()
        with _compiling(), equal, contextlib.nullcontext() if more else _nothing_more():
            call.forward()
            call.backward()
        return self.ran > before


def _knowing_all(metadata: VarlenMetadata) -> None:
    """Has metadata compute what they give, as users have it before they call: the first look would break a graph."""
    for name, each in vars(type(metadata)).items():
        if isinstance(each, functools.cached_property):
            getattr(metadata, name)


_STANCE: Final = "fail_on_recompile"


@contextlib.contextmanager
def _nothing_more() -> Iterator[None]:
    """Nothing more is compiled."""
    with torch.compiler.set_stance(_STANCE):
        try:
            yield
        except RuntimeError as error:
            if _STANCE not in str(error):
                raise
            raise NotCompiledYet(first_line(error)) from None


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
            # That a backend raised is one line, what it raised is the next.
            inner = getattr(error, "inner_exception", None)
            raise NotTraceable(first_line(error) if inner is None else in_words(inner)) from error


def _of_compiler(error: BaseException) -> bool:
    """Whether torch's compiler raised it, and not what it ran."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx"))
