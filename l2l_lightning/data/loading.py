"""Finds an image data set by its name, in three disjoint splits."""

from __future__ import annotations

import os
from pathlib import Path

from l2l_lightning.data.colour_digits import load_colour_digits
from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.digits import load_digits
from l2l_lightning.data.mnist import load_mnist
from l2l_lightning.data.smiles import load_smiles
from l2l_lightning.data.splits import ImageSplits
from l2l_lightning.data.torchvision_sets import TORCHVISION, load_torchvision
from l2l_lightning.errors import DataNotFoundError
from l2l_lightning.extras import needed_by


@needed_by("this data set")
def load_images(name: str = "mnist", root: str | Path | None = None, download: bool = False) -> ImageSplits:
    """Loads a data set's three splits onto the CPU.

    - "mnist", 28x28, 10 classes: train and validation are the first five sixths and the last sixth of the
      official training set (50,000 and 10,000), test is the official test set (10,000). Without a root, each
      split is a part of its own of these: 4,000, 1,000 and 1,000 images that ship with the package.
    - "fashion-mnist" and "kmnist", as "mnist", but for that a root is needed.
    - "cifar10" and "svhn", 3x32x32, 10 classes: the first five sixths and the last sixth of the official
      training set (41,667 and 8,333; 61,048 and 12,209), and the official test set (10,000; 26,032).
    - "digits", 8x8, 10 classes: the 1,797 digits of scikit-learn.
    - "colour-digits", 3x32x32, 10 classes: 6,000 digits of MNIST on photographs (`load_colour_digits`).
    - "smiles", 28x28, 2 classes: a folder of your own, GENKI-4K or images in two class folders.

    Digits and smiles are split into 2/3, 1/6 and 1/6 by a fixed permutation. Nothing is ever substituted: a
    root that does not hold the data is an error.

    Args:
        name: Of DATA_SETS.
        root: Folder of the data set. MNIST, Fashion-MNIST, KMNIST, CIFAR-10 and SVHN: it holds MNIST/raw,
            FashionMNIST/raw, KMNIST/raw, cifar-10-batches-py, or train_32x32.mat and test_32x32.mat, as
            torchvision lays them out; None is the variable L2L_DATA, or, of MNIST, if that is unset or empty,
            the embedded subset. Smiles: a folder in one of the layouts of
            `l2l_lightning.data.smiles.load_smiles`; None is the variable L2L_SMILES. Digits, in colour
            too, need none and read none.
        download: Let torchvision download what is missing under `root`, of the data sets that it has.

    Raises:
        DataNotFoundError: The data set is not under `root`, and was not to be or could not be downloaded
            (without a root, there is nowhere to download it to).
        DataCorruptedError: Its files cannot be read as images and labels.
        MissingPackageError: The package that reads the data set is not installed.
        ValueError: An unknown name.

    Example:
        >>> splits = load_images("mnist")
        >>> splits.test.pixels.shape[1]
        784
    """
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set {name!r}; available: {', '.join(map(repr, DATA_SETS))}")
    root = root or root_from_environment(name)
    folder = Path(root).expanduser() if root else None
    if name == "mnist":
        return load_mnist(folder, download)
    if name in TORCHVISION:
        return load_torchvision(name, folder, download)
    if download:
        raise DataNotFoundError(f"the data set {name!r} cannot be downloaded: set --data.download false")
    if name == "colour-digits":
        return load_colour_digits()
    return load_digits() if name == "digits" else load_smiles(folder)


def root_from_environment(name: str) -> str | None:
    """Returns the root that the data set's variable names; None if it is unset or empty, or there is none.

    Example:
        >>> root_from_environment("digits") is None
        True
    """
    variable = DATA_SETS[name].root_variable
    return (os.environ.get(variable) if variable else None) or None
