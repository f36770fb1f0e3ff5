"""A script under NVIDIA's compute-sanitizer: started, ended when it takes too long, and its log read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

from attn_fuzz.findings.sanitized import CLEAN, ERRORS, NOT_RUN, ToolVerdict
from attn_fuzz.findings.scripts.run import Ran

EXECUTABLE: Final = "compute-sanitizer"

_ALWAYS: Final = ("--target-processes", "all", "--show-backtrace", "no", "--print-limit", "100")
"""Scripts of crashes and of ranks make their calls in processes of their own."""

_OPTIONS: Final = {
    # What torch asks of the driver fails now and then by design; accesses are reported whatever this says.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--racecheck-report", "analysis"),
}

_ENVIRONMENT: Final = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
"""Each tensor an allocation of its own: in one that torch's allocator shares out an overrun is none, and what an
earlier tensor has written counts as written."""

_PREFIX: Final = "========="
_SUMMARY: Final = re.compile(r"ERROR SUMMARY: ([\d,]+) errors?$")
_HAZARDS: Final = re.compile(r"RACECHECK SUMMARY: [\d,]+ hazards? displayed \(([\d,]+) errors?, ([\d,]+) warnings?\)")
_NOT_CHECKED: Final = "Internal Sanitizer Error"
_NO_CALL: Final = "terminated before first instrumented API call"
_ABOUT_THE_RUN: Final = (
    "COMPUTE-SANITIZER",
    "ERROR SUMMARY",
    "RACECHECK SUMMARY",
    "LEAK SUMMARY",
    "Target application returned an error",
    "Error: process didn't terminate successfully",
    "Error: couldn't find exit code",
    "Error: Target application " + _NO_CALL,
    "Error: No attachable process found",
    "Tracking kernels launched by child processes",
    _NOT_CHECKED,
)
"""Beginnings of lines that are no error of a kernel. That the script returned an error is what it is made for."""

_MOST_KINDS: Final = 4
"""Of errors that are kept; a kernel that is wrong in one place is so in every thread."""

_MOST_CHARACTERS: Final = 300


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, if it is installed: on PATH, or in the toolkit of CUDA_HOME."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(EXECUTABLE) or shutil.which(EXECUTABLE, path=os.path.join(home, "bin"))


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _records(log: str) -> list[str]:
    """Each thing that it says, in one line: what happened, and where; a record's other lines are indented."""
    records: list[list[str]] = []
    for line in log.splitlines():
        if not line.startswith(_PREFIX):
            continue
        said = line.removeprefix(_PREFIX)
        if said.startswith("  ") and records:
            records[-1].append(said.strip())
        elif said.strip():
            records.append([said.strip()])
    return [" ".join(lines[:2]) for lines in records]


def _kinds(errors: list[str]) -> tuple[str, ...]:
    """Kinds of errors, the most frequent first, with how often each was printed."""
    found = Counter(error[:_MOST_CHARACTERS] for error in errors).most_common()
    said = [f"{error} ({times} times)" if times > 1 else error for error, times in found[:_MOST_KINDS]]
    return (*said, f"{len(found) - _MOST_KINDS} more kinds") if len(found) > _MOST_KINDS else tuple(said)


def read_log(tool: str, log: str, status: int | None, said: str = "") -> ToolVerdict:
    """What a run of compute-sanitizer comes to.

    Args:
        tool: of ``sanitized.TOOLS``.
        log: what it wrote.
        status: its exit status; None where it was ended because it took too long.
        said: the last words of standard error, for a run that has no summary.
    """
    records = _records(log)
    found = tuple(record for record in records if not record.startswith(_ABOUT_THE_RUN))
    totals = [_number(match[1]) for record in records if (match := _SUMMARY.match(record))]
    hazards = [match for record in records if (match := _HAZARDS.match(record))]
    errors = sum(totals) + sum(_number(match[1]) for match in hazards)
    warnings = sum(_number(match[2]) for match in hazards)
    incomplete = [record for record in records if record.startswith(_NOT_CHECKED)]
    ended = bool(totals or hazards)
    if not ended:
        # What it had printed until then, if anything.
        errors = sum(not record.startswith("Warning") for record in found)
    why = ""
    if status is None:
        why = "it did not end in time"
    elif not ended:
        told = next((record for record in records if record.startswith("Error: ") and record not in found), "")
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        why = told.removeprefix("Error: ") or f"it ended {how} and without a summary" + (f": {said}" if said else "")
    elif incomplete:
        why = f"it left out {len(incomplete)} launches: {incomplete[0][:_MOST_CHARACTERS]}"
    elif any(_NO_CALL in record for record in records):
        why = "the script made no call on a GPU"
    verdict = ERRORS if errors else NOT_RUN if why else CLEAN
    return ToolVerdict(tool=tool, verdict=verdict, errors=errors, warnings=warnings, messages=_kinds([*found]), why=why)


def sanitize(executable: str, tool: str, script: str, seconds: float, folder: Path | None = None) -> ToolVerdict:
    """Runs a script under one tool.

    Args:
        executable: of compute-sanitizer.
        tool: of ``sanitized.TOOLS``.
        script: its source text.
        seconds: after which it is ended, with all processes that it has started.
        folder: the working directory; None for this one.
    """
    with tempfile.TemporaryDirectory() as place:
        path, log = Path(place) / "reproduce.py", Path(place) / "sanitizer.log"
        path.write_text(script)
        options = ("--tool", tool, "--log-file", str(log), *_ALWAYS, *_OPTIONS.get(tool, ()))
        status, out, error = _run([executable, *options, sys.executable, str(path)], seconds, folder)
        text = log.read_text(errors="replace") if log.is_file() else ""
    # What cannot even begin says so on standard output, as it does without a log.
    last = [line.strip(" =") for line in (error or out).strip().splitlines()][-1:]
    return dataclasses.replace(read_log(tool, text, status, *last), script=Ran(status, out.strip()).said)


def _run(command: list[str], seconds: float, folder: Path | None) -> tuple[int | None, str, str]:
    """Status, standard output and standard error; None where it was ended."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **_ENVIRONMENT},
        # A group of its own: the sanitizer starts the script, which may start others.
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=seconds)
        return process.returncode, out, error
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, *process.communicate()
    finally:
        # Also those that it has left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
