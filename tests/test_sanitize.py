"""Findings' scripts under compute-sanitizer: its logs are read, whatever becomes of it, and its verdict is kept.

Logs are as its manual and public reports of it have them (Compute Sanitizer 2022.4 to 2025.3); the executable is
none of NVIDIA's, but takes the same options.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
from commandline import FOUND, Run, sentence, stored_finding
from devices import needs_cuda

from attn_fuzz.campaign.retest import script_of
from attn_fuzz.findings import sanitized
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.ledger import Ledger
from attn_fuzz.findings.sanitized import CLEAN, ERRORS, NOT_RUN, TOOLS, Sanitized, ToolVerdict
from attn_fuzz.findings.scripts.sanitizer import find_sanitizer, read_log, sanitize
from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.reference.case import Case

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
=========     at out_of_bounds_kernel()+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x87654320 is out of bounds
=========     and is 124,310,666,263,776 bytes before the nearest allocation at 0x710fdc800000 of size 1,024 bytes
=========
========= Invalid __global__ write of size 16 bytes
=========     at out_of_bounds_kernel()+0x90
=========     by thread (1,0,0) in block (0,0,0)
=========     Address 0x87654330 is out of bounds
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call to cudaF.
=========
========= Error: process didn't terminate successfully
========= Target application returned an error
========= ERROR SUMMARY: 1,203 errors
========= ERROR SUMMARY: 1,200 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""

RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sumKernel(int *, int *)+0x90 in block_error.cu:41
=========     and Read access at sumKernel(int *, int *)+0x100 in block_error.cu:51 [508 hazards]
=========
========= Target application returned an error
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""

WARP = """========= COMPUTE-SANITIZER
========= Warning: Race reported between Write access at sumKernel(int *, int *)+0x90 in warp_error.cu:44
=========     and Read access at sumKernel(int *, int *)+0x120 in warp_error.cu:56 [31 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
"""

INITCHECK = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at vectorAdd(int *)+0x70 in memset_error.cu:41
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= ERROR SUMMARY: 1 error
"""

SYNCCHECK = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at myKernel(int *, int *)+0xe40 in test.cu:60
=========     by thread (32,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""

NO_ERRORS = """========= COMPUTE-SANITIZER
========= Target application returned an error
========= ERROR SUMMARY: 0 errors
"""

NO_HAZARDS = """========= COMPUTE-SANITIZER
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""

UNTRACKED = """========= COMPUTE-SANITIZER
========= Internal Sanitizer Error: The Sanitizer encountered an error while launching a_kernel and didn't track the launch. Errors might go undetected. (Unable to allocate enough memory to perform the requested operation)
========= ERROR SUMMARY: 0 errors
"""  # noqa: E501

NO_CALL = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
========= Tracking kernels launched by child processes requires the --target-processes all option.
"""

UNATTACHED = "========= Error: No attachable process found. compute-sanitizer timed-out.\n"


@pytest.mark.parametrize(
    ("tool", "log", "verdict", "errors", "said"),
    [
        ("memcheck", MEMCHECK, ERRORS, 1203, "write of size 16 bytes at out_of_bounds_kernel()+0x90 (2 times)"),
        ("racecheck", RACECHECK, ERRORS, 1, "block_error.cu:41 and Read access"),
        ("racecheck", WARP, CLEAN, 0, "1 warning: Warning: Race reported"),
        ("initcheck", INITCHECK, ERRORS, 1, "memory read of size 4 bytes at vectorAdd(int *)+0x70"),
        ("synccheck", SYNCCHECK, ERRORS, 1, "Divergent thread(s) in block. at myKernel"),
        ("memcheck", NO_ERRORS, CLEAN, 0, "memcheck: clean"),
        ("racecheck", NO_HAZARDS, CLEAN, 0, "racecheck: clean"),
        ("memcheck", UNTRACKED, NOT_RUN, 0, "it left out 1 launches: Internal Sanitizer Error"),
        ("memcheck", NO_CALL, NOT_RUN, 0, "Target application terminated before first"),
        ("memcheck", UNATTACHED, NOT_RUN, 0, "No attachable process found"),
        ("memcheck", "", NOT_RUN, 0, "it ended with status 1 and without a summary: a last word"),
        ("memcheck", MEMCHECK[: MEMCHECK.index("Program")], ERRORS, 2, "it ended with status 1"),
        ("memcheck", "noise\n\n\x00" + NO_ERRORS, CLEAN, 0, "clean"),
    ],
)
def test_a_log_is_read(tool: str, log: str, verdict: str, errors: int, said: str) -> None:
    found = read_log(tool, log, 1, "a last word")
    assert (found.verdict, found.errors) == (verdict, errors)
    assert said in str(found)
    # That the script returns an error is what it is made for.
    assert "returned an error" not in str(found)


def test_a_log_that_breaks_off_has_what_it_says() -> None:
    cut = MEMCHECK[: MEMCHECK.index("Program")]
    assert (read_log("memcheck", cut, None).errors, read_log("memcheck", cut, None).why) == (
        2,
        "it did not end in time",
    )
    assert read_log("memcheck", "", None).verdict == NOT_RUN
    assert "by signal 11" in read_log("memcheck", "", -11).why


def test_many_kinds_of_errors_are_few_lines() -> None:
    records = "".join(f"========= Invalid read\n=========     at kernel()+{place}\n" for place in range(9))
    found = read_log("memcheck", f"{records}========= ERROR SUMMARY: 9 errors\n", 1)
    assert len(found.messages) == 5
    assert found.messages[-1] == "5 more kinds"


# A run.

FAKE = '''#!{python}
"""Takes compute-sanitizer's options, runs what it is told to, and writes the log that a file of its folder has."""
import json, os, pathlib, subprocess, sys, time
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
with (here / "called").open("a") as called:
    called.write(json.dumps([words, os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")]) + "\\n")
how = (here / (given["--tool"] + ".how")).read_text()
if how == "crash":
    os.kill(os.getpid(), 11)
if how == "no start":
    sys.exit("========= Error: unknown option")
if how == "hang":
    # As a kernel that is a hundred times slower does: in a process of the sanitizer's own.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (here / "pid").write_text(str(child.pid))
    child.wait()
status = subprocess.run(words[-2:]).returncode
pathlib.Path(given["--log-file"]).write_text(how)
sys.exit(status)
'''

SCRIPT = 'print("a line")\nprint("the fault is there")\nraise SystemExit(1)\n'


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of such an executable, which finds nothing wrong until it is told otherwise."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "compute-sanitizer"
    path.write_text(FAKE.replace("{python}", sys.executable))
    path.chmod(0o755)
    for tool in TOOLS:
        (folder / f"{tool}.how").write_text(NO_HAZARDS if tool == "racecheck" else NO_ERRORS)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def found_on_cuda() -> Finding:
    """A finding of a GPU, in the store of the command's folder, whose script the ledger keeps."""
    stored_finding()
    finding = dataclasses.replace(FOUND, device="cuda")
    folder = Path(".attn-fuzz/findings")
    Store(folder).save(finding)
    script_of(Ledger(folder).note(finding), folder).write_text(SCRIPT)
    return finding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        (NO_ERRORS, 0, "memcheck: clean"),
        (MEMCHECK, 1, "memcheck: 1203 errors: Invalid __global__ write of size 16 bytes"),
        ("crash", 3, "memcheck: not run: it ended by signal 11 and without a summary"),
        ("no start", 3, "memcheck: not run: it ended with status 1 and without a summary: Error: unknown option"),
    ],
)
def test_a_finding_is_sanitized(how: str, status: int, said: str, fake: Path, attn_fuzz: Run) -> None:
    (fake / "memcheck.how").write_text(how)
    finding = found_on_cuda()
    done = attn_fuzz("sanitize", finding.id[:6])
    assert (done.status, said in done.out) == (status, True), done
    called = [json.loads(line) for line in (fake / "called").read_text().splitlines()]
    assert [words[words.index("--tool") + 1] for words, _ in called] == list(TOOLS)
    assert {alone for _, alone in called} == {"1"}
    shown = attn_fuzz("show", finding.id)
    assert said in shown.out
    kept = attn_fuzz("show", finding.id, "--json").json["sanitized"]
    assert {name: each["verdict"] for name, each in kept.items()}["racecheck"] == CLEAN
    if how != "crash" and how != "no start":
        assert kept["memcheck"]["script"] == "wrong"
    report = attn_fuzz("report", "--repeat", "0", "--output", "report.html")
    assert report.status == 0, report.err
    page = Path("report.html").read_text()
    assert "<h4>compute-sanitizer</h4>" in page
    assert said.partition(": ")[2].rpartition(": ")[2].split(" of size")[0] in page


