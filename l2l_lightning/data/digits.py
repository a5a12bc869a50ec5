"""The 8x8 handwritten digits of scikit-learn, which ship with the package."""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch
from torch import Tensor

from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.images import Images
from l2l_lightning.data.splits import ImageSplits, split_images


def read_digits() -> tuple[Tensor, Tensor]:
    """Returns all images [1797, 8, 8], float32 in [0, 1], and their labels [1797], in the set's own order.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository, 1998 (its test set); `sklearn.datasets.load_digits`.

    Example:
        >>> images, labels = read_digits()
        >>> labels[:5].tolist()
        [0, 1, 2, 3, 4]
    """
    file = resources.files("l2l_lightning.data").joinpath("digits.npz")
    with file.open("rb") as stream, np.load(stream) as arrays:
        images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
        return images.float().div_(16), labels.long()


def load_digits() -> ImageSplits:
    """Loads the 1,797 digits of `read_digits`, flattened, as 1,199, 299 and 299 images."""
    images, labels = read_digits()
    source = f"digits 8x8 of scikit-learn ({len(images):,} images)"
    return split_images(Images(images.flatten(1), labels, source, DATA_SETS["digits"].num_classes))
