"""Examples that small problems are about: images, clouds, curves, sequences of symbols."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_lightning.data.digits import load_digits
from l2l_lightning.data.images import Images
from l2l_lightning.data.mnist import load_mnist
from l2l_lightning.tasks.small.draw import Draw

HELD_OUT = 512
"""Examples that a problem is judged on; of small data sets a third."""


class Examples(NamedTuple):
    """What a problem is about: pairs of inputs and targets, the first of which are for training."""

    inputs: Tensor
    targets: Tensor
    num_train: int

    @property
    def symbols(self) -> int:
        """The number of symbols, of sequences."""
        return 1 + max(int(self.inputs.max()), int(self.targets.max()))


@functools.cache
def _pictures(name: str, stride: int) -> Images:
    """The training images, always those that ship with the package and with scikit-learn, [M, D]."""
    images = (load_digits() if name == "digits" else load_mnist(None, False)).train
    side = math.isqrt(images.pixels.shape[1])
    pixels = images.pixels.view(-1, side, side)[:, ::stride, ::stride].flatten(1)
    return Images(pixels.contiguous(), images.labels, images.source, images.num_classes)


def split(inputs: Tensor, targets: Tensor) -> Examples:
    """The last third, and HELD_OUT at most, are held out."""
    return Examples(inputs, targets, len(inputs) - min(HELD_OUT, len(inputs) // 3))


def pictures(draw: Draw, most_pixels: int = 784) -> Examples:
    """Digits or MNIST, some or all, of some brightness, some labels of which may be wrong."""
    sources = [("digits", 1), ("digits", 1), ("mnist", 4), ("mnist", 2), ("mnist", 2), ("mnist", 1)]
    images = _pictures(*draw.choice(*(s for s in sources if _pixels(*s) <= most_pixels)))
    count = min(len(images), draw.size(300, 4000))
    chosen = images.select(torch.randperm(len(images), generator=draw.generator)[:count])
    pixels = draw.log_uniform(0.3, 3) * (chosen.pixels - (chosen.pixels.mean() if draw.happens(0.5) else 0))
    labels = chosen.labels
    if draw.happens(0.3):
        wrong = torch.rand(count, generator=draw.generator) < draw.uniform(0.02, 0.2)
        labels = torch.where(wrong, draw.integers(10, count), labels)
    return split(pixels, labels)


def _pixels(name: str, stride: int) -> int:
    return 64 if name == "digits" else (28 // stride) ** 2


def clusters(draw: Draw) -> Examples:
    """Classes that are clouds of points, or that a random network tells apart."""
    count, dimension, classes = draw.size(100, 4000), draw.size(4, 64), draw.size(2, 20)
    x = draw.normal(count, dimension)
    if draw.happens(0.5):
        labels = draw.integers(classes, count)
        x = x + draw.log_uniform(0.5, 3) * draw.normal(classes, dimension)[labels]
    else:
        hidden = torch.tanh(x @ draw.normal(dimension, 16) / math.sqrt(dimension) * 2)
        labels = (hidden @ draw.normal(16, classes)).argmax(-1)
    return split(draw.log_uniform(0.3, 3) * x, labels)


def curves(draw: Draw) -> Examples:
    """A smooth function of a few numbers, with noise or without."""
    count, dimension, outputs = draw.size(64, 4000), draw.size(1, 6), draw.size(1, 4)
    x = (
        draw.normal(count, dimension)
        if draw.happens(0.5)
        else 2 * torch.rand(count, dimension, generator=draw.generator) - 1
    )
    frequencies = draw.log_uniform(0.7, 5) * draw.normal(dimension, 8)
    y = (x @ frequencies + 6 * draw.normal(8)).sin() @ draw.normal(8, outputs) / math.sqrt(8)
    if draw.happens(0.5):
        y = y + draw.log_uniform(0.02, 0.5) * draw.normal(count, outputs)
    return split(x, draw.log_uniform(0.3, 3) * y)


def text(draw: Draw, length: int) -> Examples:
    """Sequences of a random Markov chain of order 1 or 2, with what follows each symbol."""
    symbols, order, count = draw.size(6, 32), draw.choice(1, 2), draw.size(200, 2000)
    table = (draw.log_uniform(0.7, 3) * draw.normal(symbols**order, symbols)).softmax(-1)
    sequence = draw.integers(symbols, count, order)
    for _ in range(length):
        state = (sequence[:, -order:] * symbols ** torch.arange(order)).sum(-1)
        following = torch.multinomial(table[state], 1, generator=draw.generator)
        sequence = torch.cat([sequence, following], 1)
    return split(sequence[:, -length - 1 : -1], sequence[:, -length:])
