"""The simplest optimizees: x², and the x² with noisy scales that the original study calls its quadratic."""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_lightning.checks import check_at_least
from l2l_lightning.data.examples import Examples
from l2l_lightning.tasks.base import Batch, Task


class SimpleSquare(Task):
    """f(θ) = Σ_i θ_i² from θ0 = 1: nothing random, for tests against known numbers.

    Args:
        dim: N. 1 is DeepMind's `simple`, more its `simple_multi_optimizer`.

    Raises:
        ValueError: dim < 1.

    Example:
        >>> task = SimpleSquare(dim=3)
        >>> task.loss(task.init(torch.Generator()), ())
        tensor(3.)

    Source: `problems.simple` of github.com/google-deepmind/learning-to-learn.
    """

    def __init__(self, dim: int = 1) -> None:
        check_at_least(1, dim=dim)
        self.dim = self.num_coordinates = dim

    def init(self, generator: torch.Generator) -> Tensor:
        """Returns θ0 = 1, [N], and draws nothing."""
        return torch.ones(self.num_coordinates)

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes Σ_i θ_i², [...], of θ [..., N]; the batch is ()."""
        return theta.square().sum(-1)

    def losses(self, thetas: Tensor, batches: Batch) -> Tensor:
        """Computes the losses [K] of θ [K, N]; there is no batch that vmap could map over."""
        return self.loss(thetas, batches)


class NoisyScaledSquare(Task):
    """f_t(θ) = Σ_i (s_i θ_i)², with scales s_i ~ U[scale_low, scale_high) drawn anew at every evaluation.

    Loss and gradient, 2 s_i² θ_i, share a draw. The mean over s is E[s²] ||θ||² with
    E[s²] = (low² + low·high + high²)/3, 13/12 by default; the minimum is θ = 0 whatever the noise.

    Args:
        dim: N.
        scale_low: Smallest scale.
        scale_high: Largest scale.
        init_bound: θ0 ~ U[-init_bound, init_bound). 1 is what the study's figure 2 ran with.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> task = NoisyScaledSquare(dim=2)
        >>> task.loss(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.5]))
        tensor(9.2500)

    Source: Bradford, Giancola and Petri, "Investigating Learning to Learn by Gradient Descent by Gradient
    Descent", figure 2; `f_quadratic` of github.com/mjgiancola/cs-525-project.
    """

    def __init__(
        self, dim: int = 10, scale_low: float = 0.5, scale_high: float = 1.5, init_bound: float = 1.0
    ) -> None:
        check_at_least(1, dim=dim)
        check_at_least(0, scale_low=scale_low, init_bound=init_bound)
        check_at_least(scale_low, scale_high=scale_high)
        self.dim = self.num_coordinates = dim
        self.scale_low = scale_low
        self.scale_high = scale_high
        self.init_bound = init_bound

    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0 ~ U[-init_bound, init_bound), [N]."""
        return self.init_bound * (2 * torch.rand(self.num_coordinates, generator=generator) - 1)

    def batch(self, instance: Batch, images: Examples | None, generator: torch.Generator) -> Batch:
        """Draws the scales s of one evaluation, [N]."""
        width = self.scale_high - self.scale_low
        return self.scale_low + width * torch.rand(self.num_coordinates, generator=generator)

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes Σ_i (s_i θ_i)², [...], of θ and the scales s, [..., N] each."""
        value: Tensor = (batch * theta).square().sum(-1)
        return value

    def losses(self, thetas: Tensor, batches: Batch) -> Tensor:
        """Computes the losses [K] of θ [K, N]: `loss` with a leading dimension."""
        return self.loss(thetas, batches)
