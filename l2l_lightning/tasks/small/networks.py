"""Small networks as functions of their parameters: perceptrons, convolutions, attention, recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "elu": F.elu,
    "silu": F.silu,
    "sine": torch.sin,
}
"""The activations by name."""

NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "layer": lambda z: (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, correction=0) + 1e-5).sqrt(),
    "batch": lambda z: (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt(),
}
"""Normalisations of [B, units], over an example's units or over the minibatch."""

INITIALISATIONS: dict[str, Callable[[int], float]] = {
    "torch": lambda fan_in: 1 / math.sqrt(3 * fan_in),
    "he": lambda fan_in: math.sqrt(2 / fan_in),
    "lecun": lambda fan_in: 1 / math.sqrt(fan_in),
    "0.01": lambda fan_in: 0.01,
    "0.1": lambda fan_in: 0.1,
}
"""Standard deviations of initial weights, by fan-in; biases begin at 0, gains at 1, tables at N(0, 0.1²)."""


class Network(NamedTuple):
    """A function of parameters and inputs; `initialisation` is of INITIALISATIONS."""

    shapes: Shapes
    forward: Callable[[Sequence[Tensor], Tensor], Tensor]
    initialisation: str

    def init(self, generator: torch.Generator) -> list[Tensor]:
        """Draws the parameters, in the order of their shapes."""
        values = []
        for name, shape in self.shapes.items():
            if len(shape) < 2:
                values.append(torch.ones(shape) if name.endswith("gain") else torch.zeros(shape))
            else:
                fan_in = math.prod(shape[1:])
                scale = 0.1 if name.endswith("table") else INITIALISATIONS[self.initialisation](fan_in)
                values.append(scale * torch.randn(shape, generator=generator))
        return values


def perceptron(
    widths: Sequence[int],
    activation: str,
    initialisation: str,
    normalisation: str = "none",
    residual: bool = False,
) -> Network:
    """Linear layers of these widths, inputs and outputs included, with an activation in between.

    What is normalised has a gain and a bias after it; with `residual`, hidden layers from the second on add
    to their inputs.
    """
    depth, shapes = len(widths) - 2, Shapes()
    for index, (inputs, units) in enumerate(pairwise(widths)):
        shapes |= {f"{index}.weight": (units, inputs), f"{index}.bias": (units,)}
        if normalisation != "none" and index < depth:
            shapes[f"{index}.gain"] = (units,)
    act, normalise = ACTIVATIONS[activation], NORMALISATIONS[normalisation]

    def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        own = iter(parameters)
        for index in range(depth):
            z = F.linear(x, next(own))
            bias = next(own)
            z = z + bias if normalisation == "none" else next(own) * normalise(z) + bias
            x = x + act(z) if residual and index else act(z)
        return F.linear(x, next(own), next(own))

    return Network(shapes, forward, initialisation)


def convolutional(
    side: int, channels: int, activation: str, initialisation: str, normalised: bool
) -> Network:
    """Two 3 × 3 convolutions of stride 2 on images of side × side, maybe batch-normalised, and ten logits."""
    last = ((side - 3) // 2 - 2) // 2 + 1
    shapes: Shapes = {
        "0.weight": (channels, 1, 3, 3),
        "0.bias": (channels,),
        "1.weight": (2 * channels, channels, 3, 3),
        "1.bias": (2 * channels,),
        "head.weight": (10, 2 * channels * last * last),
        "head.bias": (10,),
    }
    if normalised:
        shapes |= {"0.gain": (channels,), "1.gain": (2 * channels,)}
    act = ACTIVATIONS[activation]

    def normalise(z: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        mean, variance = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), keepdim=True, correction=0)
        return gain[:, None, None] * (z - mean) / (variance + 1e-5).sqrt() + bias[:, None, None]

    def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        x = x.view(-1, 1, side, side)
        for layer in range(2):
            weight, bias = parameters[2 * layer : 2 * layer + 2]
            z = F.conv2d(x, weight, None if normalised else bias, stride=2)
            x = act(normalise(z, parameters[6 + layer], bias) if normalised else z)
        return F.linear(x.flatten(1), parameters[4], parameters[5])

    return Network(shapes, forward, initialisation)