@pytest.mark.slow
def test_a_finding_that_comes_from_another_machine_is_sanitized_here(fake: Path, attn_fuzz: Run) -> None:
    finding = found_on_cuda()
    (entry,) = Path(".attn-fuzz/findings/ledger").glob("*.json")
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "root": "../../../their/work"}))
    done = attn_fuzz("sanitize", finding.id, "--tool", "memcheck")
    assert (done.status, "memcheck: clean" in done.out) == (0, True), done


@pytest.mark.slow
def test_a_tool_that_takes_too_long_is_ended_with_all_that_it_started(fake: Path) -> None:
    (fake / "memcheck.how").write_text("hang")
    begun = time.monotonic()
    found = sanitize(str(fake / "compute-sanitizer"), "memcheck", SCRIPT, 0.5)
    assert (found.verdict, found.why) == (NOT_RUN, "it did not end in time")
    assert time.monotonic() - begun < 20
    status = Path(f"/proc/{(fake / 'pid').read_text()}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_tools_are_chosen_and_older_verdicts_stay(fake: Path, attn_fuzz: Run) -> None:
    finding = found_on_cuda()
    (fake / "initcheck.how").write_text(INITCHECK)
    assert attn_fuzz("sanitize", finding.id, "--tool", "memcheck", "--tool", "initcheck", "--json").status == 1
    (fake / "initcheck.how").write_text("crash")
    again = attn_fuzz("sanitize", finding.id, "--tool", "initcheck", "--json")
    assert (again.status, again.json["tools"][0]["verdict"]) == (3, NOT_RUN)
    store = Path(".attn-fuzz/findings")
    kept = sanitized.read(store, finding.id)
    assert kept is not None
    # One that came to no verdict says nothing against one that did.
    assert {name: each.verdict for name, each in kept.tools.items()} == {"memcheck": CLEAN, "initcheck": ERRORS}
    # A campaign that finds it again leaves it alone.
    Store(store).save(finding)
    assert sanitized.read(store, finding.id) == kept
    (store / "sanitized" / f"{finding.id}.json").write_text("{}")
    assert "is damaged" in sentence(attn_fuzz("show", finding.id))


def test_what_cannot_be_sanitized_is_one_sentence(
    attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    finding = found_on_cuda()
    assert find_sanitizer() is None
    assert "compute-sanitizer is not installed here" in sentence(attn_fuzz("sanitize", finding.id))
    stored_finding()
    assert "is of the CPU" in sentence(attn_fuzz("sanitize", FOUND.id))
    assert "unknown tool 'asan'; use memcheck" in sentence(attn_fuzz("sanitize", finding.id, "--tool", "asan"))
    assert "no finding nobody" in sentence(attn_fuzz("sanitize", "nobody"))


def test_a_script_that_is_not_there_yet_needs_the_gpu(
    fake: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    finding = found_on_cuda()
    for path in Path(".attn-fuzz/findings/ledger").glob("*.py"):
        path.unlink()
    assert "no CUDA device here" in sentence(attn_fuzz("sanitize", finding.id))


def test_a_file_of_a_newer_version_is_said_to_be_newer(tmp_path: Path) -> None:
    made = Sanitized(finding="a", entry="b", tools={"memcheck": ToolVerdict(tool="memcheck", verdict=CLEAN)})
    path = sanitized.write(tmp_path, made)
    assert sanitized.read(tmp_path, "a") == made
    assert sanitized.of_entry(tmp_path, "b") == [made]
    assert sanitized.of_entry(tmp_path, "c") == []
    assert sanitized.read(tmp_path, "z") is None
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(StoreError, match="newer version"):
        sanitized.read(tmp_path, "a")


@needs_cuda
@pytest.mark.cuda
def test_a_script_is_made_on_a_gpu(fake: Path, attn_fuzz: Run) -> None:
    """Of a kernel of its own file, whose mask is aligned top-left."""
    right = (Path(__file__).parent.parent / "examples" / "my_kernel.py").read_text()
    Path("kernel.py").write_text(right.replace("mask.tril(ke - kb - (qe - qb))", "mask.tril()"))
    store = Store(Path(".attn-fuzz/findings"))
    store.prepare()
    case = Case(level="kernel", lengths=(1,), key_lengths=(3,))
    changes = {"backend": "kernel.py:kernel", "device": "cuda", "symptom": "WrongOutput", "case": case}
    finding = dataclasses.replace(FOUND, **changes)  # type: ignore[arg-type]
    store.save(store.placed(finding))
    done = attn_fuzz("sanitize", finding.id, "--tool", "memcheck", "--json")
    assert (done.status, done.json["tools"][0]["script"]) == (0, "wrong"), done
