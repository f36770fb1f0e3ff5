"""Loads the differential suite's plugin, and has the workers of xdist take tests from one another."""

from __future__ import annotations

import pytest

pytest_plugins = ["attn_fuzz.pytest_plugin"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Where several processes share the suite and nothing else was asked for: long tests of one file end up in a row.

    Here and not in ``addopts``, which could not be read with ``-p no:xdist``.
    """
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"
