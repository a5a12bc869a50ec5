"""MNIST: whole, as torchvision lays it out, or the subset that ships with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.images import Images
from l2l_lightning.data.splits import ImageSplits
from l2l_lightning.errors import DataCorruptedError, DataNotFoundError

MNIST = DATA_SETS["mnist"]

MNIST_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def load_mnist(root: Path | None, download: bool) -> ImageSplits:
    """Loads the first five sixths and the last sixth of the official training set, and the test set.

    Args:
        root: Folder that holds MNIST/raw; None is the embedded subset.
        download: Let torchvision download what is missing under `root`.

    Raises:
        DataNotFoundError: MNIST is not under `root`, and was not to be or could not be downloaded.
        DataCorruptedError: Its files cannot be read as images and labels.
    """
    if root:
        return _load_whole(root, download)
    if download:
        raise DataNotFoundError(
            "--data.download true needs a folder to download to: "
            f"set --data.root or the variable {MNIST.root_variable}"
        )
    return _load_embedded()


def _load_embedded() -> ImageSplits:
    source = "embedded MNIST subset (5,000 + 1,000 images)"
    file = resources.files("l2l_lightning.data").joinpath("mnist_subset.npz")
    with file.open("rb") as stream, np.load(stream) as arrays:

        def split(name: str) -> Images:
            images, labels = (torch.from_numpy(arrays[f"{name}_{part}"]) for part in ("images", "labels"))
            return _images(images, labels, source)

        return ImageSplits(split("train"), split("validation"), split("test"))


def _load_whole(root: Path, download: bool) -> ImageSplits:
    # Imported where it is needed: it takes a second, and the embedded subset does without.
    from torchvision import datasets

    raw = root / "MNIST" / "raw"
    if download:
        try:
            datasets.MNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            if _missing(raw):
                raise DataNotFoundError(f"MNIST could not be downloaded to {raw}: {error}") from error
    if missing := _missing(raw):
        raise DataNotFoundError(
            f"MNIST is not in {root}: looked for {', '.join(missing)} in {raw}. Point --data.root (or the "
            f"variable {MNIST.root_variable}) at the folder that holds MNIST/raw, or download it there with "
            f"--data.download true, or set neither to use the embedded subset."
        )

    def read(train: bool) -> tuple[Tensor, Tensor]:
        try:
            dataset = datasets.MNIST(root, train=train)
            images, labels = dataset.data, dataset.targets
            if (shape := tuple(images.shape[1:])) != MNIST.image_shape:
                raise ValueError(f"images of {list(shape)} pixels instead of {list(MNIST.image_shape)}")
            if len(images) != len(labels):
                raise ValueError(f"{len(images)} images and {len(labels)} labels")
            if not (labels < MNIST.num_classes).all():
                raise ValueError(f"a label of {int(labels.max())}")
        # What torchvision's reader raises depends on which byte is wrong.
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
            raise DataCorruptedError(
                f"the {'training' if train else 'test'} files of MNIST in {raw} are corrupted or truncated "
                f"({str(error) or type(error).__name__}). "
                "Delete them and fetch them again, for example with --data.download true."
            ) from error
        return images, labels

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


def _images(images: Tensor, labels: Tensor, source: str) -> Images:
    return Images(images.flatten(1).float().div_(255), labels.long(), source, MNIST.num_classes)
