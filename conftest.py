"""The project's own test runs: Hypothesis profiles, processes set up as those of campaigns, tests taken in turns."""

from __future__ import annotations

import itertools
import os
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, settings

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
        # It hands out tests and runs none: torch, which takes seconds to import, is the workers' matter.
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


LONGEST: Final = (
    "test_backend_agrees_with_reference[flex_compiled",
    "test_nor_are_they_on_a_gpu[",
    "test_wheel.py",
    "test_triton_example.py",
    "test_every_backend_that_takes_them_is_right_on_a_gpu",
    "test_saved_cases_are_clean[flex_compiled",
    "test_backend_agrees_with_reference[",
)
"""Words in the names of tests that take a minute and more, on GPUs most of them, where compilers do."""


def longest_first(names: list[str], workers: int) -> list[int]:
    """An order of tests in which each worker's share, one after another and of even size, begins with long ones.

    Args:
        names: of the tests.
        workers: how many share them.
    """

    def rank(name: str) -> int:
        return next((place for place, word in enumerate(LONGEST) if word in name), len(LONGEST))

    ranks = [rank(name) for name in names]
    long = sorted((index for index in range(len(names)) if ranks[index] < len(LONGEST)), key=lambda i: ranks[i])
    rest = (index for index in range(len(names)) if ranks[index] == len(LONGEST))
    order: list[int] = []
    for worker in range(workers):
        share = (len(names) - len(order)) // (workers - worker)
        own = long[worker::workers][:share]
        order += [*own, *itertools.islice(rest, share - len(own))]
    # Where some share is full of long ones others are left.
    return [*order, *sorted({*range(len(names))} - {*order})]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """None of the longest tests is left for the end, when the other workers have nothing to do any more."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        items[:] = [items[index] for index in longest_first([item.nodeid for item in items], workers)]
