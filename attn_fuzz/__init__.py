"""The harness: what to try, what counts as wrong, how to make it small, how to keep it.

In the source tree ``reference`` and ``backends`` lie beside this package; wheels and editable installs map them into
it (pyproject.toml). In a bare checkout the last line here has ``attn_fuzz.reference`` and ``attn_fuzz.backends`` found.
"""

from pathlib import Path

__version__ = "0.2.0"

_HERE = Path(__file__).resolve().parent
if not (_HERE / "reference").exists() and (_HERE.parent / "reference" / "attention.py").exists():
    __path__.append(str(_HERE.parent))
