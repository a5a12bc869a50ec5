"""Autoencoders and variational autoencoders of images."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_lightning.reproduce.zero_shot import data
from l2l_lightning.reproduce.zero_shot.problem import PROBLEMS, QUICK, Part, Problem
from l2l_lightning.reproduce.zero_shot.problems.networks import mlp

CODE = 8
"""Numbers that an image becomes."""


class VariationalAutoencoder(nn.Module):
    """Maps pixels [B, D] and noise [B, CODE] to minus the evidence's lower bound, in nats an image.

    Source: Kingma and Welling 2013.
    """

    def __init__(self, pixels: int, hidden: int) -> None:
        super().__init__()
        self.encoder = mlp((pixels, hidden, 2 * CODE), nn.ReLU)
        self.decoder = mlp((CODE, hidden, pixels), nn.ReLU)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """The mean over images of reconstruction and Kullback–Leibler divergence, summed over pixels."""
        mean, log_variance = self.encoder(pixels).chunk(2, 1)
        logits = self.decoder(mean + (log_variance / 2).exp() * noise)
        reconstruction = F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        loss: Tensor = (reconstruction + divergence) / len(pixels)
        return loss


def variational(dataset: str, hidden: int, steps: int) -> Problem:
    """A variational autoencoder whose noise comes with the minibatches, fixed where held out."""
    rows, size = data.images(dataset), 64
    draw = rows.batches(size)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw(generator)[0], torch.randn(size, CODE, generator=generator)

    def held_out(part: Part) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        found = (pixels for pixels, _ in rows.held_out(part))
        return [(pixels, torch.randn(len(pixels), CODE, generator=generator)) for pixels in found]

    build = partial(VariationalAutoencoder, rows.train[0].shape[1], hidden)
    return Problem("VAE", steps, build, batch, held_out, lambda module, batch: module(*batch), rows.source)


def autoencoder(dataset: str, hidden: int, steps: int, activation: type[nn.Module]) -> Problem:
    """An autoencoder whose loss is the mean squared error of a pixel."""
    rows = data.images(dataset)
    pixels = rows.train[0].shape[1]
    build = partial(mlp, (pixels, hidden, CODE, hidden, pixels), activation)
    return Problem(
        *("autoencoder", steps, build, rows.batches(64), rows.held_out),
        *(lambda module, batch: F.mse_loss(module(batch[0]), batch[0]), rows.source),
    )


PROBLEMS |= {
    "VAE MNIST, 300": partial(variational, "mnist", 100, 300),
    "VAE MNIST, 1000": partial(variational, "mnist", 64, 1000),
    "VAE digits, 1000": partial(variational, "digits", 48, 1000),
    "autoencoder MNIST ReLU, 300": partial(autoencoder, "mnist", 100, 300, nn.ReLU),
    "autoencoder MNIST tanh, 1000": partial(autoencoder, "mnist", 64, 1000, nn.Tanh),
    "autoencoder digits ELU, 3000": partial(autoencoder, "digits", 32, 3000, nn.ELU),
}
QUICK += ["VAE MNIST, 300"]
