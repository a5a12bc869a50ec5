"""The data sets that torchvision reads: MNIST and those of its kind, CIFAR-10 and SVHN."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.images import Images
from l2l_lightning.data.splits import ImageSplits, Splits
from l2l_lightning.errors import DataCorruptedError, DataNotFoundError

_MNIST_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
_CIFAR_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")


class _Layout(NamedTuple):
    """Where under a root torchvision has a data set, and what reads it."""

    title: str
    reader: str
    """A class of torchvision.datasets."""
    folder: str
    files: tuple[str, ...]


TORCHVISION = {
    "mnist": _Layout("MNIST", "MNIST", "MNIST/raw", _MNIST_FILES),
    "fashion-mnist": _Layout("Fashion-MNIST", "FashionMNIST", "FashionMNIST/raw", _MNIST_FILES),
    "kmnist": _Layout("KMNIST", "KMNIST", "KMNIST/raw", _MNIST_FILES),
    "cifar10": _Layout("CIFAR-10", "CIFAR10", "cifar-10-batches-py", _CIFAR_FILES),
    "svhn": _Layout("SVHN", "SVHN", ".", ("train_32x32.mat", "test_32x32.mat")),
}
"""The data sets that torchvision reads, by the names that `load_images` knows them by."""


def load_torchvision(name: str, root: Path | None, download: bool) -> ImageSplits:
    """Loads the first five sixths and the last sixth of the official training set, and the test set.

    Grey images are flattened, coloured ones are [3, 32, 32]; values are in [0, 1]. Where torchvision knows a
    file's checksum (CIFAR-10, SVHN), it is verified.

    Args:
        name: Of TORCHVISION.
        root: The folder that torchvision's layout begins in; None is an error that says what to set.
        download: Let torchvision download what is missing under `root`.

    Raises:
        DataNotFoundError: The data set is not under `root`, and was not to be or could not be downloaded.
        DataCorruptedError: Its files cannot be read as images and labels.
        MemoryError: The machine's memory does not hold it.
    """
    title, reader, inner, files = TORCHVISION[name]
    option = f"--data.root (or the variable {DATA_SETS[name].root_variable})"
    holds = inner if inner != "." else " and ".join(files)
    if root is None:
        raise DataNotFoundError(
            f"{title} does not come with the package: set {option} to the folder that holds {holds}, or to "
            "one to download it to, with --data.download true"
        )
    # Imported where it is needed: it takes a second, and what ships with the package does without.
    from torchvision import datasets

    folder, cls = root / inner, getattr(datasets, reader)

    def missing() -> list[str]:
        return [file for file in files if not (folder / file).is_file()]

    if download:
        try:
            # One call fetches all of a data set, but for SVHN.
            for part in _parts(name) if name == "svhn" else [{}]:
                cls(root, **part, download=True)
        except (OSError, RuntimeError) as error:
            if missing():
                raise DataNotFoundError(f"{title} could not be downloaded to {folder}: {error}") from error
    if absent := missing():
        embedded = ", or set neither to use the embedded subset" if name == "mnist" else ""
        raise DataNotFoundError(
            f"{title} is not in {root}: looked for {', '.join(absent)} in {folder}. Point {option} at the "
            f"folder that holds {holds}, or download it there with --data.download true{embedded}."
        )

    # Of CIFAR-10 each part is read only after all files have been verified.
    kinds = ("", "") if name == "cifar10" else ("training ", "test ")

    def read(part: dict[str, Any], kind: str) -> tuple[Tensor, Tensor]:
        try:
            return _checked(name, cls(root, **part))
        except PermissionError as error:
            raise DataNotFoundError(
                f"{error.filename} may not be read ({option}): {error.strerror}"
            ) from error
        except MemoryError:
            raise  # it says nothing of the files
        # What torchvision's readers raise depends on which byte is wrong.
        except Exception as error:
            raise DataCorruptedError(
                f"the {kind}files of {title} in {folder} are corrupted or truncated "
                f"({str(error) or type(error).__name__}). "
                "Delete them and fetch them again, for example with --data.download true."
            ) from error

    (images, labels), (test_images, test_labels) = map(read, _parts(name), kinds)
    source = f"{title} at {root} ({len(labels):,} + {len(test_labels):,} images)"
    first = len(labels) - len(labels) // 6

    def split(images: Tensor, labels: Tensor) -> Images:
        return Images(images.float().div_(255), labels.long(), source, DATA_SETS[name].num_classes)

    return Splits(
        split(images[:first], labels[:first]),
        split(images[first:], labels[first:]),
        split(test_images, test_labels),
    )


def _parts(name: str) -> list[dict[str, Any]]:
    """Returns the arguments by which torchvision tells the training set from the test set."""
    if name == "svhn":
        return [{"split": "train"}, {"split": "test"}]
    return [{"train": True}, {"train": False}]


def _checked(name: str, dataset: Any) -> tuple[Tensor, Tensor]:
    """Returns the images, [M, D] or [M, 3, H, W] uint8, and labels [M] that torchvision has read.

    Raises:
        ValueError: They are not as is known of the data set.
    """
    known = DATA_SETS[name]
    images = torch.as_tensor(dataset.data)
    labels = torch.as_tensor(dataset.labels if name == "svhn" else dataset.targets)
    if name == "cifar10":
        images = images.permute(0, 3, 1, 2)
    if (shape := tuple(images.shape[1:])) != known.image_shape:
        raise ValueError(f"images of {list(shape)} pixels instead of {list(known.image_shape)}")
    if images.dtype != torch.uint8:
        raise ValueError(f"pixels of the type {images.dtype}")
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    if wrong := [label for label in labels.tolist() if not 0 <= label < known.num_classes]:
        raise ValueError(f"a label of {wrong[0]}")
    return images.flatten(1) if len(known.image_shape) == 2 else images.contiguous(), labels
