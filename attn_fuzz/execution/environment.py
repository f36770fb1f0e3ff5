"""Where something was measured: device, versions, date, commit."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

import torch

KERNEL_PACKAGES: Final = ("flash-attn", "flash-attn-4", "xformers", "nvidia-cudnn-frontend", "jax", "triton")
"""Where kernels under test come from, beside torch."""


def device_name(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"CPU {platform.machine()}"


def package_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.lru_cache(maxsize=1)
def commit() -> str:
    """This checkout's commit, ``+changes`` behind it when files differ.

    ``ATTN_FUZZ_COMMIT`` says it where the files travel without their history; otherwise that is ``unknown``.
    """
    if told := os.environ.get("ATTN_FUZZ_COMMIT"):
        return told
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / "reference").is_dir():
        # Installed: a repository around it would be somebody else's.
        return "unknown"

    def git(*arguments: str) -> str:
        run = ["git", "-C", str(root), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions_of(environment: dict[str, Any]) -> str:
    """The versions of torch and of the packages with kernels, in words."""
    return ", ".join(f"{name} {environment[name]}" for name in ("torch", *KERNEL_PACKAGES) if name in environment)


def environment(device: str) -> dict[str, str]:
    """What belongs beside every figure."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hypothesis": package_version("hypothesis"),
        **{name: package_version(name) for name in KERNEL_PACKAGES},
    }
    return {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        **{name: version for name, version in versions.items() if version},
    }
