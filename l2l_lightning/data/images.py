"""A labelled set of images that lives on one device and is indexed there."""

from __future__ import annotations

from torch import Tensor

from l2l_lightning.data.examples import Examples, TensorExamples


class Images(TensorExamples):
    """Images and their labels, on one device: `TensorExamples` under names of their own.

    Args:
        pixels: Values in [0, 1], float32: [M, D] of grey images, flattened; [M, 3, H, W] of coloured ones.
        labels: Classes from 0 on, [M] int64.
        source: Where they came from, for the record: "embedded MNIST subset (…)", "MNIST at ROOT (…)".
        num_classes: C, where labels are 0 to C - 1; None where that is not known.

    Raises:
        ValueError: There are not as many labels as images.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, source: str, num_classes: int | None = None) -> None:
        super().__init__(pixels, labels, source, num_classes)

    @property
    def pixels(self) -> Tensor:
        """The images, [M, D] or [M, 3, H, W]."""
        pixels: Tensor = self.inputs
        return pixels

    @property
    def labels(self) -> Tensor:
        """Their classes, [M]."""
        labels: Tensor = self.targets
        return labels


def need_examples(examples: Examples | None, reader: object) -> Examples:
    """Returns the examples, or raises a ValueError that says what to pass to the task that reads them."""
    if examples is None:
        raise ValueError(
            f"{type(reader).__name__} draws its minibatches from images and was given none: "
            "pass a split of l2l_lightning.data.load_images(), or other Examples"
        )
    return examples
