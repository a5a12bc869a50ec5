"""A folder of images with a folder inside for each class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2l_lightning.errors import DataCorruptedError, DataNotFoundError

SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
"""Names of the folders that hold a split's class folders."""


def split_folders(root: Path) -> dict[str, Path]:
    """Returns the folders of a root's splits, by the splits' names; {} if it holds class folders itself."""
    found = {
        split: root / name for split, names in SPLITS.items() for name in names if (root / name).is_dir()
    }
    inner = found.get("train", root / "train")
    divided = inner.is_dir() and any(path.is_dir() for path in inner.iterdir())
    return found if divided else {}


def class_folders(root: Path, size: Sequence[int] | None) -> Any:
    """Returns an ImageFolder of (image [3, H, W] float32 in [0, 1], label), labels in the order of names.

    Args:
        root: The folder that holds a folder for each class.
        size: H and W, which images are resized to with antialiasing; None leaves them as they are.

    Raises:
        DataNotFoundError: There are no class folders in it.
    """
    from torchvision.datasets import ImageFolder  # here, as it takes a second

    try:
        return ImageFolder(str(root), loader=_Reader(None if size is None else tuple(size)))
    except (OSError, ValueError) as error:
        raise DataNotFoundError(
            f"{root} is no folder with a folder of images for each class (--data.train): "
            f"{' '.join(str(error).split())}"
        ) from error


class _Reader(NamedTuple):
    """Reads an image file; a class of its own so that worker processes can be sent it."""

    size: tuple[int, ...] | None

    def __call__(self, path: str) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as image:
                coloured = image.convert("RGB")
        except Exception as error:  # what PIL raises depends on which byte is wrong
            raise DataCorruptedError(
                f"{path} cannot be read as an image ({error}): replace it by an intact copy"
            ) from error
        if self.size is not None:
            height, width = self.size
            coloured = coloured.resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(coloured)).permute(2, 0, 1).float().div_(255)
