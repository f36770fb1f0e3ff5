"""What a process ended with: in words, and whether that is the doing of what ran in it."""

from __future__ import annotations

import signal
from typing import Final

from attn_fuzz.execution.process import DEAD_CONTEXT, NOT_OURS, is_fault

INTERRUPTED: Final = 130
"""Exit status of a process in which KeyboardInterrupt was raised: by the code under test, or for Ctrl-C."""


def cause_of_death(exit_code: int | None) -> str:
    """What a process did that is no more, in words, by its exit status."""
    if exit_code is None or exit_code == DEAD_CONTEXT:
        return "died"
    if exit_code == INTERRUPTED:
        return "ended with KeyboardInterrupt"
    if exit_code == NOT_OURS:
        return "ended with an error that need not be its kernel's"
    if exit_code < 0:
        names = {int(each): each.name for each in signal.Signals}
        return f"was ended by {names.get(-exit_code, f'signal {-exit_code}')}"
    return f"died with exit code {exit_code}"


_FORKER_GONE: Final = 255
"""What ``multiprocessing`` gives for the exit status of a process when the one that forked it was killed."""


def killed_from_outside(exit_code: int | None) -> bool:
    """Whether the system or a person ended a process, most likely: no fault in code sends that signal."""
    return exit_code in (-signal.SIGKILL, _FORKER_GONE)


def excuse(exit_code: int | None, last_words: str = "") -> str:
    """What a process ended with that is nobody's fault, most likely, in words; empty where there is no such thing.

    Args:
        exit_code: of the process.
        last_words: what it said at its end; empty where nothing is known of that, and the status says it all.
    """
    if killed_from_outside(exit_code):
        return "was killed from outside"
    if exit_code == NOT_OURS:
        return cause_of_death(exit_code)
    if exit_code == DEAD_CONTEXT and last_words and not is_fault(last_words):
        return "ended with a CUDA error that is no fault of a kernel, as on a GPU whose memory others have filled"
    return ""
