"""MNIST's digits on photographs, in colour: images in the format of CIFAR-10 that need no download."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.images import Images
from l2l_lightning.data.mnist import load_mnist
from l2l_lightning.data.splits import ImageSplits
from l2l_lightning.errors import DataNotFoundError

COLOUR_DIGITS = DATA_SETS["colour-digits"]

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
"""The photographs that ship with scikit-learn, by Flickr's danielbuechele and vultilion, CC BY 2.0."""

SHARES = {"train": (0, 4), "validation": (4, 5), "test": (5, 6)}
"""The vertical strip of each photograph that a split's backgrounds are cut from, in sixths of its width."""


def load_colour_digits() -> ImageSplits:
    """Makes 4,000, 1,000 and 1,000 images [3, 32, 32] of the embedded MNIST subset and two photographs.

    An image is |background − digit| in every channel: the digit, 28x28 with a margin of 2, on a square that
    is cut from a photograph at random, but always alike. The splits share neither digits nor parts of
    photographs.

    Raises:
        DataNotFoundError: scikit-learn or Pillow cannot be imported.

    Source: the composition is MNIST-M's, Y. Ganin and V. Lempitsky, Unsupervised Domain Adaptation by
    Backpropagation, ICML 2015; the photographs are `sklearn.datasets.load_sample_images`.
    """
    try:
        from sklearn.datasets import load_sample_image  # here, as it takes a second

        photographs = [torch.from_numpy(load_sample_image(name).copy()) for name in PHOTOGRAPHS]
    except ImportError as error:
        raise DataNotFoundError(
            "the data set 'colour-digits' needs photographs that come with scikit-learn, and Pillow to read "
            f"them, which cannot be imported ({error}): pip install scikit-learn pillow"
        ) from error
    digits = load_mnist(None, download=False)
    source = f"colour digits, of the {digits.train.source} and scikit-learn's photographs"

    def split(name: str) -> Images:
        images: Images = getattr(digits, name)
        pixels = _composed(images.pixels, [_strip(photo, *SHARES[name]) for photo in photographs])
        return Images(pixels, images.labels, source, COLOUR_DIGITS.num_classes)

    return ImageSplits(*map(split, SHARES))


def _strip(photograph: Tensor, start: int, end: int) -> Tensor:
    """Returns the sixths from `start` to `end` of a photograph's width, [H, W, 3] uint8 to [3, H, W']."""
    width = photograph.shape[1]
    return photograph[:, start * width // 6 : end * width // 6].permute(2, 0, 1)


def _composed(digits: Tensor, backgrounds: list[Tensor]) -> Tensor:
    """Puts digits [M, 784] in [0, 1] on squares cut from backgrounds, [M, 3, 32, 32]."""
    _, height, width = COLOUR_DIGITS.image_shape
    # NumPy guarantees a bit generator's raw numbers for all versions to come, draws from a range it does not.
    raw = torch.from_numpy(np.random.PCG64(0).random_raw(3 * len(digits)) >> np.uint64(32)).long().view(-1, 3)
    squares = torch.empty(len(digits), 3, height, width)
    for square, (which, down, right) in zip(squares, raw.tolist(), strict=True):
        background = backgrounds[which % len(backgrounds)]
        top, left = down % (background.shape[1] - height + 1), right % (background.shape[2] - width + 1)
        square.copy_(background[:, top : top + height, left : left + width])
    digit = torch.nn.functional.pad(digits.view(-1, 1, 28, 28), (2, 2, 2, 2))
    return (squares / 255 - digit).abs_()
