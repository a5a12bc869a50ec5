"""A run's own folder: a new one, or a named one in which an interrupted run goes on."""

from __future__ import annotations

import itertools
from datetime import datetime
from pathlib import Path


def new_run_folder(parent: Path) -> Path:
    """A folder's path that nothing has used: the time, and a number if that is taken."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    candidates = (parent / (f"{stamp}-{n}" if n else stamp) for n in itertools.count())
    return next(path for path in candidates if not path.exists())


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
