"""Which backends there are, by name. A backend is imported only when it is asked for.

``KERNEL`` is the buffered layer around that kernel, and the kernel by itself; ``legacy:KERNEL`` is the known-bad layer
around it; ``unrestricted:KERNEL`` is the kernel with its declared limits set aside, to see what happens beyond them;
``fault:ID`` is a planted fault (backends/faults), ``trigger:Q,K:KERNEL`` one that only documents of one size show;
``MODULE:FUNCTION`` or ``PATH.py:FUNCTION`` is a user's own kernel, and ``layer:MODULE:CLASS`` a user's own layer
(backends/user.py), perhaps with arguments, as in ``layer:MODULE:CLASS(depth=2)``. Installed packages add theirs under
the entry point group ``attn_fuzz.backends``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from attn_fuzz.backends import kernels
from attn_fuzz.backends.faults.fault import PREFIX as FAULT
from attn_fuzz.backends.faults.fault import faults, parts_of
from attn_fuzz.backends.importing import import_object
from attn_fuzz.backends.kernel import Capabilities, Configuration, Kernel
from attn_fuzz.backends.known import crash_issue_of
from attn_fuzz.backends.layer import BufferedLayer, LayerFactory
from attn_fuzz.backends.layer_arguments import taken_apart
from attn_fuzz.backends.legacy import LegacyLayer
from attn_fuzz.backends.rank_layer import RankLayerFactory
from attn_fuzz.backends.tensor_layer import TensorLayer, rank_layer
from attn_fuzz.backends.trigger import PREFIX as RARE
from attn_fuzz.backends.trigger import TriggerKernel, size_of
from attn_fuzz.backends.unlimited import Unlimited
from attn_fuzz.backends.user import UserKernel, user_layer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import active_lengths, cut_inside_document, rank_slices

LEGACY = "legacy:"
ENTRY_POINTS = "attn_fuzz.backends"
"""The entry point group under which packages register backends."""
USER_LAYER = "layer:"
ANY = "unrestricted:"


@dataclasses.dataclass(frozen=True)
class Users:
    """A name of a user's own kernel or layer, taken apart."""

    prefix: str
    """Such as ``layer:``."""
    place: str
    """``MODULE`` or ``PATH.py``."""
    attribute: str
    """With the arguments of a class, where there are any."""

    def from_folder(self, folder: Path) -> str:
        """The name, its path from a folder instead of this one."""
        if not self.place.endswith(".py") or Path.cwd() == folder:
            return f"{self.prefix}{self.place}:{self.attribute}"
        return f"{self.prefix}{folder / self.place}:{self.attribute}"


def users(name: str) -> Users | None:
    """What names a user's own kernel or layer, taken apart; None for a name that means the same in every folder."""
    prefix, rest = "", name
    while rest.startswith((ANY, USER_LAYER, RARE)):
        parts = 2 if rest.startswith(RARE) else 1
        first = ":".join(rest.split(":")[:parts]) + ":"
        prefix, rest = prefix + first, rest[len(first) :]
    if ":" not in rest or rest.startswith((LEGACY, FAULT)):
        return None
    bare, _ = taken_apart(rest)
    place, _, attribute = bare.rpartition(":")
    return Users(prefix, place, attribute + rest[len(bare) :])


def found_from(name: str, folder: Path) -> str:
    """The name by which a backend that was named in a folder is found in this process, whatever folder it is in.

    Modules are imported from that folder from now on, too.

    Args:
        name: of a backend.
        folder: absolute; the working directory where it was named.
    """
    parts = users(name)
    if parts is None:
        return name
    if not parts.place.endswith(".py") and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return parts.from_folder(folder)


class UnknownBackend(LookupError):
    """No backend of that name; the message lists those there are."""


