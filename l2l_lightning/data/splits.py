"""Three disjoint splits of a data set."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from l2l_lightning.data.images import Images


class ImageSplits(NamedTuple):
    """Disjoint images: to meta-train on, to choose a checkpoint or a learning rate on, and to report on."""

    train: Images
    validation: Images
    test: Images


def split_images(images: Images) -> ImageSplits:
    """Splits M images that have no official test set into 2/3, 1/6 and 1/6, at random but always alike.

    Validation and test have ⌊M/6⌋ images each, train has the rest. The permutation depends on M alone, so
    that the same images in the same order give the same splits on every machine.

    Example:
        >>> images = Images(torch.rand(20, 4), torch.zeros(20, dtype=torch.int64), "twenty random vectors")
        >>> [len(split) for split in split_images(images)]
        [14, 3, 3]
    """
    # NumPy guarantees a bit generator's raw numbers for all versions to come, a permutation it does not.
    order = torch.from_numpy(np.random.PCG64(0).random_raw(len(images)).argsort(kind="stable"))
    sixth = len(images) // 6
    ends = (order[: -2 * sixth], order[-2 * sixth : -sixth], order[-sixth:])
    return ImageSplits(*map(images.select, ends))
