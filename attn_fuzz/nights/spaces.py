"""What there is to test on a machine: backends, devices, modes and levels, and what of each could be reached."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from attn_fuzz.backends import registry
from attn_fuzz.campaign.plan import batched_levels, devices_in_turn, takes_batches
from attn_fuzz.coverage.allowed import Space
from attn_fuzz.nights.schedule import Target


def default_devices() -> tuple[str, ...]:
    """All GPUs, and the CPU."""
    return (*devices_in_turn("cuda"), "cpu") if torch.cuda.is_available() else ("cpu",)


@functools.cache
def space_of(backend: str, kind: str) -> Space:
    """What could be reached of a backend.

    Args:
        backend: its name.
        kind: ``cpu`` or ``cuda``.

    Raises:
        UnknownBackend: when there is none of that name.
        BackendUnavailable: when it cannot be imported.
    """
    loaded = registry.load(backend)
    return Space.of(loaded, kind, batched_levels(loaded, loaded.levels))


def is_compiled(backend: str, kind: str) -> bool:
    """Whether a backend compiles for shapes, options or calls, so that its cases take seconds."""
    kernel = registry.load(backend).kernel
    capabilities = kernel.capabilities_on(kind)
    return bool(kernel.compiled or capabilities.compiles or capabilities.layouts or capabilities.configurations)


def runs_on(backend: str, kind: str) -> bool:
    """Whether a backend can run here on a kind of device."""
    return registry.load(backend).kernel.why_unavailable(kind) is None


def targets(
    backends: Sequence[str], devices: Sequence[str], levels: Sequence[str], modes: Sequence[str]
) -> list[Target]:
    """All that a campaign may test.

    Args:
        backends: their names.
        devices: ``cpu`` and ``cuda:N``.
        levels: of those that a backend has.
        modes: likewise.
    """
    return [
        Target(backend, device, level, mode, is_compiled(backend, kind))
        for device in devices
        for backend in backends
        if runs_on(backend, kind := device.partition(":")[0])
        for level in levels
        if level in registry.load(backend).levels
        for mode in modes
        if mode != "batch" or takes_batches(backend, [level])
    ]
