"""The 8x8 handwritten digits that ship with scikit-learn."""

from __future__ import annotations

import torch

from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.images import Images
from l2l_lightning.data.splits import ImageSplits, split_images
from l2l_lightning.errors import DataNotFoundError


def load_digits() -> ImageSplits:
    """Loads the 1,797 digits, grey values 0 to 16 scaled to [0, 1], as 1,199, 299 and 299 images.

    Raises:
        DataNotFoundError: scikit-learn cannot be imported.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository, 1998 (its test set); `sklearn.datasets.load_digits`.
    """
    try:
        from sklearn import datasets  # here, as it takes a second, and the other data sets do without
    except ImportError as error:
        raise DataNotFoundError(
            "the data set 'digits' comes with scikit-learn, which cannot be imported "
            f"({error}): pip install scikit-learn"
        ) from error
    digits = datasets.load_digits()
    pixels = torch.from_numpy(digits.data).float().div_(16)
    source = f"digits 8x8 of scikit-learn ({len(pixels):,} images)"
    labels = torch.from_numpy(digits.target).long()
    return split_images(Images(pixels, labels, source, DATA_SETS["digits"].num_classes))
