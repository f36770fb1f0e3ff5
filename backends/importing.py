"""User code by its name: ``MODULE:NAME`` or ``PATH.py:NAME``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from attn_fuzz.backends.kernel import BackendUnavailable

_IMPORTING: Final = threading.RLock()


def import_object(name: str) -> Any:
    """``MODULE:NAME`` or ``PATH.py:NAME``.

    Raises:
        BackendUnavailable: when it cannot be imported or is not there.
    """
    place, _, attribute = name.rpartition(":")
    try:
        # Standard output belongs to the commands that import this, and to all threads together.
        with _IMPORTING, contextlib.redirect_stdout(sys.stderr):
            module = _module_from_file(Path(place)) if place.endswith(".py") else _module_by_name(place)
    except (Exception, SystemExit) as error:
        # A script that ends its process when it is imported would end this one, with its own exit status.
        raise BackendUnavailable(f"{place} cannot be imported: {type(error).__name__}: {error}") from None
    if not hasattr(module, attribute):
        raise BackendUnavailable(f"{place} has no {attribute!r}")
    return getattr(module, attribute)


def _module_by_name(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(name)


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # Two files of one name are two modules: what a kernel defines when it is called must find its own.
    name = f"attn_fuzz_user_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Compilers such as Triton look a kernel's source up through its module's name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
