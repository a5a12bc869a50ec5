"""The random choices that a problem is made of."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Draw:
    """The random choices that a problem is made of, all from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number, uniform in [low, high)."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def log_uniform(self, low: float, high: float) -> float:
        """A number whose logarithm is uniform."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def size(self, low: int, high: int) -> int:
        """A whole number in [low, high], log-uniform."""
        return min(high, int(self.log_uniform(low, high + 1)))

    def choice(self, *values: T) -> T:
        """One of the values."""
        return values[int(torch.randint(len(values), (), generator=self.generator))]

    def happens(self, probability: float) -> bool:
        """True with a probability."""
        return self.uniform() < probability

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def integers(self, count: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to count − 1."""
        return torch.randint(count, shape, generator=self.generator)
