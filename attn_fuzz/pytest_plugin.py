"""pytest plugin: devices for xdist workers, ``--require-cuda``, backends as parameters, saved cases as tests.

Installed, it is there in every test run, and costs and changes nothing until it is asked for: torch is imported, and
the process set up, when a test takes one of its fixtures or an option is given. Saved cases in ``regressions/*.json``
that name a backend are tests: each fails while the case does, and passes once the backend is mended. From a checkout,
``conftest.py`` loads it with ``pytest_plugins = ["attn_fuzz.pytest_plugin"]``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from attn_fuzz.api import Verdict

REQUIRE_CUDA = "--require-cuda"

SECONDS = 20.0
"""For a check that says neither how long nor how often: short enough for a test run, some dozens of cases."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the differential suite."""
    group = parser.getgroup("attn-fuzz")
    group.addoption(
        REQUIRE_CUDA, action="store_true", help="fail when there is no CUDA device, and when a CUDA test is skipped"
    )
    group.addoption(
        "--attn-backend", action="append", default=None, help="backend of the differential suite; repeat for several"
    )
    group.addoption("--attn-seconds", type=float, default=None, help=f"time for each check (default: {SECONDS:.0f})")
    group.addoption("--attn-cases", type=int, default=None, help="cases for each check and mode, instead of a time")


def _worker_number() -> int:
    """0 in the main process, N in xdist worker gwN."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw") or 0)


def pytest_configure(config: pytest.Config) -> None:
    """The marker; no GPU is an error where one is required, and so is a backend that there is not."""
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    if config.getoption(REQUIRE_CUDA):
        _require_cuda()
    _require_backends(config.getoption("--attn-backend") or ())


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--require-cuda was given, but torch sees no CUDA device here")


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


@pytest.fixture
def attn_fuzz(request: pytest.FixtureRequest, attn_device: str) -> Callable[..., Verdict]:
    """Checks a kernel of one's own, and fails with what it found: ``attn_fuzz(my_kernel)``.

    The function takes what ``attn_fuzz.check`` takes and returns its verdict. How long is for the test to say, else for
    ``--attn-seconds`` and ``--attn-cases``.
    """

    def checked(kernel: Callable[..., Any] | str, **options: Any) -> Verdict:
        from attn_fuzz.api import check

        if not {"seconds", "cases"} & set(options):
            cases, seconds = (request.config.getoption(f"--attn-{name}") for name in ("cases", "seconds"))
            options |= {"cases": cases} if cases is not None else {"seconds": seconds or SECONDS}
        verdict = check(kernel, **{"device": attn_device, **options})
        verdict.raise_if_found()
        return verdict

    return checked


@pytest.fixture(scope="session")
def attn_device() -> str:
    """Device that this process tests on; the process is set up for it (``execution.process.set_up_process``)."""
    from attn_fuzz.execution.process import set_up_process

    device = test_device()
    set_up_process(device)
    return device


class StillFails(Exception):
    """A saved case that its backend still fails; the message is for people."""


class SavedCase(pytest.Item):
    """A saved case on the backend that it was found on."""

    def runtest(self) -> None:
        """Raises StillFails where it is not clean."""
        from attn_fuzz.campaign.replay import verdict_on
        from attn_fuzz.execution.process import set_up_process
        from attn_fuzz.findings.regression_cases import read_regression_case

        saved = read_regression_case(self.path)
        device = "cpu" if saved.device == "cpu" else test_device()
        if saved.device != "cpu" and device == "cpu":
            pytest.skip(f"it was found on {saved.device}, and torch sees no CUDA device here")
        set_up_process(device)
        # Of a version that did not say in which folder it was.
        saved = saved.from_anywhere(saved.root or self.config.rootpath)
        verdict = verdict_on(saved, saved.backend, device)
        if isinstance(verdict, str):
            pytest.skip(verdict)
        if verdict.symptoms:
            lines = [str(symptom) for symptom in verdict.symptoms]
            raise StillFails("\n".join([f"{saved.backend} still fails {saved.case.to_json()}", *lines]))

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
            yield SavedCase.from_parent(self, name=self.path.stem)


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
