"""Families of small problems: each draws examples, a network for them, and names the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from l2l_lightning.tasks.small import networks
from l2l_lightning.tasks.small.draw import Draw
from l2l_lightning.tasks.small.examples import Examples, clusters, curves, pictures, split, text
from l2l_lightning.tasks.small.networks import ACTIVATIONS, INITIALISATIONS, Network


class Problem(NamedTuple):
    """Examples, a network on them, the loss of its outputs, and parameters that it begins with."""

    examples: Examples
    network: Network
    loss: Callable[[Tensor, Tensor], Tensor]
    trained: tuple[Tensor, ...] = ()
    """The first parameters, where they are the same for every θ0; the others are drawn."""
    batch_sizes: tuple[int, int] = (16, 128)
    """The least and the most that a minibatch has; few where an example takes long."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits [..., C] and classes [...]."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _perceptron(draw: Draw, inputs: int, outputs: int, depth: int, most: int = 32) -> Network:
    """A perceptron with `depth` hidden layers of up to `most` units."""
    units = draw.size(4, most)
    normalisation = draw.choice("none", "none", "none", "layer", "batch") if depth else "none"
    activation, residual = draw.choice(*ACTIVATIONS), draw.happens(0.2)
    widths = [inputs, *[units] * depth, outputs]
    return networks.perceptron(widths, activation, draw.choice(*INITIALISATIONS), normalisation, residual)


def _classes(examples: Examples) -> int:
    return int(examples.targets.max()) + 1


def image_perceptron(draw: Draw) -> Problem:
    """Perceptrons on images."""
    examples = pictures(draw)
    pixels, depth = examples.inputs.shape[1], draw.size(1, 3)
    most = 32 if pixels <= 64 else 16 if pixels <= 196 else 6
    return Problem(examples, _perceptron(draw, pixels, 10, depth, most), cross_entropy)


def plateau(draw: Draw) -> Problem:
    """Perceptrons of several layers of sigmoids, whose first steps are nearly flat."""
    examples = pictures(draw, 196)
    units, depth = draw.size(8, 24), draw.choice(2, 3)
    widths = [examples.inputs.shape[1], *[units] * depth, 10]
    network = networks.perceptron(widths, "sigmoid", draw.choice("torch", "lecun", "0.01", "0.1"))
    return Problem(examples, network, cross_entropy)


def cluster_perceptron(draw: Draw) -> Problem:
    """Perceptrons on clouds of points."""
    examples = clusters(draw)
    network = _perceptron(draw, examples.inputs.shape[1], _classes(examples), draw.size(1, 4))
    return Problem(examples, network, cross_entropy)


def regression(draw: Draw) -> Problem:
    """Perceptrons on smooth functions."""
    examples = curves(draw)
    sizes = examples.inputs.shape[1], examples.targets.shape[1]
    return Problem(examples, _perceptron(draw, *sizes, draw.size(1, 3)), F.mse_loss)


def linear(draw: Draw) -> Problem:
    """Logistic regression, and linear regression with inputs of very different variances."""
    if draw.happens(0.6):
        examples = pictures(draw, 196) if draw.happens(0.6) else clusters(draw)
        network = _perceptron(draw, examples.inputs.shape[1], _classes(examples), 0)
        return Problem(examples, network, cross_entropy)
    count, dimension, outputs = draw.size(64, 2000), draw.size(4, 64), draw.size(1, 16)
    x = draw.normal(count, dimension) * torch.logspace(0, -draw.uniform(0, 2), dimension)
    y = x @ draw.normal(dimension, outputs) + draw.choice(0.0, 0.1, 1.0) * draw.normal(count, outputs)
    return Problem(split(x, y), _perceptron(draw, dimension, outputs, 0), F.mse_loss)


