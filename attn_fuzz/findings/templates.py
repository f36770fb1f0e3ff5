"""Templates of what is written for people: scripts and reports, each with a folder ``templates`` beside its module."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2


@functools.lru_cache
def templates(module: str, *, autoescape: bool) -> jinja2.Environment:
    """Those beside a module; a name that a template asks for and is not given raises.

    Args:
        module: its ``__file__``.
        autoescape: for HTML, where what a kernel said may be anything.
    """
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(module).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=autoescape,
    )
