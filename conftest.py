"""The project's own test runs: Hypothesis profiles, processes set up as those of campaigns, tests taken in turns."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

from attn_fuzz.execution.child_memory import fill_in_children

# Where the package is installed its entry point has loaded the plugin, under the same name.
pytest_plugins = ["attn_fuzz.pytest_plugin"]


def register_profiles() -> None:
    """``dev`` is quick, ``ci`` thorough, ``nightly`` as long as a night allows; all print the reproduction blob."""
    # Hypothesis derandomises where it sees a CI machine, and then ignores --hypothesis-seed.
    common = {
        "deadline": None,
        "derandomize": False,
        "print_blob": True,
        "suppress_health_check": [HealthCheck.too_slow],
    }
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
    settings.register_profile("dev", settings(max_examples=12, **common))  # type: ignore[arg-type]
    settings.register_profile("ci", settings(max_examples=100, **common))  # type: ignore[arg-type]
    settings.register_profile("nightly", settings(max_examples=5000, phases=phases, **common))  # type: ignore[arg-type]


register_profiles()


def pytest_configure(config: pytest.Config) -> None:
    """The profile ``dev`` unless another is asked for; one thread, plain float32, one GPU per xdist worker, in turn."""
    if getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput"):
        # It hands out tests and runs none: torch, which takes seconds to import, is the workers' matter. These have
        # memory filled for certain, as campaigns' processes have.
        os.environ.update(fill_in_children(os.environ))
        return
    # Not before pytest has loaded the plugin, whose assertions it rewrites.
    from attn_fuzz.execution.process import set_up_process
    from attn_fuzz.pytest_plugin import test_device

    if not config.getoption("--hypothesis-profile", None):
        settings.load_profile("dev")
    set_up_process(test_device())


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Where several processes share the suite and nothing else was asked for: long tests of one file end up in a row.

    Here and not in ``addopts``, which could not be read with ``-p no:xdist``.
    """
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"
