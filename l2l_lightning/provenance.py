"""Where a result came from, and how it is written: with its origin, and whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch

_PACKAGE = Path(__file__).resolve().parent


@functools.cache
def commit() -> str:
    """The git hash of the checkout that this package runs from ("…-dirty" if changed), else its version.

    Example:
        >>> len(commit()) > 0
        True
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=30)
        return done.stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository, whose hash would say nothing about it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return versions()["l2l-lightning"]


def versions() -> dict[str, str]:
    """The versions that can change a number: this package, torch, numpy and Python."""
    packages = {name: metadata.version(name) for name in ("l2l-lightning", "torch", "numpy")}
    return packages | {"python": platform.python_version()}


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


@contextlib.contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, and to read again, that takes the path's place when the block ends without an error.

    A reader, or an interruption, finds the old file or the new one and no mixture. That holds for a power
    failure too: the contents are on the disk before they get the name. Makes the folder if need be.

    Args:
        path: What is replaced.
        temporary: What is written, in the same folder. A kill leaves it behind, for the next one to overwrite
            it; None is a name of its own each time, for files that several processes may write.

    Raises:
        OSError: The folder or the file cannot be written; what was there before is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file, text as UTF-8, as `replacing` does."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes strict JSON, atomically.

    Raises:
        ValueError: A number is not finite: JSON has no NaN, and most readers reject it.
    """
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
