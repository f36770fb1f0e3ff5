"""pytest plugin: checks of one's own kernels, ``--require-cuda``, GPUs for xdist workers, saved cases as tests.

``@pytest.mark.attn_fuzz(kernel="my_package.kernels:varlen", seconds=20)`` makes an empty test one that fuzzes that
kernel; the fixture ``attn_fuzz`` does it where a test has more to say. Both check in processes of their own.

Installed, the plugin is there in every test run, and costs and changes nothing until it is asked for: torch is imported
when a test is marked or takes a fixture, and only ``attn_device`` sets up the process of the tests. Saved cases in
``regressions/*.json`` that name a backend are tests: each fails while the case does, and passes once the backend is
mended. From a checkout, ``conftest.py`` loads the plugin with ``pytest_plugins = ["attn_fuzz.pytest_plugin"]``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from attn_fuzz.api import Verdict

REQUIRE_CUDA = "--require-cuda"
GPU_PER_WORKER = "--attn-gpu-per-worker"

MARK = "attn_fuzz"

SECONDS = 20.0
"""For a check that says neither how long nor how often: short enough for a test run, some dozens of cases."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """What may be said on pytest's command line."""
    group = parser.getgroup("attn-fuzz")
    group.addoption(
        REQUIRE_CUDA, action="store_true", help="fail when there is no CUDA device, and when a CUDA test is skipped"
    )
    group.addoption(
        "--attn-backend", action="append", default=None, help="backend of the differential suite; repeat for several"
    )
    group.addoption(
        GPU_PER_WORKER,
        action="store_true",
        help="make one GPU the current one of each xdist worker, in turn, for all of its tests",
    )
    group.addoption("--attn-seconds", type=float, default=None, help=f"time for each check (default: {SECONDS:.0f})")
    group.addoption("--attn-cases", type=int, default=None, help="cases for each check and mode, instead of a time")


def _worker_number() -> int:
    """0 in the main process, N in xdist worker gwN."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw") or 0)


def pytest_configure(config: pytest.Config) -> None:
    """The marks; no GPU is an error where one is required, and so is a backend that there is not."""
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line(
        "markers",
        f"{MARK}(kernel='MODULE:FUNCTION', seconds=..., cases=..., device=..., ...): fuzz that kernel, with options of "
        "attn_fuzz.check; of a test that takes the fixture attn_fuzz, what it has unless the test says otherwise",
    )
    if config.getoption(REQUIRE_CUDA):
        _require_cuda()
    if config.getoption(GPU_PER_WORKER):
        _take_gpu()
    _require_backends(config.getoption("--attn-backend") or ())


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--require-cuda was given, but torch sees no CUDA device here")


def _take_gpu() -> None:
    """One GPU for all tests of this worker; on a machine without any there is none to take."""
    device = test_device()
    if device != "cpu":
        import torch

        torch.cuda.set_device(torch.device(device))


def _require_backends(names: list[str] | tuple[()]) -> None:
    if not names:
        return
    from attn_fuzz.backends import registry
    from attn_fuzz.backends.kernel import BackendUnavailable
    from attn_fuzz.backends.registry import UnknownBackend

    for name in names:
        try:
            registry.load(name)
        except (UnknownBackend, BackendUnavailable) as error:
            raise pytest.UsageError(str(error)) from None


def test_device() -> str:
    """The device of this process: xdist workers take GPUs in turn."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{_worker_number() % torch.cuda.device_count()}"


# pytest would collect it in modules that import it.
test_device.__test__ = False  # type: ignore[attr-defined]


def suite_backends(config: pytest.Config) -> list[str]:
    """Backends of the differential suite: those asked for, else every kernel adapter."""
    from attn_fuzz.backends import registry

    return list(config.getoption("--attn-backend") or registry.backend_names())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fills the parameter ``attn_backend`` with backend names."""
    if "attn_backend" in metafunc.fixturenames:
        metafunc.parametrize("attn_backend", suite_backends(metafunc.config))


LENGTHS = {"seconds", "cases"}
"""The two options that say how long a check is: one of them overrides both."""


def _joined(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of which later ones count more."""
    options: dict[str, Any] = {}
    for layer in layers:
        if LENGTHS & set(layer):
            options = {key: value for key, value in options.items() if key not in LENGTHS}
        options |= layer
    return options


def _marked(item: pytest.Item) -> dict[str, Any]:
    """Options of a test's marks: what stands on the function counts more than what stands on its class or module."""
    marks = [*item.iter_markers(MARK)][::-1]
    if any(mark.args for mark in marks):
        pytest.fail(f"@pytest.mark.{MARK} takes options by name only: kernel='MODULE:FUNCTION'", pytrace=False)
    return _joined(*(mark.kwargs for mark in marks))


def _lengths_asked_for(config: pytest.Config) -> dict[str, Any]:
    """How long a check is where its test does not say."""
    cases, seconds = (config.getoption(f"--attn-{name}") for name in ("cases", "seconds"))
    return {"cases": cases} if cases is not None else {"seconds": seconds or SECONDS}


