"""Which backends there are. A backend is imported only when it is asked for."""

from __future__ import annotations

import importlib
import pkgutil

from backends import kernels
from backends.kernel import Kernel


class UnknownBackend(LookupError):
    """No backend of that name; the message lists those there are."""


def kernel_names() -> tuple[str, ...]:
    """Names of all kernel adapters, from the files of ``backends/kernels``."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(kernels.__path__)))


def load_kernel(name: str) -> Kernel:
    """The adapter of that name.

    Raises:
        UnknownBackend: when there is none.
    """
    if name not in kernel_names():
        raise UnknownBackend(f"unknown backend {name!r}; known backends are {', '.join(kernel_names())}")
    kernel = importlib.import_module(f"backends.kernels.{name}").KERNEL
    assert isinstance(kernel, Kernel)
    return kernel
