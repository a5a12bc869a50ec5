"""Checkpoint files: written whole or not at all, and read as plain numbers or refused.

A file is what torch.save writes, a zip archive with the CRC-32 of each of its parts. Reading executes
nothing: the checksums are verified, torch's restricted unpickler knows tensors and plain values only, and
what it takes is bounded by the file's size.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickletools
import reprlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from l2l_lightning.errors import CheckpointError
from l2l_lightning.files import replacing

MAX_DEPTH, MAX_BITS = 64, 64
"""The most lists and dicts in one another (ours have 12), and the most bits of a whole number."""

_MAY_CALL = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
} | {
    f"torch {kind}Storage" for kind in ("BFloat16", "Bool", "Byte", "Double", "Float", "Half", "Int", "Long")
}
"""What torch.save writes for plain values and dense tensors. Its unpickler would call more, such as a
bytearray of any size."""


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, by `read` and `write`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("storage_options is not supported: a checkpoint is a file on a local disk")
        write(checkpoint, path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        if weights_only is False:
            raise CheckpointError(
                f"{path}: weights_only (--weights_only) must not be false: a checkpoint is plain numbers, "
                "and nothing in it is ever executed"
            )
        return read(path)


def write(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes a checkpoint; an interruption leaves the old file or the new one.

    Raises:
        CheckpointError: The path is not one of a local disk.
        OSError: It cannot be written.
    """
    if "://" in str(path):
        raise CheckpointError(f"{path}: checkpoints are written to local disks only (--checkpoint.dirpath)")
    path = Path(path)
    with replacing(path, path.with_name(f".{path.name}.partial")) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # What torch makes of a disk that is full.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's plain values and dense tensors onto the CPU.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it holds something else.

    Example:
        >>> read("last.ckpt")["global_step"]  # doctest: +SKIP
        2800
    """
    if not os.path.isfile(path):  # which a name that is too long is not; Path.is_file raises
        raise CheckpointError(f"no checkpoint at {path}: give the path of a .ckpt file with --ckpt_path")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check_archive(file, size)
            file.seek(0)
            checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            _check_contents(checkpoint, size)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read (--ckpt_path): {error.strerror}") from error
    except Exception as error:  # whatever the damage happens to provoke
        raise CheckpointError(
            f"{path} is not a checkpoint of this program (--ckpt_path), or is damaged: {_reason(error)}"
        ) from error
    return checkpoint


@contextlib.contextmanager
def refusing(path: object, entry: str) -> Iterator[None]:
    """Turns what an entry of a file provokes into a CheckpointError that names both."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever its contents happen to provoke
        raise CheckpointError(f"{path} (--ckpt_path) cannot be used: {entry}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    if isinstance(error, KeyError):
        return f"there is no {text}"
    return text or type(error).__name__


def check_state(found: Any, ours: Any, entry: str, *, finite: bool = True) -> None:
    """Raises unless a stored state can take the place of a fresh one.

    A dict must have our keys, a list our length, a tensor our shape and kind of number. A whole number must
    not be negative, and other numbers must be finite, where ours are. In place of None all may be stored.

    Args:
        found: What is stored: nested dicts and lists of tensors and plain values.
        ours: A state of the same object before it is restored.
        entry: The stored state's name.
        finite: False: NaN and infinity may stand for finite numbers, too.

    Raises:
        ValueError: It cannot; the message names the entry.

    Example:
        >>> check_state({"steps_done": -1}, {"steps_done": 0}, "rollout")
        Traceback (most recent call last):
            ...
        ValueError: rollout.steps_done is -1, where 0 could be
    """
    if isinstance(ours, dict):
        fits = isinstance(found, dict)
        parts = list(ours.items())
        if fits and (missing := [key for key in ours if key not in found]):
            raise ValueError(f"{entry} lacks {missing[0]}")
    elif isinstance(ours, list | tuple):
        fits = isinstance(found, list | tuple) and len(found) == len(ours)
        parts = list(enumerate(ours))
    else:
        fits, parts = _is_like(found, ours, finite), []
    if not fits:
        raise ValueError(f"{entry} is {_described(found)}, where {_described(ours)} could be")
    for key, part in parts:
        check_state(found[key], part, f"{entry}.{key}", finite=finite)


def _is_like(found: Any, ours: Any, finite: bool) -> bool:
    if isinstance(ours, Tensor):
        fits = isinstance(found, Tensor) and found.shape == ours.shape
        fits = fits and (found.dtype == ours.dtype or found.is_floating_point() == ours.is_floating_point())
        return fits and not (finite and ours.isfinite().all() and not found.isfinite().all())
    if isinstance(ours, int):
        return isinstance(found, int) and (found >= 0 or ours < 0)
    if isinstance(ours, float):
        number = isinstance(found, int | float) and not isinstance(found, bool)
        return number and not (finite and math.isfinite(ours) and not math.isfinite(found))
    return ours is None or isinstance(found, type(ours))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        finite = "" if value.isfinite().all() else " with numbers that are not finite"
        return f"a tensor {list(value.shape)} of {value.dtype}{finite}"
    return " ".join(reprlib.repr(value).split())


def _check_archive(file: BinaryIO, size: int) -> None:
    """Raises if a file is not an archive as torch writes them, is damaged, or calls what torch.save does not.

    An archive may end with a comment: earlier versions put a digest there.
    """
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("it is not an archive")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch compresses nothing: an entry that is larger than the file is no entry of torch's.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries are larger than the file")
        # Else one reader could find other contents than another.
        if entries[0].header_offset or len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("its entries are not in order")
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {bad} is wrong")
        (pickled,) = (entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl")
        for operation, argument, _ in pickletools.genops(archive.read(pickled)):
            if "GLOBAL" in operation.name and argument not in _MAY_CALL:
                raise ValueError(f"it asks for {argument}")


def _check_contents(checkpoint: Any, size: int) -> None:
    """Raises if a checkpoint holds more than plain values and dense tensors, or more than its file's bytes.

    A pickle can repeat a part, and a tensor its numbers, any number of times: it costs when they are copied.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError("it holds no entries by name")
    values = numbers = size
    rest = [(checkpoint, 0)]
    while rest:
        part, depth = rest.pop()
        values -= 1
        if isinstance(part, Tensor):
            if part.layout != torch.strided or part.device.type != "cpu" or part.is_quantized:
                raise ValueError(f"it holds a tensor that is not dense ({part.layout}, {part.device})")
            numbers -= part.nbytes
        elif isinstance(part, dict | list | tuple | set):
            inner = [*part, *part.values()] if isinstance(part, dict) else part
            rest += ((one, depth + 1) for one in inner)
        elif isinstance(part, int) and part.bit_length() > MAX_BITS:
            raise ValueError("it holds a whole number of more than 64 bits")
        if min(values, numbers) < 0 or len(rest) > size or depth > MAX_DEPTH:
            raise ValueError("it unfolds to more than its size")