def _checked(item: pytest.Item, given: Mapping[str, Any]) -> Verdict:
    """The verdict on a test's kernel; fails with what was found."""
    __tracebackhide__ = True
    from attn_fuzz.api import check

    options = _joined(_lengths_asked_for(item.config), _marked(item), given)
    kernel, device = options.pop("kernel", None), options.pop("device", None) or test_device()
    if kernel is None:
        pytest.fail(f"{item.nodeid} names no kernel: say @pytest.mark.{MARK}(kernel='MODULE:FUNCTION')", pytrace=False)
    if device.startswith("cuda") and test_device() == "cpu":
        pytest.skip(f"it asks for {device}, and torch sees no CUDA device here")
    verdict = check(kernel, device=test_device() if device == "cuda" else device, **options)
    verdict.raise_if_found()
    return verdict


@pytest.fixture
def attn_fuzz(request: pytest.FixtureRequest) -> Callable[..., Verdict]:
    """Checks a kernel of one's own, and fails with what it found: ``attn_fuzz(my_kernel)``.

    The function takes what ``attn_fuzz.check`` takes and returns its verdict. What it is not given, its test's mark
    says, else ``--attn-seconds`` and ``--attn-cases``; the device is this xdist worker's GPU, or the CPU.
    """

    def checked(kernel: Callable[..., Any] | str | None = None, **options: Any) -> Verdict:
        __tracebackhide__ = True
        return _checked(request.node, options if kernel is None else {"kernel": kernel, **options})

    return checked


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Checks the kernel of a test that is marked and leaves that to its mark, once its own lines have passed."""
    result = yield
    if item.get_closest_marker(MARK) is not None and MARK not in getattr(item, "fixturenames", ()):
        from attn_fuzz.api import CheckError, FoundError

        try:
            _checked(item, {})
        except (CheckError, FoundError) as error:
            # No line of the test's is to blame.
            pytest.fail(str(error), pytrace=False)
    return result


@pytest.fixture(scope="session")
def attn_device() -> str:
    """Device that this process tests on; the process is set up for it (``execution.process.set_up_process``)."""
    from attn_fuzz.execution.process import set_up_process

    device = test_device()
    set_up_process(device)
    return device


@contextlib.contextmanager
def _set_up(device: str) -> Iterator[None]:
    """The process as campaigns have it, and afterwards as the other tests had it."""
    import torch

    from attn_fuzz.execution.process import set_up_process

    matmul, reduced = torch.backends.cuda.matmul, "allow_{}_reduced_precision_reduction"
    flags = [(matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    flags += [(matmul, reduced.format(dtype)) for dtype in ("bf16", "fp16")]
    before = [(owner, name, getattr(owner, name)) for owner, name in flags]
    threads, variables = torch.get_num_threads(), set(os.environ)
    set_up_process(device)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for owner, name, value in before:
            setattr(owner, name, value)
        for name in set(os.environ) - variables:
            del os.environ[name]


class StillFails(Exception):
    """A saved case that its backend still fails; the message is for people."""


class SavedCase(pytest.Item):
    """A saved case on the backend that it was found on."""

    def runtest(self) -> None:
        """Raises StillFails where it is not clean."""
        from attn_fuzz.campaign.replay import verdict_on
        from attn_fuzz.findings.regression_cases import read_regression_case

        saved = read_regression_case(self.path)
        device = "cpu" if saved.device == "cpu" else test_device()
        if saved.device != "cpu" and device == "cpu":
            pytest.skip(f"it was found on {saved.device}, and torch sees no CUDA device here")
        # Of a version that did not say in which folder it was.
        saved = saved.from_anywhere(saved.root or self.config.rootpath)
        with _set_up(device):
            verdict = verdict_on(saved, saved.backend, device)
        if isinstance(verdict, str):
            pytest.skip(verdict)
        if verdict.symptoms:
            lines = [str(symptom) for symptom in verdict.symptoms]
            raise StillFails("\n".join([f"{saved.backend} still fails {saved.case.in_short()}", *lines]))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The message alone where the case fails or cannot be run: its traceback is this plugin's."""
        from attn_fuzz.backends.kernel import BackendUnavailable
        from attn_fuzz.backends.registry import UnknownBackend
        from attn_fuzz.reference.case import CaseError

        said = (StillFails, CaseError, BackendUnavailable, UnknownBackend)
        return str(excinfo.value) if isinstance(excinfo.value, said) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where it is from."""
        return self.path, None, f"saved case {self.name}"


class SavedCases(pytest.File):
    """A file of ``regressions``."""

    def collect(self) -> Iterator[SavedCase]:
        """One test, where the case names the backend that it was found on."""
        try:
            data = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise self.CollectError(f"{self.path} is no saved case: {error}") from None
        if isinstance(data, dict) and data.get("backend"):
            item = SavedCase.from_parent(self, name=self.path.stem)
            if str(data.get("device", "cpu")).startswith("cuda"):
                item.add_marker("cuda")
            yield item


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SavedCases | None:
    """Saved cases."""
    if file_path.suffix == ".json" and file_path.parent.name == "regressions":
        return SavedCases.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With ``--require-cuda``, a skipped test that is marked ``cuda`` is a failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and item.config.getoption(REQUIRE_CUDA) and item.get_closest_marker("cuda") is not None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped although --require-cuda was given: {report.longrepr}"
