"""How the small network's weights are made: it learns which of many pictures a patch comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_lightning.tasks.style.networks import SmallFeatures
from l2l_lightning.tasks.style.pictures import in_unit, photographs

PATCH = 32
"""Height and width of the patches that it learns on, in pixels."""

TILES, GRATINGS = 4, 16


def train_features(
    seed: int = 0, steps: int = 600, batch_size: int = 64, progress: Callable[[str], None] = lambda text: None
) -> SmallFeatures:
    """Trains the small network by itself, in about a minute of one core: without labels that anybody gave.

    The classes are 16 tiles of the training part of the photographs and 16 drawn textures (gratings of a
    direction, a width and two colours, with noise). A patch of one of them, of random contrast, brightness
    and colour, is to be told by the mean of the last features over the patch, through a linear layer which is
    then thrown away. The photographs' other parts and the pictures that styles are taken from are not met.

    Args:
        seed: Of the network, the textures and the patches.
        steps: Steps of Adam at a rate that falls from 0.003 to 0 as a cosine.
        batch_size: Patches a step.
        progress: Told the loss every hundredth of the way.

    Source: classes that are pictures are Dosovitskiy et al. 2014's, "Discriminative Unsupervised Feature
    Learning with Convolutional Neural Networks".
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, head = SmallFeatures(), nn.Linear(SmallFeatures.CHANNELS[-1], TILES**2 + GRATINGS)
    sources = [*_tiles(in_unit(photographs()["train"][0])), *(_grating(generator) for _ in range(GRATINGS))]
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        labels = torch.randint(len(sources), (batch_size,), generator=generator)
        patches = torch.stack([_patch(sources[int(label)], generator) for label in labels])
        loss = F.cross_entropy(head(network(patches).mean((-2, -1))), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % max(steps // 100, 1) == 0:
            progress(f"step {step} of {steps}: loss {loss.item():.3f}")
    return network


def _tiles(picture: Tensor) -> Sequence[Tensor]:
    """Cuts a picture [3, H, W] into TILES × TILES parts."""
    rows = picture.tensor_split(TILES, dim=1)
    return [tile for row in rows for tile in row.tensor_split(TILES, dim=2)]


def _grating(generator: torch.Generator) -> Tensor:
    """Draws waves of one direction, from one colour to another, with noise, [3, 96, 96]."""
    angle, width, phase, noise = torch.rand(4, generator=generator).tolist()
    colours = torch.rand(2, 3, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    along = x * math.cos(math.pi * angle) + y * math.sin(math.pi * angle)
    wave = 0.5 + 0.5 * torch.sin(2 * math.pi * (along / (3 + 21 * width) + phase))
    grating = torch.lerp(colours[0], colours[1], wave)
    noisy: Tensor = grating + 0.2 * noise * torch.randn(grating.shape, generator=generator)
    return noisy


def _patch(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a patch of a picture [3, H, W], of another contrast, brightness and colour, [3, PATCH, PATCH]."""
    _, height, width = picture.shape
    row, column = (int(torch.randint(side - PATCH + 1, (), generator=generator)) for side in (height, width))
    patch = picture[:, row : row + PATCH, column : column + PATCH]
    contrast = 0.6 + 0.8 * torch.rand(1, 1, 1, generator=generator)
    colour = 0.2 * torch.randn(3, 1, 1, generator=generator)
    drawn: Tensor = 0.5 + contrast * (patch - 0.5) + colour
    return drawn
