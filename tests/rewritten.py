"""Examples with a line of theirs replaced."""

from __future__ import annotations

from pathlib import Path


def rewritten(example: Path, folder: Path, before: str, after: str) -> Path:
    """A copy of an example in a folder, with what stands in it once replaced."""
    source = example.read_text()
    assert source.count(before) == 1
    path = folder / "written.py"
    path.write_text(source.replace(before, after))
    return path
