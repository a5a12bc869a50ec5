"""Functions of one or two coordinates: a sine, photographs, and differential equations."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_lightning.reproduce.zero_shot import data
from l2l_lightning.reproduce.zero_shot.problem import PROBLEMS, QUICK, Part, Problem, prediction
from l2l_lightning.reproduce.zero_shot.problems.networks import mlp

GRID = {"validation": torch.linspace(-0.9925, 0.9875, 397), "test": torch.linspace(-0.99, 0.99, 397)}
"""Where functions on [−1, 1] are held out; training draws from all of it."""


def sine(steps: int, noise: float = 0.0) -> Problem:
    """The regression of sin 6x on [−1, 1], of Gaussian noise in training if wanted."""

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = 2 * torch.rand(64, 1, generator=generator) - 1
        return x, (6 * x).sin() + noise * torch.randn(64, 1, generator=generator)

    def held_out(part: Part) -> list[tuple[Tensor, Tensor]]:
        x = GRID[part][:, None]
        return [(x, (6 * x).sin())]

    build, loss = partial(mlp, (1, 64, 64, 1), nn.Tanh), prediction(F.mse_loss)
    return Problem("regression", steps, build, batch, held_out, loss, "generated")


class Waves(nn.Module):
    """Turns places [B, 2] into sines and cosines [B, 4k] of k frequencies, a power of 2 each."""

    frequencies: Tensor

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(frequencies))

    def forward(self, places: Tensor) -> Tensor:
        """Sines and cosines of every coordinate at every frequency."""
        angles = (places[:, :, None] * self.frequencies).flatten(1)
        return torch.cat([angles.sin(), angles.cos()], 1)


def photograph(name: str, frequencies: int, steps: int) -> Problem:
    """The colour of a photograph at a place, from Fourier features; the mean squared error.

    Source: Tancik et al. 2020.
    """
    rows, loss = data.picture(name, 6), prediction(F.mse_loss)

    def build() -> nn.Module:
        return nn.Sequential(Waves(frequencies), mlp((4 * frequencies, 64, 64, 3), nn.ReLU))

    return Problem("coordinates", steps, build, rows.batches(128), rows.held_out, loss, rows.source)


def derivatives(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns u, u' and u'' of a function of x [B, 1]."""
    x = x.requires_grad_()
    u = module(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return u, first, second


def physics_informed(equation: str, steps: int) -> Problem:
    """Solves u'' = f or u u' = ν u'' on [−1, 1], with values at both ends; held out is u's squared error.

    "poisson": f = −π² sin πx, whose solution is sin πx; "burgers": ν = 0.1, −tanh(x / 2ν) with u(∓1) = ±1 but
    for 1 − tanh 5 = 9e-5. Training minimises the equation's mean squared residual at random places and that
    of the values at the ends; the loss is scaled by 10⁻² for Poisson's, whose residual begins near π⁴ / 2.

    Source: Raissi et al. 2019.
    """
    poisson = equation == "poisson"
    ends = torch.tensor([[-1.0], [1.0]])

    def solution(x: Tensor) -> Tensor:
        return (math.pi * x).sin() if poisson else -(5 * x).tanh()

    def batch(generator: torch.Generator) -> Tensor:
        return 2 * torch.rand(64, 1, generator=generator) - 1

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        u, first, second = derivatives(module, x)
        residual = second + math.pi**2 * (math.pi * x).sin() if poisson else u * first - 0.1 * second
        return (0.01 if poisson else 1.0) * residual.square().mean() + F.mse_loss(
            module(ends), solution(ends)
        )

    def score(module: nn.Module, x: Tensor) -> Tensor:
        return F.mse_loss(module(x), solution(x))

    build = partial(mlp, (1, 32, 32, 1), nn.Tanh)
    held_out = {part: [x[:, None]] for part, x in GRID.items()}
    return Problem("physics", steps, build, batch, held_out.__getitem__, loss, "generated", score)


for _steps in (100, 500, 3000, 10000):
    PROBLEMS[f"sine, {_steps}"] = partial(sine, _steps)
PROBLEMS |= {
    "noisy sine, 1000": partial(sine, 1000, 0.3),
    "china.jpg, 300": partial(photograph, "china", 6, 300),
    "china.jpg, 1000": partial(photograph, "china", 6, 1000),
    "flower.jpg, 3000": partial(photograph, "flower", 5, 3000),
    "Poisson's equation, 1000": partial(physics_informed, "poisson", 1000),
    "Burgers' equation, 1000": partial(physics_informed, "burgers", 1000),
    "Poisson's equation, 3000": partial(physics_informed, "poisson", 3000),
}
QUICK += ["sine, 500", "china.jpg, 300"]
