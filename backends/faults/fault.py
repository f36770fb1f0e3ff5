"""What a planted fault is, and how to find them all."""

from __future__ import annotations

import importlib
import pkgutil
from typing import ClassVar

import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.layer import BufferedLayer, Layer
from attn_fuzz.backends.loop import Loop, attend
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.rank_layer import RankLayer, RankLayerFactory
from attn_fuzz.backends.tensor_layer import TensorLayer, rank_layer
from attn_fuzz.reference.profile import Profile

PREFIX = "fault:"


class Fault:
    """Common to all faults."""

    id: ClassVar[str]
    reports: ClassVar[tuple[str, ...]] = ()
    """Public reports of this class of bug; none for classes that were added here."""
    why_not_hunted: ClassVar[str] = ""
    """Why nobody hunts it who does not name it; empty for nearly all."""

    @classmethod
    def about(cls) -> str:
        """What is wrong, in a sentence."""
        return (cls.__doc__ or "").strip().splitlines()[0]


class KernelFault(Fault, Loop):
    """A loop with one decision changed."""

    capabilities: ClassVar[Capabilities] = Capabilities(covers_all_rows=False)
    levels: ClassVar[tuple[str, ...]] = ("kernel", "layer")


class LayerFault(Fault):
    """Mixed into a layer around the correct loop."""


class RankFault(Fault, RankLayer):
    """A rank's layer with one decision changed, around the correct loop; it shows where there is more than one rank."""

    ranks: ClassVar[tuple[int, ...]] = (2, 3, 4)
    """How many ranks it is hunted on."""
    tensor_ranks: ClassVar[tuple[int, ...]] = (1,)


class TensorFault(Fault, TensorLayer):
    """The same for the layer with tensor parallelism."""

    ranks: ClassVar[tuple[int, ...]] = (1, 2)
    tensor_ranks: ClassVar[tuple[int, ...]] = (2,)


class FaultyKernel(Kernel):
    """The kernel of a ``KernelFault``; one loop object serves all calls, as a library's global state does."""

    profile = Profile(normalises_by_lse=True)
    paths = frozenset({"loop"})

    def __init__(self, fault: type[KernelFault]) -> None:
        self.name, self.capabilities = PREFIX + fault.id, fault.capabilities  # type: ignore[misc]
        self._loop = fault()

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        out, lse = attend(self._loop, q, k, v, metadata, options)
        return Attended(out, lse, getattr(self._loop, "path", "loop"))


class CorrectKernel(FaultyKernel):
    """The loop as it is, for faults of the layer around it."""

    def __init__(self, name: str) -> None:
        self.name, self.capabilities = name, KernelFault.capabilities  # type: ignore[misc]
        self._loop = Loop()  # type: ignore[assignment]


def faults() -> dict[str, type[Fault]]:
    """All faults by id, in the order of their families and of their definition."""
    import attn_fuzz.backends.faults as package

    found: dict[str, type[Fault]] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        for value in vars(importlib.import_module(f"attn_fuzz.backends.faults.{module}")).values():
            if isinstance(value, type) and issubclass(value, Fault) and "id" in vars(value):
                if value.__module__ != f"attn_fuzz.backends.faults.{module}":
                    continue
                if value.id in found:
                    raise ValueError(f"two faults are called {value.id}")
                found[value.id] = value
    return found


def parts_of(fault: type[Fault]) -> tuple[Kernel, type[Layer], tuple[str, ...], RankLayerFactory | None]:
    """(kernel, layer, levels, rank layer) of a fault as a backend."""
    if issubclass(fault, KernelFault):
        return FaultyKernel(fault), BufferedLayer, fault.levels, rank_layer
    if issubclass(fault, (RankFault, TensorFault)):
        return CorrectKernel(PREFIX + fault.id), BufferedLayer, ("layer",), fault
    assert issubclass(fault, LayerFault)
    assert issubclass(fault, Layer)
    return CorrectKernel(PREFIX + fault.id), fault, ("layer",), None
