"""Which backends there are, by name. A backend is imported only when it is asked for.

``KERNEL`` is the buffered layer around that kernel, and the kernel by itself; ``legacy:KERNEL`` is the known-bad layer
around it; ``fault:ID`` is a planted fault (backends/faults), ``rare:Q,K:KERNEL`` one that only documents of one size
show; ``MODULE:FUNCTION`` or ``PATH.py:FUNCTION`` is a user's own kernel, and ``layer:MODULE:CLASS`` a user's own layer
(backends/user.py).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

from backends import kernels
from backends.faults.fault import PREFIX as FAULT
from backends.faults.fault import faults, parts_of
from backends.kernel import Kernel
from backends.layer import BufferedLayer, LayerFactory
from backends.legacy import LegacyLayer
from backends.rare import PREFIX as RARE
from backends.rare import RareKernel, size_of
from backends.user import UserKernel, user_layer
from reference.case import Case
from reference.layout import call_segments, micro_sequences, segments

LEGACY = "legacy:"
USER_LAYER = "layer:"


class UnknownBackend(LookupError):
    """No backend of that name; the message lists those there are."""


def calls_of(case: Case) -> list[list[tuple[int, int]]]:
    """(queries, keys) of every document of every varlen call that a case makes."""
    if case.level == "layer":
        calls = [segments(case.packed_lengths, part) for part in micro_sequences(case)]
    else:
        calls = [call_segments(case)]
    return [[(segment.queries.length, segment.keys.length) for segment in call] for call in calls]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A system under test."""

    name: str
    kernel: Kernel
    layer: LayerFactory = BufferedLayer
    levels: tuple[str, ...] = ("kernel", "layer")

    def refusal(self, case: Case, device: str) -> str | None:
        """What about a case the backend does not take, or None."""
        if case.level not in self.levels:
            return f"{case.level} cases"
        if case.level == "layer" and case.ranks > 1:
            return "more than one rank"
        lengths = calls_of(case)
        pairs = [pair for call in lengths for pair in call]
        return self.kernel.capabilities_on(device).refusal(case, device, pairs) or self.kernel.limit(case, lengths)


def kernel_names() -> tuple[str, ...]:
    """Names of all kernel adapters, from the files of ``backends/kernels``."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(kernels.__path__)))


def load(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UnknownBackend: when there is none.
        BackendUnavailable: when a user's kernel cannot be imported.
    """
    legacy = name.startswith(LEGACY)
    if name.startswith(USER_LAYER):
        return Backend(name, *user_layer(name.removeprefix(USER_LAYER)), ("layer",))
    if name.startswith(FAULT):
        planted = faults()
        fault_id = name.removeprefix(FAULT)
        if fault_id not in planted:
            raise UnknownBackend(f"unknown fault {fault_id!r}; known faults are {', '.join(planted)}")
        return Backend(name, *parts_of(planted[fault_id]))
    if name.startswith(RARE):
        try:
            queries, keys, inner = size_of(name)
        except ValueError:
            raise UnknownBackend(f"{name!r} is not of the form {RARE}QUERIES,KEYS:KERNEL") from None
        return Backend(name, RareKernel(load(inner).kernel, queries, keys), levels=("kernel",))
    if ":" in name and not legacy:
        return Backend(name, UserKernel(name))
    kernel_name = name.removeprefix(LEGACY)
    if kernel_name not in kernel_names():
        raise UnknownBackend(
            f"unknown backend {name!r}; known backends are {', '.join(kernel_names())}, and {LEGACY}NAME for each"
        )
    kernel = importlib.import_module(f"backends.kernels.{kernel_name}").KERNEL
    assert isinstance(kernel, Kernel)
    return Backend(name, kernel, LegacyLayer, ("layer",)) if legacy else Backend(name, kernel)