def calls_of(case: Case) -> list[list[tuple[int, int]]]:
    """(queries, keys) of every document of every varlen call that a case makes."""
    if case.level == "kernel":
        return [list(zip(case.packed_lengths, case.packed_key_lengths, strict=True))]
    calls = [active_lengths(case.packed_lengths, part) for part in rank_slices(case)]
    return [list(zip(*call, strict=True)) for call in calls]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A system under test."""

    name: str
    kernel: Kernel
    layer: LayerFactory = BufferedLayer
    levels: tuple[str, ...] = ("kernel", "layer")
    rank_layer: RankLayerFactory | None = rank_layer
    """The layer of one of several ranks; None where there is no such thing."""
    isolated: bool = False
    """Runs in a process that may die: cases that are known to crash it are let through."""

    def goes_back(self, device: str) -> bool:
        """Whether its layer has a backward: this project's has, around whatever kernel; a user's as it says."""
        return "kernel" in self.levels or self.kernel.capabilities_on(device).backward

    def refusal(self, case: Case, device: str) -> str | None:
        """What about a case the backend does not take, or None."""
        if case.level not in self.levels:
            return f"{case.level} cases"
        if case.level == "layer" and case.all_ranks > 1:
            if self.rank_layer is None:
                return "more than one rank"
            only_ranks = isinstance(self.rank_layer, type) and not issubclass(self.rank_layer, TensorLayer)
            if case.tensor_ranks > 1 and only_ranks:
                return "tensor parallelism"
            borders = [part.end for part in rank_slices(case)]
            if not case.causal and cut_inside_document(case.packed_lengths, borders) is not None:
                return "non-causal documents spread over ranks"
        lengths = calls_of(case)
        pairs = [pair for call in lengths for pair in call]
        declared = self.kernel.capabilities_on(device).refusal(case, device, pairs) or self.kernel.limit(case, lengths)
        if declared is None and not self.isolated and (issue := crash_issue_of(self.name, device, case, lengths)):
            return f"what is known to end its process ({issue.id})"
        return declared


def narrowed(backend: Backend, without: Mapping[str, Any]) -> Backend:
    """A user's backend with some of its capabilities replaced by what has been found out about them.

    Args:
        backend: of a user's kernel or layer.
        without: values by names of fields of ``Capabilities``.
    """
    if not without:
        return backend
    kernel = copy.copy(backend.kernel)
    kernel.capabilities = dataclasses.replace(kernel.capabilities, **without)  # type: ignore[misc]
    return dataclasses.replace(backend, kernel=kernel)


def within(backend: Backend, ready: Callable[[], tuple[Configuration, ...]]) -> Backend:
    """A backend that takes nothing but some configurations, which may become more: all others it would have to compile.

    Args:
        backend: any.
        ready: gives those that it takes, at any time.
    """
    kernel = copy.copy(backend.kernel)
    # The copy's own: calls of a user's kernel may show more than it states.
    stated = kernel.capabilities_on

    def capabilities_on(device: str) -> Capabilities:
        return dataclasses.replace(stated(device), configurations=ready())

    kernel.capabilities_on = capabilities_on  # type: ignore[method-assign]
    return dataclasses.replace(backend, kernel=kernel)


@functools.cache
def kernel_names() -> tuple[str, ...]:
    """Names of all kernel adapters, from the files of ``backends/kernels``."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(kernels.__path__)))


@functools.cache
def third_party() -> dict[str, metadata.EntryPoint]:
    """Backends that installed packages bring, by name; a name of ours is not theirs to take."""
    ours = set(kernel_names())
    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS) if point.name not in ours}


def backend_names() -> tuple[str, ...]:
    """Names of all adapters, ours and those of installed packages."""
    return tuple(sorted({*kernel_names(), *third_party()}))


def _from_package(point: metadata.EntryPoint) -> Kernel:
    """A kernel from an entry point: a ``Kernel``, or a function with the varlen signature.

    Raises:
        BackendUnavailable: when it cannot be imported or is neither.
    """
    found = import_object(point.value)
    if isinstance(found, Kernel):
        return found
    return UserKernel(point.value)


def load(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UnknownBackend: when there is none.
        BackendUnavailable: when a user's kernel cannot be imported.
    """
    if name.startswith(ANY):
        return Backend(name, Unlimited(load(name.removeprefix(ANY)).kernel))
    legacy = name.startswith(LEGACY)
    if name.startswith(USER_LAYER):
        inside, layer, over_ranks = user_layer(name.removeprefix(USER_LAYER))
        return Backend(name, inside, layer, ("layer",), over_ranks)
    if name.startswith(FAULT):
        planted = faults()
        fault_id = name.removeprefix(FAULT)
        if fault_id not in planted:
            raise UnknownBackend(f"unknown fault {fault_id!r}; known faults are {', '.join(planted)}")
        return Backend(name, *parts_of(planted[fault_id]))
    if name.startswith(RARE):
        try:
            queries, keys, how, inner = size_of(name)
        except ValueError:
            raise UnknownBackend(f"{name!r} is not of the form {RARE}QUERIES,KEYS[,HOW]:KERNEL") from None
        return Backend(name, TriggerKernel(load(inner).kernel, queries, keys, how), levels=("kernel",))
    if ":" in name and not legacy:
        return Backend(name, UserKernel(name))
    kernel_name = name.removeprefix(LEGACY)
    if kernel_name in third_party():
        kernel = _from_package(third_party()[kernel_name])
        return Backend(name, kernel, LegacyLayer, ("layer",), None) if legacy else Backend(name, kernel)
    if kernel_name not in kernel_names():
        raise UnknownBackend(
            f"unknown backend {name!r}; known backends are {', '.join(backend_names())}, and {LEGACY}NAME for each"
        )
    kernel = importlib.import_module(f"attn_fuzz.backends.kernels.{kernel_name}").KERNEL
    assert isinstance(kernel, Kernel)
    return Backend(name, kernel, LegacyLayer, ("layer",), None) if legacy else Backend(name, kernel)
