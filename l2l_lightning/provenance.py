"""Where a result came from: commit, versions, machine and time.

It needs torch alone, so that benchmarks run on a machine where nothing else is installed.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from l2l_lightning import __version__

_PACKAGE = Path(__file__).resolve().parent
COMMIT_VARIABLE = "L2L_COMMIT"


def origin(device: torch.device | str) -> dict[str, Any]:
    """What the numbers of a run depend on beside its settings; null for what is not there.

    Seconds, and last digits, are of one machine: its device and processor, the instruction set that torch
    uses, the cores that this process may run on, and torch's threads.

    Example:
        >>> found = origin("cpu")
        >>> list(found)[:5]
        ['commit', 'device', 'processor', 'instruction_set', 'cores']
        >>> found["driver"] is None
        True
    """
    return {
        "commit": commit(),
        "device": device_name(device),
        "processor": device_name("cpu"),
        "instruction_set": instruction_set(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": _driver() if torch.device(device).type == "cuda" else None,
        "date": timestamp(),
    }


@functools.cache
def commit() -> str:
    """The git hash of the checkout that this package runs from ("…-dirty" if changed), else its version.

    The variable L2L_COMMIT, where it is set, names it: for a copy without git.

    Example:
        >>> len(commit()) > 0
        True
    """

    def git(*arguments: str) -> str:
        return _output("git", "-C", str(_PACKAGE), *arguments)

    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    try:
        # An installed copy may lie inside somebody else's repository, whose hash would say nothing about it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return __version__


def versions() -> dict[str, str]:
    """The versions that can change a number: this package, torch, Triton, numpy and Python.

    A package that is imported from a folder, and was never installed, is "not installed".
    """
    packages = {name: _version(name) for name in ("torch", "triton", "numpy")}
    return {"l2l-lightning": __version__, **packages, "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=30)
    return done.stdout.strip()


def _driver() -> str | None:
    """The first NVIDIA device's driver."""
    try:
        found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        return None
    return found.partition("\n")[0] or None


def instruction_set() -> str:
    """The processor's vector instructions that torch computes with ("AVX512"): last digits depend on them."""
    return torch.backends.cpu.get_cpu_capability()


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
