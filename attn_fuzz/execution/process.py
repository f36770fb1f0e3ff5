"""A process that runs cases: what it sets once, and whether its device still computes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from attn_fuzz.execution.compilers import keep_compiled

DEAD_CONTEXT: Final = 77
"""Exit status of a worker whose CUDA context no longer works."""

NO_DEVICE: Final = 78
"""Exit status of a process that could not use its device from the beginning."""

NOT_OURS: Final = 79
"""Exit status of a process that ended with an error which need not be the doing of the code under test: on a GPU that
others have filled, libraries fail of no stated cause."""

_FAULTS: Final = (
    "illegal memory access",
    "illegal address",
    "illegal_address",
    "misaligned address",
    "misaligned_address",
    "illegal instruction",
    "illegal_instruction",
    "invalid program counter",
    "invalid_pc",
    "hardware stack error",
    "launch failure",
    "launch_failed",
    "launch timed out",
    "launch_timeout",
    # Not the words of a hint that is added to every error.
    "assert triggered",
    "cuda_error_assert",
)
"""What CUDA says, in small letters, of kernels that did what they must not: later calls hear of it, too."""

_LACKING: Final = ("out of memory", "out_of_memory", "alloc_failed", "can't allocate memory")
"""What CUDA, its libraries, JAX and torch on a CPU say, in small letters, where there is too little memory."""

_UNAVAILABLE: Final = "busy or unavailable"
"""What CUDA says of a GPU, too, that had no memory for a context."""

_NO_CAUSE: Final = (
    "cublas_status_execution_failed",
    "cublas_status_internal_error",
    "cublas_status_not_initialized",
    "cudnn_status_execution_failed",
    "cudnn_status_internal_error",
    "cuda error: unknown error",
)
"""What CUDA and its libraries say, in small letters, where a GPU's memory is full; and of mistakes, too."""

_FULL: Final = 1 << 29
"""Bytes free of a GPU below which its memory is full: a library's code and workspace take some hundred megabytes."""

_DEVICE_FAILED: Final = ("CUDA error", "CUDA driver", "[CUDA]", "CUDA_ERROR", "cudaError")
"""What torch, Triton, CUDA's driver and its runtime say where a call on the device came to nothing."""

_SCARCE: Final = 8
"""Below so small a part of a GPU's memory, caches are given back."""


def context_alive(device: torch.device) -> bool:
    """Whether the device still computes: some faults end a CUDA context for good."""
    if device.type != "cuda":
        return True
    try:
        return bool((torch.ones(8, device=device) + 1).sum().item() == 16)
    except RuntimeError:
        return False


_OF_MEMORY: Final = 0.5
"""Share of the machine's memory in one process beyond which a kill is taken for the system's."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is this machine's lack of memory, and no fault of what ran."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error).lower()
    return any(words in said for words in _LACKING) or (states_no_cause(said) and _is_full())


def _is_full() -> bool:
    """Whether the current GPU has hardly any memory left, as while another process takes all of it."""
    try:
        return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < _FULL
    except RuntimeError:
        return False


def states_no_cause(said: str) -> bool:
    """Whether what an error says is what CUDA's libraries say of mistakes, and on a GPU that others have filled.

    By the time it is asked for, a GPU may be full no more: only another process can tell whose doing it is.
    """
    return any(words in said.lower() for words in _NO_CAUSE)


def raise_lack_of_memory(error: Exception) -> None:
    """Raises an error that is a lack of memory, as one of the kinds that callers know, and no other."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        raise error
    if lacks_memory(error):
        raise torch.OutOfMemoryError(str(error)) from error


def device_failed(error: BaseException) -> bool:
    """Whether an error is the device's or its driver's: what comes after it on the device may fail for it, too."""
    return any(words in str(error) for words in _DEVICE_FAILED)


def is_fault(said: str) -> bool:
    """Whether what an error says is that a kernel on the device did what it must not, whoever hears of it."""
    return any(words in said.lower() for words in _FAULTS)


@contextlib.contextmanager
def not_its_doing() -> Iterator[None]:
    """Around all that a worker does: ends it with ``NOT_OURS`` where an error comes out that accuses nobody.

    What code under test raises is caught, and judged, where it is called.
    """
    try:
        yield
    except Exception as error:
        if is_fault(str(error)):
            raise
        traceback.print_exc()
        raise SystemExit(NOT_OURS) from error


def beyond_its_call(error: BaseException) -> bool:
    """Whether an error is about more than the call that raised it: too little memory, or a device that has failed."""
    return lacks_memory(error) or device_failed(error)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or ["(no message)"])[0][:300]


