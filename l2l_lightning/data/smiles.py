"""A user's own folder of faces in two classes, smiling or not: GENKI-4K, or any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.images import Images
from l2l_lightning.data.splits import ImageSplits, split_images
from l2l_lightning.errors import DataCorruptedError, DataNotFoundError

SMILES = DATA_SETS["smiles"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of the files that are images, as torchvision's ImageFolder has them."""

HINT = f"--data.root (or the variable {SMILES.root_variable})"


def load_smiles(root: Path | None) -> ImageSplits:
    """Reads every image under a root as 28x28 grey values, and splits them by a fixed permutation.

    Three layouts are known, in the root or in the only folder inside it:

    - GENKI-4K's archive: `labels.txt`, whose Nth line begins with the label of `files/fileNNNN.jpg`
      (1 smiles, 0 does not);
    - GENKI-R2009a: `Subsets/GENKI-4K/GENKI-4K_Images.txt` names images in `files/`, and
      `GENKI-4K_Labels.txt` beside it has the same lines as `labels.txt`;
    - two folders of images, one per class, labelled 0 and 1 in the order of their names.

    Images of any size are converted to grey values and resized with antialiasing; proportions are not kept.
    Nothing is cached: 4,000 photographs take seconds to read.

    Args:
        root: The folder; None is an error that says what to set.

    Raises:
        DataNotFoundError: There is no root, or none of the layouts in it.
        DataCorruptedError: Labels and images do not match, or one of them cannot be read.

    Source: The MPLab GENKI Database, GENKI-4K subset, http://mplab.ucsd.edu.
    """
    if root is None:
        raise DataNotFoundError(
            "the data set 'smiles' is a folder of your own, GENKI-4K or any images in two classes: "
            f"set {HINT} to it"
        )
    if not root.is_dir():
        raise DataNotFoundError(f"{root} is not a folder: point {HINT} at the one that holds the smiles")
    try:
        layout, paths, labels = _find(root)
    except PermissionError as error:
        raise DataNotFoundError(f"{error.filename} may not be read ({HINT}): {error.strerror}") from error
    if len(paths) < 6:
        raise DataCorruptedError(f"{root} has {len(paths)} images, and three splits need 6 at least ({HINT})")
    pixels = torch.stack([_read(path) for path in paths]).flatten(1).float().div_(255)
    source = f"smiles at {root} ({layout}, {len(paths):,} images)"
    return split_images(Images(pixels, torch.tensor(labels), source, SMILES.num_classes))


def _find(root: Path) -> tuple[str, list[Path], list[int]]:
    """Returns the layout's name, the images' paths in a fixed order, and their labels."""
    inner = _folders(root)
    for folder in (root, *inner) if len(inner) == 1 else (root,):
        if (folder / "labels.txt").is_file() and (folder / "files").is_dir():
            return "GENKI-4K layout", *_genki_4k(folder)
        if (folder / "Subsets" / "GENKI-4K").is_dir():
            return "GENKI-R2009a layout", *_genki_r2009a(folder)
        classes = _folders(folder)
        if len(classes) > 1 and any(map(_image_files, classes)):
            return f"class folders {' and '.join(c.name for c in classes)}", *_class_folders(folder, classes)
    raise DataNotFoundError(
        f"no smiles in {root}: looked for labels.txt and files/ (GENKI-4K), Subsets/GENKI-4K/ and files/ "
        "(GENKI-R2009a), and two folders of images, one per class, there and in the only folder inside it. "
        f"Point {HINT} at the folder that holds one of these."
    )


def _genki_4k(folder: Path) -> tuple[list[Path], list[int]]:
    labels_file, files = folder / "labels.txt", folder / "files"
    labels, count = _read_labels(labels_file), len(_image_files(files))
    if len(labels) != count:
        raise DataCorruptedError(
            f"{labels_file} has {len(labels)} lines and {files} has {count} images: "
            "every line belongs to one image"
        )
    paths = [files / f"file{number:04d}.jpg" for number in range(1, count + 1)]
    for number, path in enumerate(paths, start=1):
        if not path.is_file():
            raise DataCorruptedError(f"{labels_file}, line {number}: its image {path} is missing")
    return paths, labels


def _genki_r2009a(folder: Path) -> tuple[list[Path], list[int]]:
    files, subset = folder / "files", folder / "Subsets" / "GENKI-4K"
    names_file, labels_file = subset / "GENKI-4K_Images.txt", subset / "GENKI-4K_Labels.txt"
    for path in (names_file, labels_file, files):
        if not path.exists():
            raise DataNotFoundError(f"{path} is missing from the GENKI-R2009a release in {folder} ({HINT})")
    names, labels = _read_lines(names_file), _read_labels(labels_file)
    if len(names) != len(labels):
        raise DataCorruptedError(
            f"{names_file} has {len(names)} lines and {labels_file} has {len(labels)}: "
            "every image has one label"
        )
    first_lines: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not (files / name).is_file():
            raise DataCorruptedError(f"{names_file}, line {number}: no image {name!r} in {files}")
        # Twice the same image could be in two splits, which must be disjoint.
        if first_lines.setdefault(name, number) != number:
            raise DataCorruptedError(
                f"{names_file}, line {number}: {name!r} is on line {first_lines[name]} too"
            )
    return [files / name for name in names], labels


def _class_folders(folder: Path, classes: list[Path]) -> tuple[list[Path], list[int]]:
    if len(classes) != SMILES.num_classes:
        raise DataCorruptedError(
            f"{folder} has {len(classes)} class folders ({', '.join(c.name for c in classes)}), "
            f"and smiles have {SMILES.num_classes} classes ({HINT})"
        )
    images = [_image_files(c) for c in classes]
    for name, found in zip(classes, images, strict=True):
        if not found:
            raise DataCorruptedError(f"the class folder {name} has no images ({', '.join(SUFFIXES)})")
    paths = [path for found in images for path in found]
    return paths, [label for label, found in enumerate(images) for _ in found]


def _folders(folder: Path) -> list[Path]:
    """Lists the folders inside by name, without what archives and file managers leave (__MACOSX, .git)."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")


def _image_files(folder: Path) -> list[Path]:
    """Lists the image files inside by name."""
    files = (path for path in folder.iterdir() if path.name[0] != ".")
    return sorted(path for path in files if path.suffix.lower() in SUFFIXES)


def _read_lines(path: Path) -> list[str]:
    """Reads a text file's lines, without blank ones at its end."""
    # What is not text becomes a wrong line, whose number the caller's error gives.
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [line.strip() for line in text.rstrip().split("\n")]


def _read_labels(path: Path) -> list[int]:
    """Reads the labels off lines `smile yaw pitch roll`."""
    lines = _read_lines(path)
    for number, line in enumerate(lines, start=1):
        if line.split()[:1] not in (["0"], ["1"]):
            raise DataCorruptedError(
                f"{path}, line {number}: must begin with 1 (smiles) or 0 (does not), got {line[:40]!r}"
            )
    return [int(line.split()[0]) for line in lines]


def _read(path: Path) -> Tensor:
    """Reads an image as grey values, [28, 28] uint8."""
    from PIL import Image

    height, width = SMILES.image_shape
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # PIL would clip them to 255.
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            small = image.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    except Exception as error:  # what PIL raises depends on which byte is wrong
        raise DataCorruptedError(
            f"{path} cannot be read as an image ({error}): replace it by an intact copy"
        ) from error
    return torch.from_numpy(np.array(small))
