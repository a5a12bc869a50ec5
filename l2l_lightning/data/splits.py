"""Three disjoint splits of a data set."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from l2l_lightning.data.examples import Examples
from l2l_lightning.data.images import Images

E = TypeVar("E", bound=Examples, covariant=True)


class Splits(NamedTuple, Generic[E]):
    """Disjoint examples: to meta-train on, to choose a checkpoint or a learning rate on, and to report on."""

    train: E
    validation: E
    test: E


ImageSplits = Splits[Images]


def split_images(images: Images) -> ImageSplits:
    """Splits M images that have no official test set into 2/3, 1/6 and 1/6, at random but always alike.

    Validation and test have ⌊M/6⌋ images each, train has the rest. The permutation depends on M alone, so
    that the same images in the same order give the same splits on every machine.

    Example:
        >>> images = Images(torch.rand(20, 4), torch.zeros(20, dtype=torch.int64), "twenty random vectors")
        >>> [len(split) for split in split_images(images)]
        [14, 3, 3]
    """
    return Splits(*map(images.select, sixths(len(images), 2)))


def sixths(size: int, count: int) -> list[torch.Tensor]:
    """Returns the indices of what is left of `size` examples without `count` sixths, and those of each sixth.

    Example:
        >>> [len(part) for part in sixths(20, 1)]
        [17, 3]
    """
    # NumPy guarantees a bit generator's raw numbers for all versions to come, a permutation it does not.
    order = torch.from_numpy(np.random.PCG64(0).random_raw(size).argsort(kind="stable"))
    sixth = size // 6
    return list(torch.split(order, [size - count * sixth, *[sixth] * count]))
