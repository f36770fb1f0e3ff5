"""The pytest plugin, in test runs of its own: devices, required GPUs, backends, profiles, and failures that replay."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import attn_fuzz.api
from attn_fuzz.backends import registry
from attn_fuzz.campaign.replay import verdict_on
from attn_fuzz.execution import process
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.regression_cases import RegressionCase
from attn_fuzz.oracle.examine import examine
from attn_fuzz.pytest_plugin import test_device as device_here
from attn_fuzz.reference.case import Case

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
SWAPPED = "fault:M51-swapped"
Run = Callable[..., pytest.RunResult]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What cases need, before pytester looks: it forgets what is imported later, and torch bears no second time."""
    for name in registry.backend_names():
        registry.load(name).kernel.why_unavailable(device_here().partition(":")[0])
    examine(Case(level="kernel", lengths=(1,)), registry.load(SWAPPED), "cpu")
    verdict_on(RegressionCase(name="", case=Case(level="kernel", lengths=(1,))), "loop", "cpu")


@pytest.fixture
def run(pytester: pytest.Pytester, request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a test file with the plugin in this process, whose Hypothesis profile comes back afterwards."""

    def inner(source: str, *options: str, conftest: str = "") -> pytest.RunResult:
        pytester.makeini("[pytest]\naddopts = --strict-markers")
        pytester.makeconftest(conftest)
        pytester.makepyfile(test_inner=source)
        return pytester.runpytest_inprocess("-p", "attn_fuzz.pytest_plugin", "-p", "no:xdist", "-rs", *options)

    yield inner
    settings.load_profile(request.config.getoption("--hypothesis-profile", None) or "dev")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Makes torch see so many GPUs; returns those that are chosen."""
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    # A torch with CUDA looks for a driver.
    monkeypatch.setattr(process, "_settle_workspace", lambda: None)
    return chosen


# A GPU where one is required.

SKIPPING = """
import pytest


@pytest.mark.cuda
def test_on_a_gpu():
    pytest.skip("no kernel for this GPU")


@pytest.mark.cuda
@pytest.mark.skipif(True, reason="another version")
def test_on_another_version():
    pass


@pytest.mark.cuda
def test_that_passes():
    pass


def test_elsewhere():
    pytest.skip("not on Sundays")
"""


def test_a_missing_gpu_that_is_required_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    result = run(SKIPPING, "--require-cuda")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--require-cuda was given, but torch sees no CUDA device here"])


def test_a_skipped_gpu_test_fails_where_a_gpu_is_required(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)
    result = run(SKIPPING, "--require-cuda")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    outcomes = result.parseoutcomes()
    # Where the plugin is installed it is loaded already, which pytest warns of.
    outcomes.pop("warnings", 0)
    assert outcomes.pop("failed", 0) + outcomes.pop("errors", 0) == 2
    assert outcomes == {"passed": 1, "skipped": 1}
    result.stdout.fnmatch_lines(
        ["*test_on_a_gpu was skipped although --require-cuda was given*no kernel for this GPU*"]
    )


def test_a_skipped_gpu_test_is_skipped_otherwise(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    result = run(SKIPPING)
    result.assert_outcomes(passed=1, skipped=3)
    assert result.ret == 0


def test_saved_cases_of_gpus_are_gpu_tests(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one that is skipped for want of a GPU fails where one is required."""
    gpus(monkeypatch, 0)
    folder = pytester.mkdir("regressions")
    for device in ("cpu", "cuda"):
        saved = RegressionCase(name=device, case=Case(level="kernel", lengths=(2,)), backend="loop", device=device)
        (folder / f"{device}.json").write_text(saved.to_json())
    result = run("", "-m", "cuda", "regressions")
    result.assert_outcomes(skipped=1, deselected=1)
    result.stdout.fnmatch_lines(["*found on cuda, and torch sees no CUDA device here*"])


# Devices.


def test_workers_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 3)
    taken = []
    for worker in range(7):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{worker}")
        taken.append(device_here())
    assert taken == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    assert device_here() == "cuda:0"
    gpus(monkeypatch, 0)
    assert device_here() == "cpu"


def test_a_worker_works_on_its_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = gpus(monkeypatch, 2)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    result = run("def test_device(attn_device):\n    assert attn_device == 'cuda:1'\n")
    result.assert_outcomes(passed=1)
    assert set(chosen) == {"1"}


def test_workers_take_a_gpu_for_all_tests_when_that_is_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = gpus(monkeypatch, 2)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    run("def test_theirs(): pass\n").assert_outcomes(passed=1)
    assert chosen == []
    run("def test_theirs(): pass\n", "--attn-gpu-per-worker").assert_outcomes(passed=1)
    assert chosen == ["cuda:1"]


# Kernels of one's own, by mark and by fixture.

MARKED = """
import pytest

LOOP = "my_package.kernels:varlen"


@pytest.mark.attn_fuzz(kernel=LOOP)
def test_empty():
    pass


@pytest.mark.attn_fuzz(kernel=LOOP, seconds=7, level="kernel")
class TestSeveral:
    def test_as_the_class(self):
        pass

    @pytest.mark.attn_fuzz(cases=3, dtype=["bf16"])
    def test_otherwise(self):
        pass

    @pytest.mark.attn_fuzz(cases=3)
    def test_says_more(self, attn_fuzz):
        assert attn_fuzz(seconds=1, device="cuda:0").cases == 5


def test_unmarked():
    pass
"""


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, dict[str, object]]]:
    """What is checked and how, where nothing is fuzzed: a kernel called ``wrong`` has a finding, the others none."""
    asked: list[tuple[object, dict[str, object]]] = []

    def check(kernel: object, **options: object) -> attn_fuzz.api.Verdict:
        asked.append((kernel, options))
        finding = Finding(
            backend=str(kernel),
            device="cpu",
            symptom="WrongGradK",
            checks=("budget",),
            messages=("dk is wrong",),
            case=Case(lengths=(2,)),
            original_case=Case(lengths=(2,)),
            cases_to_find=1,
            seconds_to_find=0.1,
        )
        found = [finding.to_dict()] if str(kernel).endswith("wrong") else []
        return attn_fuzz.api.Verdict({"cases": 5, "findings": found})

    monkeypatch.setattr(attn_fuzz.api, "check", check)
    return asked


def test_marks_name_kernels_and_say_how_long(
    run: Run, checks: list[tuple[object, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 2)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    run(MARKED, "--attn-seconds", "60").assert_outcomes(passed=5)
    assert {kernel for kernel, _ in checks} == {"my_package.kernels:varlen"}
    assert [options for _, options in checks] == [
        {"device": "cuda:1", "seconds": 60.0},
        {"device": "cuda:1", "seconds": 7, "level": "kernel"},
        {"device": "cuda:1", "cases": 3, "level": "kernel", "dtype": ["bf16"]},
        {"device": "cuda:0", "seconds": 1, "level": "kernel"},
    ]


def test_how_long_is_otherwise_for_the_command_line(
    run: Run, checks: list[tuple[object, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 0)
    empty = 'import pytest\n\n\n@pytest.mark.attn_fuzz(kernel="k.py:right")\ndef test_kernel(): pass\n'
    for options in ((), ("--attn-cases", "9")):
        run(empty, *options).assert_outcomes(passed=1)
    assert [options for _, options in checks] == [{"device": "cpu", "seconds": 20.0}, {"device": "cpu", "cases": 9}]


def marked(options: str, lines: str = "pass", fixtures: str = "") -> str:
    """A test file with one marked test."""
    return f"import pytest\n\n\n@pytest.mark.attn_fuzz({options})\ndef test_kernel({fixtures}):\n    {lines}\n"


@pytest.mark.usefixtures("checks")
def test_findings_fail_marked_tests(run: Run) -> None:
    for source in (marked('kernel="k.py:wrong"'), marked("", 'attn_fuzz("k.py:wrong")', "attn_fuzz")):
        result = run(source)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*1 findings in 5 cases:", "*dk is wrong"])
        # Lines of this project's own tell a user nothing.
        assert "pytest_plugin.py" not in result.stdout.str()


def test_a_test_that_fails_by_itself_is_not_checked(run: Run, checks: list[tuple[object, dict[str, object]]]) -> None:
    run(marked('kernel="k.py:right"', "assert False")).assert_outcomes(failed=1)
    run(marked('kernel="k.py:right"', "pytest.importorskip('none_such')")).assert_outcomes(skipped=1)
    assert checks == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (marked("seconds=5"), "names no kernel"),
        (marked("seconds=5", "attn_fuzz()", "attn_fuzz"), "names no kernel"),
        (marked("'k.py:right'"), "takes options by name only"),
    ],
)
def test_a_mark_without_a_kernel_is_told(source: str, said: str, run: Run) -> None:
    result = run(source)
    result.assert_outcomes(failed=1)
    assert said in result.stdout.str()


def test_a_check_on_a_gpu_is_skipped_where_there_is_none(
    run: Run, checks: list[tuple[object, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 0)
    run(marked('kernel="k.py:right", device="cuda"')).assert_outcomes(skipped=1)
    gpus(monkeypatch, 1)
    run(marked('kernel="k.py:right", device="cuda"')).assert_outcomes(passed=1)
    assert [options["device"] for _, options in checks] == ["cuda:0"]


# Backends.

NAMES = "def test_name(attn_backend):\n    print('<' + attn_backend + '>')\n"


def printed(result: pytest.RunResult) -> list[str]:
    return re.findall("<(.*)>", result.stdout.str())


def test_every_backend_is_a_parameter(run: Run) -> None:
    assert printed(run(NAMES, "-s")) == list(registry.kernel_names())


def test_backends_that_are_asked_for_are_the_only_ones(run: Run) -> None:
    asked = ("--attn-backend", "loop", "--attn-backend", "fault:M01")
    assert printed(run(NAMES, "-s", *asked)) == ["loop", "fault:M01"]


@pytest.mark.parametrize(
    ("name", "told"), [("flesh", "unknown backend 'flesh'"), ("none.py:kernel", "there is no file none.py")]
)
def test_an_unknown_backend_is_one_sentence(name: str, told: str, run: Run) -> None:
    result = run(NAMES, "--attn-backend", name)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert told in result.stderr.str()
    assert len(result.stderr.str().strip().splitlines()) == 1


# Profiles of the project itself, and what other repositories see of it.

OURS = (HERE.parent / "conftest.py").read_text().replace('pytest_plugins = ["attn_fuzz.pytest_plugin"]', "")

EXAMPLES = """
from hypothesis import settings


def test_examples():
    print(f"<{settings.default.max_examples} {settings.default.deadline} {settings.default.print_blob}>")
"""


@pytest.mark.parametrize(("profile", "examples"), [(None, 12), ("dev", 12), ("ci", 100), ("nightly", 5000)])
def test_profiles(profile: str | None, examples: int, run: Run) -> None:
    options = () if profile is None else ("--hypothesis-profile", profile)
    assert printed(run(EXAMPLES, "-s", *options, conftest=OURS)) == [f"{examples} None True"]


STATE = """
import os

import torch
from hypothesis import settings


def test_state():
    torch.set_num_threads(3)
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    print(f"<{flags} {settings.default.max_examples} {sorted(set(os.environ) - BEFORE)}>")


def test_threads():
    print(f"<{torch.get_num_threads()}>")
"""


@pytest.fixture
def others_state() -> Iterator[None]:
    """What a host's other tests may have set, and this process's own afterwards."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    settings.load_profile("default")
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags[:2]
    torch.set_num_threads(flags[2])


@pytest.mark.usefixtures("others_state")
def test_loading_it_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither threads, TF32, Hypothesis profiles nor the environment of the other tests of a repository."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    before = f"BEFORE = {set(os.environ) | {'PYTEST_CURRENT_TEST'}!r}\n"
    assert printed(run(before + STATE, "-s")) == [f"(True, True) {settings.default.max_examples} []", "3"]


@pytest.mark.usefixtures("others_state", "checks")
def test_marked_tests_and_saved_cases_change_nothing_for_others(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(3)
    saved = RegressionCase(name="kept", case=Case(level="kernel", lengths=(2,)), backend="loop", device="cpu")
    pytester.mkdir("regressions").joinpath("kept.json").write_text(saved.to_json())
    source = marked('kernel="k.py:right"') + f"\n\nBEFORE = {set(os.environ) | {'PYTEST_CURRENT_TEST'}!r}\n" + STATE
    source = source.replace("torch.set_num_threads(3)", "")
    result = run(source, "-s", "regressions", ".")
    result.assert_outcomes(passed=4)
    assert printed(result) == [f"(True, True) {settings.default.max_examples} []", "3"]


@pytest.mark.slow
def test_loading_it_imports_nothing_heavy() -> None:
    program = "import sys, attn_fuzz.pytest_plugin; print('torch' in sys.modules, 'hypothesis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# Failures.


FIRST_FAILURE = """
from hypothesis import Phase, settings

settings.register_profile("first", deadline=None, derandomize=False, print_blob=True, phases=[Phase.generate])
"""


@pytest.mark.slow
def test_a_failure_of_the_differential_suite_replays(pytester: pytest.Pytester) -> None:
    """The case is printed, ready to be saved, and Hypothesis's own way to draw it again.

    In a process of its own, because torch cannot be imported piecemeal twice; unshrunk, because that takes longest.
    """
    pytester.makeconftest(FIRST_FAILURE)
    pytester.makepyfile(test_suite=(HERE / "test_differential.py").read_text())
    options = ("--attn-backend", SWAPPED, "-k", "kernel", "--hypothesis-seed", "1", "--hypothesis-profile", "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE.parent))
        result = pytester.runpytest_subprocess("-p", "attn_fuzz.pytest_plugin", "-p", "no:xdist", *options)
    result.assert_outcomes(failed=1, deselected=1)
    output = result.stdout.str()
    assert "@reproduce_failure(" in output
    # pytest prints it again in its summary where it sees a CI machine.
    (text,) = set(re.findall(r"keep it: python -m attn_fuzz save '(\{\".*)' NAME", output))
    first = examine(Case.from_json(text), registry.load(SWAPPED), "cpu").first
    assert first is not None
    assert type(first).__name__ in output


DRAWS = """
from hypothesis import given, strategies as st


@given(number=st.integers(0, 10**9))
def test_draws(number):
    print(f"<{number}>")
"""


def test_a_seed_draws_again_what_it_drew(run: Run) -> None:
    seeds = ("1", "1", "2")
    first, again, other = (printed(run(DRAWS, "-s", "--hypothesis-seed", seed, conftest=OURS)) for seed in seeds)
    assert len(first) == 12
    assert first == again
    assert first != other


# Saved cases.


SAVED = '{"case": {"level": "kernel", "lengths": [2], "head_dim": 2}, "device": "cpu", '


def test_saved_cases_are_tests_from_any_folder(pytester: pytest.Pytester, tmp_path: Path) -> None:
    """pytest's root is another folder, that of its command, and the kernel is found all the same."""
    kernel = (HERE.parent / "examples" / "my_kernel.py").read_text()
    wrong = "\n\ndef wrong(*arguments, **options):\n    return 1.5 * kernel(*arguments, **options)\n"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "my.py").write_text(kernel + wrong)
    folder = tmp_path / "tests" / "regressions"
    folder.mkdir(parents=True)
    (folder / "red.json").write_text(SAVED + '"backend": "kernels/my.py:wrong", "root": "../.."}')
    (folder / "green.json").write_text(SAVED + '"backend": "kernels/my.py:kernel", "root": "../.."}')
    (folder / "newer.json").write_text(SAVED + '"backend": "kernels/my.py:kernel", "format": 99}')
    here = ("--rootdir", str(pytester.path), "-p", "attn_fuzz.pytest_plugin", "-p", "no:xdist")
    result = pytester.runpytest_inprocess(str(folder), *here)
    result.assert_outcomes(failed=2, passed=1)
    output = result.stdout.str()
    assert "newer.json: it was written by a newer version (format 99); upgrade attn-fuzz" in output
    assert "pytest_plugin.py" not in output