def transformer(symbols: int, length: int, width: int, layers: int, initialisation: str) -> Network:
    """A causal transformer of two heads, which tells what follows each of `length` symbols."""
    shapes: Shapes = {"token.table": (symbols, width), "place.table": (length, width)}
    for layer in range(layers):
        shapes |= {
            f"{layer}.norm.gain": (width,),
            f"{layer}.qkv.weight": (3 * width, width),
            f"{layer}.out.weight": (width, width),
            f"{layer}.up.weight": (2 * width, width),
            f"{layer}.up.bias": (2 * width,),
            f"{layer}.down.weight": (width, 2 * width),
        }
    shapes |= {"norm.gain": (width,), "head.weight": (symbols, width), "head.bias": (symbols,)}
    mask = torch.full((length, length), -math.inf).triu(1)
    normalise = NORMALISATIONS["layer"]

    def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        hidden = parameters[0][x] + parameters[1]
        for layer in range(layers):
            gain, qkv, out, up, up_bias, down = parameters[2 + 6 * layer : 8 + 6 * layer]
            heads = F.linear(gain * normalise(hidden), qkv).view(*x.shape, 3, 2, width // 2)
            q, k, v = heads.movedim(-3, 0).transpose(-2, -3)  # [B, heads, length, width / 2] each
            weights = (q @ k.mT / math.sqrt(width // 2) + mask.to(q)).softmax(-1)
            hidden = hidden + F.linear((weights @ v).transpose(-2, -3).flatten(-2), out)
            hidden = hidden + F.linear(F.gelu(F.linear(normalise(hidden), up, up_bias)), down)
        return F.linear(parameters[-3] * normalise(hidden), parameters[-2], parameters[-1])

    return Network(shapes, forward, initialisation)


def recurrent(symbols: int, length: int, units: int, gated: bool, initialisation: str) -> Network:
    """A recurrent network of tanh, or gated (GRU), which tells what follows each of `length` symbols."""
    rows = 3 * units if gated else units
    shapes: Shapes = {
        "token.table": (symbols, units),
        "input.weight": (rows, units),
        "hidden.weight": (rows, units),
        "bias": (rows,),
        "head.weight": (symbols, units),
        "head.bias": (symbols,),
    }

    def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        table, w_in, w_hidden, bias, w_out, b_out = parameters
        inputs = F.linear(table[x], w_in, bias)  # [B, length, rows]
        h = torch.zeros_like(inputs[:, 0, :units])
        outputs = []
        for t in range(length):
            a, b = inputs[:, t], F.linear(h, w_hidden)
            if gated:
                reset, update = (a[:, : 2 * units] + b[:, : 2 * units]).sigmoid().chunk(2, -1)
                h = update * h + (1 - update) * torch.tanh(a[:, 2 * units :] + reset * b[:, 2 * units :])
            else:
                h = torch.tanh(a + b)
            outputs.append(h)
        return F.linear(torch.stack(outputs, 1), w_out, b_out)

    return Network(shapes, forward, initialisation)


def factors(rows: int, columns: int, width: int) -> Network:
    """The product of two tables' rows, at places (row, column)."""

    def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        return (parameters[0][x[:, 0]] * parameters[1][x[:, 1]]).sum(-1)

    return Network({"rows.table": (rows, width), "columns.table": (columns, width)}, forward, "torch")


def bag_of_words(symbols: int, width: int) -> Network:
    """Logits of a symbol by the mean of its neighbours' rows in a table."""

    def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        return F.linear(parameters[0][x].mean(1), parameters[1], parameters[2])

    shapes: Shapes = {
        "token.table": (symbols, width),
        "head.weight": (symbols, width),
        "head.bias": (symbols,),
    }
    return Network(shapes, forward, "torch")


def autoencoder(widths: Sequence[int], activation: str, initialisation: str) -> Network:
    """Four linear layers with an activation after the first and the third."""
    act, shapes = ACTIVATIONS[activation], Shapes()
    for index, (inputs, units) in enumerate(pairwise(widths)):
        shapes |= {f"{index}.weight": (units, inputs), f"{index}.bias": (units,)}

    def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        for index in range(4):
            x = F.linear(x, parameters[2 * index], parameters[2 * index + 1])
            x = act(x) if index % 2 == 0 else x
        return x

    return Network(shapes, forward, initialisation)
