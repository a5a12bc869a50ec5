"""A labelled set of images that lives on one device and is indexed there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Flattened images [M, D] float32 in [0, 1] and labels [M] int64, on one device."""

    pixels: Tensor
    labels: Tensor
    source: str
    """Where they came from, for the record: "embedded MNIST subset (…)", "MNIST at ROOT (…)"."""
    num_classes: int | None = None
    """C, where labels are 0 to C - 1; None if that is not said."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """The same images on another device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def select(self, indices: Tensor) -> Images:
        """The images at indices [n], as a set of their own."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def sample_indices(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """A minibatch's indices [batch_size], drawn with replacement (as DeepMind's code does)."""
        return torch.randint(len(self), (batch_size,), generator=generator)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [..., D] and labels [...] of the images at indices [...], which are on the same device."""
        # index_select copies whole rows; plain indexing takes twice as long.
        pixels = self.pixels.index_select(0, indices.flatten())
        return pixels.view(*indices.shape, -1), self.labels[indices]
