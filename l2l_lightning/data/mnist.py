"""MNIST: whole, as torchvision lays it out, or the subset that ships with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch

from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.images import Images
from l2l_lightning.data.splits import ImageSplits, Splits
from l2l_lightning.data.torchvision_sets import load_torchvision
from l2l_lightning.errors import DataNotFoundError

MNIST = DATA_SETS["mnist"]


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
        return load_torchvision("mnist", root, download)
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
            return Images(images.flatten(1).float().div_(255), labels.long(), source, MNIST.num_classes)

        return Splits(split("train"), split("validation"), split("test"))
