"""A run's own folder: a new one, or a named one in which an interrupted run goes on; and who is in it."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from l2l_lightning.errors import FolderInUseError
from l2l_lightning.files import write_atomically
from l2l_lightning.provenance import timestamp

LOCK, OWNER = ".lock", ".owner"
"""Files in a run's folder: what a running fit holds, and who that is, for the message to another one."""


def new_run_folder(parent: Path) -> Path:
    """Makes a folder that no other run has or gets: the time, and a number if that is taken.

    Making it is what claims it, on a folder that several machines share too.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     new_run_folder(Path(parent)) == new_run_folder(Path(parent))
        False
    """
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = parent / stamp, 0
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1
        folder = parent / f"{stamp}-{number}"


def missing(folder: Path) -> list[Path]:
    """The folder and those around it that are not there yet, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


class RunLock:
    """Holds a run's folder, from when it is made until `release`, or until the process ends however it ends.

    The system's lock on a file (flock) needs no cleaning up: after kill −9 the folder is free. It works on
    local disks and between machines that share a folder by NFS (version 4, or 3 with its lock daemon) or by
    Lustre mounted with `-o flock`. Where the file system has no locks, a warning says so.

    Args:
        folder: The run's; made if it is not there.
        made: Folders that were made for it, innermost first: removed at the end if nothing was written.

    Raises:
        FolderInUseError: Another process holds it; the message says which.
    """

    def __init__(self, folder: Path, made: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._made = made
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            owner = "another process"
            with contextlib.suppress(OSError):
                owner = (folder / OWNER).read_text(encoding="utf-8").strip()
            raise FolderInUseError(
                f"{folder} is in use: {owner} runs in it. Wait for its end, or begin another run "
                "(another --run_folder, or none)"
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, PermissionError) or not os.access(folder, os.W_OK):
                raise
            warnings.warn(
                f"{folder} is on a file system without locks ({error}): nothing keeps another process from "
                "running in it",
                stacklevel=2,
            )
        who = f"process {os.getpid()} on {socket.gethostname()}, since {timestamp()}"
        write_atomically(folder / OWNER, who)

    def release(self) -> None:
        """Lets go of the folder, and removes those that were made for it if nothing was written."""
        (self.folder / OWNER).unlink(missing_ok=True)
        self._lock.release()
        if self._made and all(path.name == LOCK for path in self.folder.iterdir()):
            with contextlib.suppress(OSError):
                (self.folder / LOCK).unlink(missing_ok=True)
                for path in self._made:
                    path.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint from which the folder's run goes on; None if it has not come to one."""
    path = folder / "checkpoints" / "last.ckpt"
    return path if path.is_file() else None


def newest_config(folder: Path) -> Path | None:
    """The options that the folder's run was last begun or continued with: those names sort by time."""
    first = folder / "config.yaml"
    return max(folder.glob("config-*.yaml"), default=first if first.is_file() else None)


def folder_of_run(checkpoint: str | None) -> Path | None:
    """The folder of the run whose newest checkpoint this is: a fit from it is the same run."""
    path = Path(checkpoint or "")
    folder = path.absolute().parent.parent
    return folder if path.name == "last.ckpt" and (folder / "config.yaml").is_file() else None
