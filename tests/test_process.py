"""What every process that runs cases is set up with."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection

import pytest
import torch
from devices import needs_cuda

from attn_fuzz.campaign import new_process, serve
from attn_fuzz.campaign.endings import excuse
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.campaign.pool import Pool
from attn_fuzz.execution import process
from attn_fuzz.execution.process import (
    DEAD_CONTEXT,
    NOT_OURS,
    beyond_its_call,
    device_failed,
    in_words,
    lacks_memory,
    set_up_process,
)
from attn_fuzz.execution.signals import interrupt_once
from attn_fuzz.ranks.rank_process import Failure

_PRODUCT = """
import sys
sys.path[:0] = {path!r}
import torch
from attn_fuzz.execution.process import set_up_process

set_up_process("cpu")
buffer = torch.full((17, 88), torch.nan, dtype=torch.bfloat16)
buffer[:, :80] = 1
print(bool((buffer[:, :80] @ torch.ones(4, 80, dtype=torch.bfloat16).T).isfinite().all()))
"""


@pytest.mark.slow
def test_products_read_their_rows_and_no_further() -> None:
    """In a fresh process: the library reads its settings at the first product (docs/oracle.md)."""
    code = _PRODUCT.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_signal_that_comes_twice_interrupts_once() -> None:
    before = signal.signal(signal.SIGTERM, interrupt_once)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("ran out of memory"), False),
    ],
)
def test_what_is_a_lack_of_memory(error: Exception, lacking: bool) -> None:
    assert lacks_memory(error) is lacking
    if lacking:
        assert beyond_its_call(error)


@pytest.mark.parametrize("status", ["CUBLAS_STATUS_INTERNAL_ERROR", "CUBLAS_STATUS_EXECUTION_FAILED"])
@pytest.mark.parametrize(("free", "lacking"), [(1 << 20, True), (1 << 34, False)])
def test_what_a_library_says_of_a_full_gpu(
    monkeypatch: pytest.MonkeyPatch, free: int, lacking: bool, status: str
) -> None:
    """As cuBLAS did in the soak while a kernel beside it had taken all memory: `loop` is not accused of that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 37))
    error = RuntimeError(f"CUDA error: {status} when calling `cublasGemmEx( handle, opa, opb, m, n)`")
    assert lacks_memory(error) is lacking
    assert not lacks_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


FULL = RuntimeError("CUDA error: out of memory")
BROKEN = RuntimeError("CUDA error: invalid device ordinal")
BUSY = RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
HINT = "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
"""Which torch adds to every error of CUDA."""


@pytest.mark.parametrize(
    ("errors", "raised"), [([FULL] * 3, None), ([FULL, BUSY], None), ([FULL] * 99, FULL), ([FULL, BROKEN], BROKEN)]
)
def test_a_process_waits_for_a_gpu_that_others_have_filled(
    monkeypatch: pytest.MonkeyPatch, errors: list[RuntimeError], raised: RuntimeError | None
) -> None:
    left, pauses = list(errors), []

    def set_device(index: int) -> None:
        if left:
            raise left.pop(0)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    # A torch with CUDA looks for a driver.
    monkeypatch.setattr(process, "_settle_workspace", lambda: None)
    with contextlib.nullcontext() if raised is None else pytest.raises(RuntimeError, match=str(raised)):
        process._enter(0, pauses.append)
    assert 0 < len(pauses) < 20


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyError("a mistake of the harness"), NOT_OURS),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasDgemmStridedBatched`"),
            NOT_OURS,
        ),
        # As torch's own operations failed in the soak, on a GPU that a kernel beside them had filled.
        (RuntimeError("CUDA error: unknown error\nSearch for `cudaErrorUnknown' in ..."), NOT_OURS),
        (RuntimeError(f"CUDA error: unknown error\n{HINT}"), NOT_OURS),
        (RuntimeError(f"CUDA error: an illegal memory access was encountered\n{HINT}"), None),
        (RuntimeError(f"CUDA error: device-side assert triggered\n{HINT}"), None),
    ],
)
def test_a_worker_that_ends_with_an_error_of_nobodys_says_so(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(assignment: Assignment, send: object) -> None:
        raise error

    monkeypatch.setattr(serve, "set_apart", lambda: None)
    monkeypatch.setitem(serve.WORK, "case", fails)
    ours, theirs = multiprocessing.Pipe()
    with pytest.raises((SystemExit, RuntimeError)) as raised:
        serve.serve(Assignment(backend="loop", device="cpu", seed=0, mode="case"), theirs, None)
    assert (raised.value.code if isinstance(raised.value, SystemExit) else None) == status
    ours.close()
    assert status is None or type(error).__name__ in capfd.readouterr().err


@pytest.mark.parametrize(
    ("status", "last_words", "excused"),
    [
        (-signal.SIGSEGV, "", ""),
        (1, "", ""),
        (-signal.SIGKILL, "", "was killed from outside"),
        (NOT_OURS, "", "need not be its kernel's"),
        # Of a process that looks into a case: it has another status where the words are no fault.
        (DEAD_CONTEXT, "", ""),
        (DEAD_CONTEXT, "Crashed [runs] out: CUDA error: an illegal memory access was encountered", ""),
        (DEAD_CONTEXT, "Crashed [runs] out: CUDA_ERROR_ILLEGAL_ADDRESS", ""),
        (DEAD_CONTEXT, "Crashed [runs] out: CUDA error: unknown error", "no fault of a kernel"),
    ],
)
def test_whose_doing_an_end_is(status: int, last_words: str, excused: str) -> None:
    found = excuse(status, last_words)
    assert (excused in found) if excused else not found


def in_c(name: str) -> bytes | None:
    """A variable as the C library has it, which torch asks."""
    get = ctypes.CDLL(None).getenv
    get.restype = ctypes.c_char_p
    value: bytes | None = get(name.encode())
    return value


@pytest.mark.parametrize(
    ("value", "forgets", "left"), [(":4096:8", True, None), (":16:8", True, b":16:8"), (":4096:8", False, b":4096:8")]
)
def test_no_product_reads_the_size_of_its_workspace_anew(
    monkeypatch: pytest.MonkeyPatch, value: str, forgets: bool, left: bytes | None
) -> None:
    """What others have set stays; and where workspaces of two sizes could meet, all of it does."""
    done: list[str] = []
    ones, mm = torch.ones, torch.mm
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch, "mm", lambda a, b: done.append(str(in_c("CUBLAS_WORKSPACE_CONFIG"))) or mm(a, b))
    if forgets:
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: done.append("cleared"), raising=False)
    else:
        monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    process._settle_workspace()
    assert in_c("CUBLAS_WORKSPACE_CONFIG") == left
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == value
    assert done == (["b':4096:8'", "cleared"] if left is None else [])


