"""Differential correctness tests and fuzzing for packed attention with a buffered K/V cache: the public names.

In the source tree ``reference`` and ``backends`` lie beside this package; wheels and editable installs map them into
it (pyproject.toml). In a bare checkout ``__path__`` has ``attn_fuzz.reference`` and ``attn_fuzz.backends`` found there.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_fuzz import adapters
    from attn_fuzz.api import (
        CheckError,
        FoundError,
        Verdict,
        assert_attention,
        check,
        check_layer,
        replay,
    )
    from attn_fuzz.oracle.own_inputs import AttentionMismatch

__version__ = "0.2.0"

__all__ = [
    "AttentionMismatch",
    "CheckError",
    "FoundError",
    "Verdict",
    "adapters",
    "assert_attention",
    "check",
    "check_layer",
    "replay",
]

_HERE = Path(__file__).resolve().parent
if not (_HERE / "reference").exists() and (_HERE.parent / "reference" / "attention.py").exists():
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: torch takes seconds."""
    if name == "adapters":
        return importlib.import_module("attn_fuzz.adapters")
    if name == "AttentionMismatch":
        from attn_fuzz.oracle import own_inputs as module
    elif name in __all__:
        from attn_fuzz import api as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
