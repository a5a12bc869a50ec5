"""The image data sets that there are, and their sizes, which are known without loading any."""

from __future__ import annotations

import math
from typing import NamedTuple


class DataSet(NamedTuple):
    """What is known of a data set before it is loaded.

    Args:
        image_shape: Height and width of its images in pixels, if they are grey (they are then flattened);
            channels, height and width if they are coloured.
        num_classes: C, where labels are 0 to C - 1.
        root_variable: The environment variable that stands in for `root`; None where none is needed.
    """

    image_shape: tuple[int, ...]
    num_classes: int
    root_variable: str | None

    @property
    def num_pixels(self) -> int:
        """D, the numbers of an image."""
        return math.prod(self.image_shape)


DATA_SETS = {
    "mnist": DataSet((28, 28), 10, "L2L_DATA"),
    "digits": DataSet((8, 8), 10, None),
    "colour-digits": DataSet((3, 32, 32), 10, None),
    # Not L2L_DATA: whoever has set that has torchvision's data sets there.
    "smiles": DataSet((28, 28), 2, "L2L_SMILES"),
    "fashion-mnist": DataSet((28, 28), 10, "L2L_DATA"),
    "kmnist": DataSet((28, 28), 10, "L2L_DATA"),
    "cifar10": DataSet((3, 32, 32), 10, "L2L_DATA"),
    "svhn": DataSet((3, 32, 32), 10, "L2L_DATA"),
}
"""The data sets that `load_images` knows."""

OWN = "own"
"""What a task names as its data set if it draws from the user's own data and nothing else."""
