"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


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
