"""Loads the differential suite's plugin."""

pytest_plugins = ["attn_fuzz.pytest_plugin"]
