"""pytest plugin: devices for xdist workers, ``--require-cuda``, Hypothesis profiles, backends as parameters.

A project's ``conftest.py`` loads it with ``pytest_plugins = ["attn_fuzz.pytest_plugin"]``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.registry import UnknownBackend
from attn_fuzz.campaign.plan import default_device
from attn_fuzz.execution.process import set_up_process

REQUIRE_CUDA = "--require-cuda"


def register_profiles() -> None:
    """``dev`` is quick, ``ci`` thorough, ``nightly`` as long as a night allows; all print the reproduction blob."""
    # Hypothesis derandomises where it sees a CI machine, and then ignores --hypothesis-seed.
    common = {
        "deadline": None,
        "derandomize": False,
        "print_blob": True,
        "suppress_health_check": [HealthCheck.too_slow],
    }
    settings.register_profile("dev", settings(max_examples=20, **common))  # type: ignore[arg-type]
    settings.register_profile("ci", settings(max_examples=100, **common))  # type: ignore[arg-type]
    settings.register_profile(
        "nightly",
        settings(max_examples=5000, phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink), **common),  # type: ignore[arg-type]
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the differential suite."""
    group = parser.getgroup("attn-fuzz")
    group.addoption(
        REQUIRE_CUDA, action="store_true", help="fail when there is no CUDA device, and when a CUDA test is skipped"
    )
    group.addoption(
        "--attn-backend", action="append", default=None, help="backend of the differential suite; repeat for several"
    )


def _worker_number() -> int:
    """0 in the main process, N in xdist worker gwN."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw") or 0)


def pytest_configure(config: pytest.Config) -> None:
    """Profiles; one GPU per xdist worker, in turn; no GPU is an error where one is required."""
    register_profiles()
    if not config.getoption("--hypothesis-profile", None):
        settings.load_profile("dev")
    if config.getoption(REQUIRE_CUDA) and not torch.cuda.is_available():
        raise pytest.UsageError("--require-cuda was given, but torch sees no CUDA device here")
    for name in config.getoption("--attn-backend") or ():
        try:
            registry.load(name)
        except (UnknownBackend, BackendUnavailable) as error:
            raise pytest.UsageError(str(error)) from None
    set_up_process(test_device())


def test_device() -> str:
    """The device of this process: xdist workers take GPUs in turn."""
    if default_device() == "cpu":
        return "cpu"
    return f"cuda:{_worker_number() % torch.cuda.device_count()}"


# pytest would collect it in modules that import it.
test_device.__test__ = False  # type: ignore[attr-defined]


def suite_backends(config: pytest.Config) -> list[str]:
    """Backends of the differential suite: those asked for, else every kernel adapter."""
    return list(config.getoption("--attn-backend") or registry.backend_names())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fills the parameter ``attn_backend`` with backend names."""
    if "attn_backend" in metafunc.fixturenames:
        metafunc.parametrize("attn_backend", suite_backends(metafunc.config))


@pytest.fixture(scope="session")
def attn_device() -> str:
    """Device that this process tests on."""
    return test_device()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With ``--require-cuda``, a skipped test that is marked ``cuda`` is a failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and item.config.getoption(REQUIRE_CUDA) and item.get_closest_marker("cuda") is not None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped although --require-cuda was given: {report.longrepr}"