def convolutions(draw: Draw) -> Problem:
    """Two convolutions and a linear layer on images, normalised or not."""
    examples = pictures(draw, 196)
    side, channels = math.isqrt(examples.inputs.shape[1]), draw.size(4, 12)
    activation, normalised = draw.choice("relu", "relu", "gelu", "tanh", "elu"), draw.happens(0.5)
    initialisation = draw.choice("torch", "he", "lecun")
    network = networks.convolutional(side, channels, activation, initialisation, normalised)
    return Problem(examples, network, cross_entropy, batch_sizes=(12, 48))


def attention(draw: Draw) -> Problem:
    """A language model of one or two layers of attention on Markov chains."""
    length, width, layers = draw.size(6, 12), 2 * draw.size(5, 12), draw.choice(1, 1, 2)
    examples = text(draw, length)
    symbols, initialisation = examples.symbols, draw.choice("torch", "lecun")
    network = networks.transformer(symbols, length, width, layers, initialisation)
    return Problem(examples, network, cross_entropy, batch_sizes=(8, 24))


def recurrent(draw: Draw) -> Problem:
    """A recurrent network of tanh, or gated, on Markov chains."""
    length, units, gated = draw.size(6, 12), draw.size(8, 24), draw.happens(0.5)
    examples = text(draw, length)
    network = networks.recurrent(examples.symbols, length, units, gated, draw.choice("torch", "lecun"))
    return Problem(examples, network, cross_entropy, batch_sizes=(8, 24))


def embeddings(draw: Draw) -> Problem:
    """Factorising a table of which some entries are known, or telling a word by its neighbours."""
    width = draw.size(4, 16)
    if draw.happens(0.5):
        rows, columns, rank = draw.size(20, 150), draw.size(20, 150), draw.size(2, 8)
        table = draw.normal(rows, rank) @ draw.normal(rank, columns) / math.sqrt(rank)
        count = min(int(draw.uniform(0.2, 0.6) * rows * columns), 6000)
        places = torch.stack([draw.integers(rows, count), draw.integers(columns, count)], 1)
        values = table[places[:, 0], places[:, 1]] + draw.choice(0.0, 0.0, 0.1) * draw.normal(count)
        return Problem(split(places, values), networks.factors(rows, columns, width), F.mse_loss)
    chains = text(draw, 5)
    words = torch.cat([chains.inputs, chains.targets[:, -1:]], 1)
    around = split(words[:, [0, 1, 3, 4]], words[:, 2])
    return Problem(around, networks.bag_of_words(int(words.max()) + 1, width), cross_entropy)


def autoencoder(draw: Draw) -> Problem:
    """Images through a narrow layer and back."""
    pixels = pictures(draw, 196).inputs
    size, units, code = pixels.shape[1], draw.size(12, 32), draw.size(2, 10)
    activation, initialisation = draw.choice(*ACTIVATIONS), draw.choice("torch", "he", "lecun")
    network = networks.autoencoder([size, units, code, units, size], activation, initialisation)
    return Problem(split(pixels, pixels), network, F.mse_loss)


def fine_tuning(draw: Draw) -> Problem:
    """A perceptron that was trained on other labels of the same inputs by Adam, with a new last layer."""
    problem = (image_perceptron if draw.happens(0.5) else cluster_perceptron)(draw)
    examples, network = problem.examples, problem.network
    parameters = [value.requires_grad_() for value in network.init(draw.generator)]
    relabelled = torch.randperm(_classes(examples), generator=draw.generator)
    adam = torch.optim.Adam(parameters, 0.01)
    with torch.enable_grad():
        for _ in range(draw.size(50, 200)):
            rows = draw.integers(examples.num_train, 64)
            outputs = network.forward(parameters, examples.inputs[rows])
            adam.zero_grad()
            torch.autograd.backward(cross_entropy(outputs, relabelled[examples.targets[rows]]))
            adam.step()
    return problem._replace(trained=tuple(value.detach() for value in parameters[:-2]))


FAMILIES: dict[str, Callable[[Draw], Problem]] = {
    family.__name__: family
    for family in (
        *(image_perceptron, plateau, cluster_perceptron, regression, linear, convolutions),
        *(attention, recurrent, embeddings, autoencoder, fine_tuning),
    )
}
"""The families by name."""
