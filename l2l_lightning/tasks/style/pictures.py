"""Colour pictures: where they come from, the three parts that they are split into, and squares of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from l2l_lightning.data.images import Images
from l2l_lightning.data.splits import split_images
from l2l_lightning.errors import DataCorruptedError, DataNotFoundError
from l2l_lightning.tasks.style.textures import TEXTURES

PARTS = ("train", "validation", "test")

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of a folder's files that are pictures."""

PHOTOGRAPHS = "photographs"
"""The name of the two photographs that ship with scikit-learn."""


def photographs() -> dict[str, list[Tensor]]:
    """Returns scikit-learn's two photographs in three parts, uint8 [3, H, W] each.

    Training has the left two thirds of china.jpg, a temple (427×427 pixels), validation its other third
    (427×213), test all of flower.jpg (427×640): what is tested on is another photograph.

    Raises:
        DataNotFoundError: scikit-learn cannot be imported.

    Source: scikit-learn's `datasets/images/README.txt`: both "released under a creative commons license"
    (CC BY 2.0), "Attribution: Some rights reserved by danielbuechele"; flower.jpg with links to vultilion's
    photographs. `sklearn.datasets.load_sample_image`.
    """
    try:
        from sklearn.datasets import load_sample_image  # here, as it takes a second
    except ImportError as error:
        raise DataNotFoundError(
            f"the photographs come with scikit-learn, which cannot be imported ({error}): "
            "pip install scikit-learn, or name pictures of yours"
        ) from error
    china, flower = (_channels_first(load_sample_image(f"{name}.jpg")) for name in ("china", "flower"))
    side = china.shape[1]
    return {"train": [china[:, :, :side]], "validation": [china[:, :, side:]], "test": [flower]}


def split_pictures(source: Any, name: str) -> dict[str, list[Tensor]]:
    """Returns the pictures of the three parts, as `read_pictures`; no two parts share one.

    Args:
        source: "photographs"; or a mapping of the parts to what `read_pictures` takes; or what it takes, of
            which validation and test get a sixth each, by a fixed permutation.
        name: The argument's, for messages.

    Raises:
        ValueError: A part is missing, or there are fewer than six pictures to split.
    """
    if isinstance(source, str) and source == PHOTOGRAPHS:
        return photographs()
    if isinstance(source, Mapping):
        if set(source) != set(PARTS):
            raise ValueError(f"{name} must name {', '.join(PARTS)}, got {', '.join(map(str, source))}")
        return {part: read_pictures(source[part], f"{name}[{part!r}]") for part in PARTS}
    pictures = read_pictures(source, name)
    if len(pictures) < 6:
        raise ValueError(
            f"{name} holds {len(pictures)} pictures, and three parts need 6 at least: "
            f"give more, or a mapping of {', '.join(PARTS)}"
        )
    # The labels of the split say which picture is where.
    numbers = Images(torch.empty(len(pictures), 0), torch.arange(len(pictures)), name)
    parts = [[pictures[int(index)] for index in part.labels] for part in split_images(numbers)]
    return dict(zip(PARTS, parts, strict=True))


def read_pictures(source: Any, name: str) -> list[Tensor]:
    """Returns pictures [3, H, W], float32 in [0, 1] or, as files have them, uint8 from 0 to 255.

    Args:
        source: A tensor [M, 3, H, W] or [3, H, W] in [0, 1]; the path of a file or of a folder of files; the
            name of a generated picture, of TEXTURES; or a sequence of these. Grey files become grey colours.
        name: The argument's, for messages.

    Raises:
        ValueError: A tensor has another shape, or numbers outside [0, 1]; or nothing is given.
        TypeError: Something is neither a tensor nor a path.
        DataNotFoundError: There is no such file, or no picture in the folder.
        DataCorruptedError: A file cannot be read as a picture of 8 bits a channel.
    """
    if isinstance(source, Tensor):
        return _of_tensor(source, name)
    if isinstance(source, str | Path):
        if source in TEXTURES:
            return [TEXTURES[str(source)]()]
        return [_read(path) for path in _files(Path(source).expanduser(), name)]
    if not isinstance(source, Sequence):
        raise TypeError(
            f"{name} must be a tensor [M, 3, H, W], a path or a list of these, got {type(source).__name__}"
        )
    if not source:
        raise ValueError(f"{name} must hold at least one picture")
    return [picture for part in source for picture in read_pictures(part, name)]


def _of_tensor(pictures: Tensor, name: str) -> list[Tensor]:
    shape = list(pictures.shape)
    if pictures.ndim not in (3, 4) or shape[-3] != 3 or 0 in shape:
        grey = ": grey pictures become colours by expand(-1, 3, -1, -1)" if 1 in shape[-3:-2] else ""
        raise ValueError(f"{name} must be [M, 3, H, W] or [3, H, W], got {shape}{grey}")
    if not pictures.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point numbers in [0, 1], got {pictures.dtype}: divide by 255"
        )
    low, high = pictures.amin().item(), pictures.amax().item()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"{name} must be in [0, 1], got values from {low:g} to {high:g}")
    return list(pictures.detach().cpu().float().view(-1, *shape[-3:]))


def _files(path: Path, name: str) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise DataNotFoundError(
                f"{name}={str(path)!r}: no pictures ({', '.join(SUFFIXES)}) in the folder"
            )
        return found
    if not path.is_file():
        raise DataNotFoundError(
            f"{name}={str(path)!r}: there is no such file or folder, and no generated picture of that name "
            f"({', '.join(TEXTURES)})"
        )
    return [path]


def _read(path: Path) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # PIL would clip them to 255.
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            return _channels_first(np.array(image.convert("RGB")))
    except Exception as error:  # what PIL raises depends on which byte is wrong
        raise DataCorruptedError(
            f"{path} cannot be read as a picture ({error}): replace it by an intact copy"
        ) from error


def _channels_first(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Turns [H, W, 3] into [3, H, W]."""
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).contiguous()


def in_unit(picture: Tensor) -> Tensor:
    """Returns a picture as float32 in [0, 1]."""
    return picture if picture.is_floating_point() else picture.float().div_(255)


def square(picture: Tensor, size: int, share: float = 1.0, place: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Returns a square of a picture, resized with antialiasing to [3, size, size], float32 in [0, 1].

    Args:
        picture: [3, H, W], as `read_pictures` gives it.
        size: The result's height and width.
        share: The square's side, as a share of the picture's shorter one.
        place: Where it is between top and bottom, and between left and right, from 0 to 1.
    """
    sides = picture.shape[1:]
    side = max(1, round(share * min(sides)))
    top, left = (round(where * (length - side)) for where, length in zip(place, sides, strict=True))
    cut = in_unit(picture[:, top : top + side, left : left + side])
    return F.interpolate(cut[None], (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
