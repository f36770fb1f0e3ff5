"""What is noted of a call that raised."""

from __future__ import annotations

from typing import Protocol

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.output import MisshapenResult
from attn_fuzz.execution.process import in_words, raise_lack_of_memory


class Failures(Protocol):
    """What came out of calls, as far as it says which of them came to nothing."""

    @property
    def broken(self) -> dict[int, str]: ...

    @property
    def incomplete(self) -> set[int]: ...

    @property
    def refused(self) -> dict[int, str]: ...


def note_failure(found: Failures, index: int, error: Exception) -> None:
    """Takes note of what a call has raised: that it refused, or what is wrong with it, in words.

    Args:
        found: gets it.
        index: of the call.
        error: what it raised.

    Raises:
        torch.OutOfMemoryError: where there was too little memory, which is no fault of the call.
    """
    if isinstance(error, (UnsupportedCase, NotImplementedError)):
        found.refused[index] = str(error)
        return
    raise_lack_of_memory(error)
    found.broken[index] = in_words(error)
    if isinstance(error, MisshapenResult):
        found.incomplete.add(index)
