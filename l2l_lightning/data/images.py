"""A labelled set of images that lives on one device and is indexed there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Flattened images and their labels, on one device.

    Args:
        pixels: Grey values in [0, 1], [M, D] float32.
        labels: Classes from 0 on, [M] int64.
        source: Where they came from, for the record: "embedded MNIST subset (…)", "MNIST at ROOT (…)".
        num_classes: C, where labels are 0 to C - 1; None where that is not known.
    """

    pixels: Tensor
    labels: Tensor
    source: str
    num_classes: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """Returns the same images on another device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def select(self, indices: Tensor) -> Images:
        """Returns the images at indices [n] as a set of their own."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def sample_indices(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draws a minibatch's indices [batch_size] with replacement, as DeepMind's code does."""
        return torch.randint(len(self), (batch_size,), generator=generator)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns pixels [..., D] and labels [...] of the images at indices [...] on the same device."""
        # index_select copies whole rows; plain indexing takes twice as long.
        pixels = self.pixels.index_select(0, indices.flatten())
        return pixels.view(*indices.shape, -1), self.labels[indices]


def need_images(images: Images | None, reader: object) -> Images:
    """Returns the images, or raises a ValueError that says what to pass to the task that reads them."""
    if images is None:
        raise ValueError(
            f"{type(reader).__name__} draws its minibatches from images and was given none: "
            "pass a split of l2l_lightning.data.load_images()"
        )
    return images