_DETERMINISTIC = """
import sys
sys.path[:0] = {path!r}
import torch
from attn_fuzz.execution.process import set_up_process

set_up_process("cuda")
torch.use_deterministic_algorithms(True)
x = torch.ones(8, 8, device="cuda")
print((x @ x).sum().item())
"""


@pytest.mark.slow
@pytest.mark.cuda
@needs_cuda
def test_code_may_still_ask_for_deterministic_algorithms() -> None:
    """Which torch refuses to products without the variable."""
    code = _DETERMINISTIC.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "512.0"


def tell(connection: Connection) -> None:
    """What a new process finds."""
    os.write(1, b"out")
    os.write(2, f"error, {os.environ['LATER']}".encode())
    connection.send(({name: os.environ.get(name) for name in ("HAD", "HAD_NOT", "LATER")}, sys.path, os.getppid()))


@pytest.mark.slow
def test_a_new_process_finds_its_parents_environment_and_what_was_added(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A caller's own environment is theirs, also where it had the variable, and is as it is now for each process."""
    monkeypatch.setenv("HAD", "mine")
    monkeypatch.delenv("HAD_NOT", raising=False)
    found = []
    for later in ("first", "second"):
        monkeypatch.setenv("LATER", later)
        ours, theirs = new_process.context().Pipe(duplex=False)
        process = new_process.start(tell, (theirs,), {"HAD": "ours", "HAD_NOT": "ours"})
        assert ours.poll(60)
        found.append(ours.recv())
        process.join()
        assert process.exitcode == 0
        # As they are now, too, and not as they were when the first one was started.
        assert capfd.readouterr() == ("out", f"error, {later}")
    environments, paths, parents = zip(*found, strict=True)
    assert environments == tuple({"HAD": "ours", "HAD_NOT": "ours", "LATER": later} for later in ("first", "second"))
    assert os.environ["HAD"] == "mine"
    assert "HAD_NOT" not in os.environ
    assert set(map(tuple, paths)) == {tuple(sys.path)}
    if "forkserver" in multiprocessing.get_all_start_methods():
        # One process has imported everything, and both come of it.
        assert len(set(parents)) == 1
        assert os.getpid() not in parents


def compiling_threads(connection: Connection) -> None:
    """What torch's compiler is told in a process that runs cases."""
    set_up_process("cpu")
    connection.send(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS"))


@pytest.mark.slow
@pytest.mark.parametrize(("callers", "wanted"), [(None, "1"), ("3", "3")])
def test_a_campaigns_processes_compile_by_themselves(
    callers: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the caller's, nor where the caller has said otherwise."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    monkeypatch.delenv(name, raising=False) if callers is None else monkeypatch.setenv(name, callers)
    ours, theirs = new_process.context().Pipe(duplex=False)
    process = new_process.start(compiling_threads, (theirs,), {})
    assert ours.poll(60)
    assert ours.recv() == wanted
    process.join()
    assert os.environ.get(name) == callers


@pytest.mark.slow
def test_a_campaign_leaves_its_callers_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    job = Assignment(backend="loop", device="cpu", seed=1, levels=("kernel",), cases=1)
    Pool([job], 1, lambda tallies: None, lambda finding: None).run()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA driver error: invalid device context"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS"), True),
        (RuntimeError("Trying to backward through the graph a second time"), False),
        (NotImplementedError("no backward on CUDA"), False),
    ],
)
def test_what_is_a_failed_device(error: Exception, failed: bool) -> None:
    assert device_failed(error) is beyond_its_call(error) is failed


def test_a_rank_that_lacks_memory_says_so() -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert Failure.of(error).kind == "memory"
    assert Failure.of(RuntimeError("CUDA error: an illegal memory access was encountered")).kind == "error"


def test_an_error_is_one_line() -> None:
    assert in_words(ValueError("\nfirst\nsecond")) == "ValueError: first"
    assert in_words(KeyboardInterrupt()) == "KeyboardInterrupt: (no message)"
