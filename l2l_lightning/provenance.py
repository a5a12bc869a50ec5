"""Where a result came from: commit, versions, device and time."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from l2l_lightning import __version__

_PACKAGE = Path(__file__).resolve().parent
COMMIT_VARIABLE = "L2L_COMMIT"


@functools.cache
def commit() -> str:
    """The git hash of the checkout that this package runs from ("…-dirty" if changed), else its version.

    The variable L2L_COMMIT, where it is set, names it: for a copy without git.

    Example:
        >>> len(commit()) > 0
        True
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=30)
        return done.stdout.strip()

    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    try:
        # An installed copy may lie inside somebody else's repository, whose hash would say nothing about it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return __version__


def versions() -> dict[str, str]:
    """The versions that can change a number: this package, torch, numpy and Python.

    A package that is imported from a folder, and was never installed, is "not installed".
    """
    packages = {name: _version(name) for name in ("torch", "numpy")}
    return {"l2l-lightning": __version__, **packages, "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device | str) -> str:
    """The device as its maker names it ("NVIDIA H100 80GB HBM3"): seconds mean nothing without it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def timestamp() -> str:
    """Now, in UTC, to the second: "2030-01-31T12:00:00+00:00"."""
    return datetime.now(UTC).isoformat(timespec="seconds")