def in_words(error: BaseException) -> str:
    """An exception in one line: its type, and what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


NOT_DIFFERENTIABLE: Final = "NotDifferentiable"
"""What an error is called that says that an output has no gradient; torch has no type for it."""

_NO_GRADIENT: Final = "does not require grad"


MISSING_VARIABLE: Final = "MissingVariable"
"""What an error is called that says that an environment variable is not set: ``os`` raises a KeyError for it."""


def kind_of(error: BaseException) -> str:
    """The name of an error's type, or ``NOT_DIFFERENTIABLE`` or ``MISSING_VARIABLE``."""
    if _NO_GRADIENT in str(error):
        return NOT_DIFFERENTIABLE
    return MISSING_VARIABLE if isinstance(error, KeyError) and _raised_in(error) == "os" else type(error).__name__


def _raised_in(error: BaseException) -> str | None:
    """The name of the module in which an error was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__") if frames else None


def largest_memory(pid: int | None) -> int:
    """The most memory that a running process has had so far, in bytes; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def killed_for_memory(exit_code: int | None, memory: int) -> bool:
    """Whether a process was killed, and had taken so much memory that the system did it.

    Args:
        exit_code: minus the signal that ended it.
        memory: the most that it was seen to have, in bytes.
    """
    if exit_code != -signal.SIGKILL:
        return False
    return memory > _OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


_FOR_ALL: Final = 0.7
"""Share of the machine's memory that all workers together may fill."""

_LEAST: Final = 4 << 30
"""Bytes that a worker may have in any case: packed calls of thousands of documents take two gigabytes."""


def share_of_memory(workers: int) -> int:
    """Bytes for each of so many workers."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        # Of a container; "max" is no number.
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(int(_FOR_ALL * total / workers), _LEAST)


def limit_memory(most: int) -> None:
    """Has allocations fail with which this process would have more than so many bytes of its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > most:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def leave_memory(device: torch.device) -> None:
    """Gives cached memory of a GPU back where little is left: contexts and libraries of others need some, too."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free * _SCARCE < total:
            torch.cuda.empty_cache()


def leave_all_memory(device: torch.device) -> None:
    """Gives all cached memory of a GPU back: what has run out is not there for others either, who are then refused."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def set_apart() -> None:
    """What a child process does first: standard output is its parent's, and kernels that print use standard error."""
    os.dup2(2, 1)
    # What torch says of its own operators, once in every process: a newcomer reads them as faults of what is tested.
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def share_of_processors(place: int, places: int) -> frozenset[int] | None:
    """The processors that one of so many groups of processes may have for itself; None where there are too few.

    Processes that wait for one another wake one another up, which costs less on the same processor than on another.

    Args:
        place: which group, from 0.
        places: how many there are.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    mine = sorted(os.sched_getaffinity(0))
    return frozenset(mine[place * len(mine) // places : (place + 1) * len(mine) // places]) or None


def stay_on(processors: frozenset[int]) -> None:
    """Keeps this process, and those that it starts, on some processors, where they take turns.

    One that is woken up there waits until the one that woke it has nothing more to do, instead of interrupting it.
    """
    os.sched_setaffinity(0, processors)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


_WORKSPACE_VARIABLE: Final = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACE: Final = ":4096:8"
"""Without it torch refuses deterministic algorithms to code that asks for them."""


def _settle_workspace() -> None:
    """Has torch learn of the variable now, and takes it out of its sight again.

    Whether products are deterministic it decides at the first of a process; the size of their workspace it reads anew
    for each of them, with regular expressions: 64 of the 86 microseconds that a small product takes on the host, where
    22 are its own (H200, torch 2.11). Without the variable the size is its own, on that GPU the same.
    """
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if forget is None or os.environ.get(_WORKSPACE_VARIABLE) != _WORKSPACE:
        return
    numbers = torch.ones(8, 8, device="cuda")
    torch.mm(numbers, numbers)
    # What was taken by the one size is not used by the other.
    forget()
    # Of the C library's environment, which torch reads; Python's, and that of new processes, keep it.
    os.unsetenv(_WORKSPACE_VARIABLE)


_TRIES: Final = 8
_WAIT_SECONDS: Final = 2.0


def _enter(index: int, pause: Callable[[float], object] = time.sleep) -> None:
    """Makes a GPU the current one, once there is memory for this process's context: others may have filled it, for a
    while.

    Raises:
        RuntimeError: where it cannot be used.
    """
    for left in reversed(range(_TRIES)):
        try:
            torch.cuda.set_device(index)
            _settle_workspace()
            return
        except RuntimeError as error:
            if not left or not (lacks_memory(error) or _UNAVAILABLE in str(error)):
                raise
            pause(_WAIT_SECONDS)


def set_up_process(device: str) -> None:
    """What every process that runs cases sets once: one CPU thread, plain float32, repeatable matrix products."""
    torch.set_num_threads(1)
    keep_compiled()
    os.environ.setdefault(_WORKSPACE_VARIABLE, _WORKSPACE)
    # oneDNN's bf16 products on AMX read up to 31 elements past the end of a row (docs/oracle.md): NaN behind a slice
    # then comes out of a projection, whatever kernel is under test. Set the variable yourself to test AMX.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # Split reductions in the storage dtype would round partial sums that no budget knows of.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if device.startswith("cuda"):
        _enter(torch.device(device).index or 0)
