"""Which image data sets there are, and their sizes: known without loading any."""

from __future__ import annotations

import math
from typing import NamedTuple


class DataSet(NamedTuple):
    """What is known of a data set before it is loaded."""

    image_shape: tuple[int, int]
    """Height and width of its grayscale images."""
    num_classes: int
    """Labels are 0 to num_classes - 1."""
    root_variable: str | None
    """The environment variable that stands in for `root`; None needs no root."""

    @property
    def num_pixels(self) -> int:
        """D, a flattened image's length."""
        return math.prod(self.image_shape)


DATA_SETS = {
    "mnist": DataSet((28, 28), 10, "L2L_DATA"),
    "digits": DataSet((8, 8), 10, None),
    # Not L2L_DATA: whoever has set that has MNIST there.
    "smiles": DataSet((28, 28), 2, "L2L_SMILES"),
}
"""The data sets that `load_images` knows."""
