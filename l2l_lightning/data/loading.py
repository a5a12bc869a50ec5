"""Finds an image data set, whole or as the subset that ships with the package, in three disjoint splits."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2l_lightning.data.images import Images

ROOT_VARIABLE = "L2L_DATA"
"""The environment variable that stands in for `root`."""

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class DataNotFoundError(FileNotFoundError):
    """A data set is not where the settings say; the message names the settings."""


class DataCorruptedError(ValueError):
    """A data set's files are there and are not what they should be."""


class ImageSplits(NamedTuple):
    """Disjoint images to meta-train on, to choose a checkpoint or a learning rate on, and to report on."""

    train: Images
    validation: Images
    test: Images


def load_images(name: str = "mnist", root: str | Path | None = None, download: bool = False) -> ImageSplits:
    """Loads a data set's three splits onto the CPU.

    Train and validation are the first five sixths and the last sixth of the official training set (MNIST:
    50,000 and 10,000), test is the official test set (10,000). Without a root, the splits of the embedded
    subset (4,000, 1,000 and 1,000 real images) are drawn each from the same split of the whole.
    Nothing is ever substituted: a root that does not hold the data is an error.

    Args:
        name: "mnist", the only one so far.
        root: Folder that holds MNIST/raw, as torchvision lays it out; None is the variable L2L_DATA, or, if
            that is unset or empty, the embedded subset.
        download: Let torchvision download what is missing under `root`.

    Raises:
        DataNotFoundError: The data set is not under `root`, and was not to be or could not be downloaded
            (without a root, there is nowhere to download it to).
        DataCorruptedError: Its files cannot be read as images and labels.
        ValueError: An unknown name.

    Example:
        >>> splits = load_images("mnist")
        >>> splits.test.pixels.shape[1]
        784
    """
    if name != "mnist":
        raise ValueError(f"unknown data set {name!r}; available: 'mnist'")
    root = root or os.environ.get(ROOT_VARIABLE)
    if root:
        return _load_mnist(Path(root).expanduser(), download)
    if download:
        raise DataNotFoundError(
            "--data.download true needs a folder to download to: "
            f"set --data.root or the variable {ROOT_VARIABLE}"
        )
    return _load_embedded_mnist()


def _load_embedded_mnist() -> ImageSplits:
    source = "embedded MNIST subset (5,000 + 1,000 images)"
    file = resources.files("l2l_lightning.data").joinpath("mnist_subset.npz")
    with file.open("rb") as stream, np.load(stream) as arrays:

        def split(name: str) -> Images:
            images, labels = (torch.from_numpy(arrays[f"{name}_{part}"]) for part in ("images", "labels"))
            return _images(images, labels, source)

        return ImageSplits(split("train"), split("validation"), split("test"))


def _load_mnist(root: Path, download: bool) -> ImageSplits:
    # Imported where it is needed: it takes a second, and the embedded subset does without.
    from torchvision.datasets import MNIST

    raw = root / "MNIST" / "raw"
    if download:
        try:
            MNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            if _missing(raw):
                raise DataNotFoundError(f"MNIST could not be downloaded to {raw}: {error}") from error
    if missing := _missing(raw):
        raise DataNotFoundError(
            f"MNIST is not in {root}: looked for {', '.join(missing)} in {raw}. Point --data.root (or the "
            f"variable {ROOT_VARIABLE}) at the folder that holds MNIST/raw, or download it there with "
            f"--data.download true, or set neither to use the embedded subset."
        )

    def read(train: bool) -> tuple[Tensor, Tensor]:
        kind = "training" if train else "test"
        try:
            dataset = MNIST(root, train=train)
            _check(dataset.data, dataset.targets)
        # What torchvision's reader raises depends on which byte is wrong.
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
            raise DataCorruptedError(
                f"the {kind} files of MNIST in {raw} are corrupted or truncated "
                f"({str(error) or type(error).__name__}). "
                "Delete them and fetch them again, for example with --data.download true."
            ) from error
        return dataset.data, dataset.targets

    (images, labels), (test_images, test_labels) = read(train=True), read(train=False)
    source = f"MNIST at {root} ({len(labels):,} + {len(test_labels):,} images)"
    first = len(labels) - len(labels) // 6
    return ImageSplits(
        _images(images[:first], labels[:first], source),
        _images(images[first:], labels[first:], source),
        _images(test_images, test_labels, source),
    )


def _missing(raw: Path) -> list[str]:
    return [name for name in MNIST_FILES if not (raw / name).is_file()]


def _check(images: Tensor, labels: Tensor) -> None:
    if images.shape[1:] != (28, 28):
        raise ValueError(f"images of {list(images.shape[1:])} pixels instead of [28, 28]")
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    if not (labels <= 9).all():
        raise ValueError(f"a label of {int(labels.max())}")


def _images(images: Tensor, labels: Tensor, source: str) -> Images:
    return Images(images.flatten(1).float().div_(255), labels.long(), source)
