"""Where in somebody's own file an exception was raised."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import Final

import attn_fuzz
from attn_fuzz import backends, reference

_NOT_THEIRS: Final = (
    *(Path(package.__file__).resolve().parent for package in (attn_fuzz, backends, reference) if package.__file__),
    *(Path(sysconfig.get_path(place)) for place in ("stdlib", "purelib", "platlib")),
)


def place_of(error: BaseException) -> str:
    """`` (FILE, line N)`` of the innermost frame that is neither installed nor this project's; empty for none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(folder) for folder in _NOT_THEIRS)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
