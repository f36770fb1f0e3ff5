"""In which version what is saved was written, and the errors of what cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

FORMAT: Final = 2
"""Of cases, findings and regression cases, as files say it; those of 1, which is version 0.1's, say nothing."""


class CaseError(ValueError):
    """A case that cannot exist; the message is one sentence for the person who wrote it."""


class NewerVersion(CaseError):
    """What was written by a newer version, which this one cannot read; the message is one sentence."""


LISTED: Final = 64
"""Numbers that people are shown one by one."""


def counted(value: object) -> object:
    """A list of many numbers in a few words; anything else as it is."""
    if not isinstance(value, list) or len(value) <= LISTED:
        return value
    least, most = min(value), max(value)
    return f"{len(value):,} times {least}" if least == most else f"{len(value):,} of {least:,} to {most:,}"


def require_format(data: Mapping[str, Any], what: str) -> None:
    """Sees that saved data is in a format that this version reads.

    Args:
        data: as it was saved; where it has no ``format``, that is 1.
        what: it is, for the message.

    Raises:
        NewerVersion: when the format is a newer one.
        CaseError: when it is no number.
    """
    version = data.get("format", 1)
    if not isinstance(version, int) or isinstance(version, bool):
        raise CaseError(f"format must be a whole number, not {version!r}")
    if version > FORMAT:
        raise NewerVersion(f"{what} was written by a newer version (format {version}); upgrade attn-fuzz")
