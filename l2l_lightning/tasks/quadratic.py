"""Random convex quadratics: the first experiment of the learning-to-learn paper."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from l2l_lightning.checks import check_at_least, check_choice
from l2l_lightning.tasks.base import Batch, Task


class Quadratic(Task):
    """Random quadratics, a new one every rollout: f(θ) = 1/B Σ_b ||W_b θ_b - y_b||².

    W_b [dim, dim] and y_b [dim] are drawn once a rollout, IID N(0, 1) in the paper and U[0, 1) in DeepMind's
    code, and θ = (θ_1, …, θ_B) holds the B problems' vectors: N = batch_size · dim. The gradient is
    ∇_b f = 2/B W_bᵀ(W_b θ_b - y_b).

    Args:
        dim: Length of each θ_b.
        variant: Which distribution W and y have: "paper" or "deepmind".
        batch_size: B, the problems in one optimizee; None is 1 for the paper, 128 for DeepMind's code.
        init_std: θ0 ~ N(0, init_std²). 0.01 is DeepMind's; the paper does not say.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> task = Quadratic(dim=2)
        >>> W, y = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[1.0, 1.0]])
        >>> task.loss(torch.zeros(2), (W, y))
        tensor(2.)

    Source: Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent",
    section 3.1; `problems.quadratic` of github.com/google-deepmind/learning-to-learn.
    """

    def __init__(
        self,
        dim: int = 10,
        variant: Literal["paper", "deepmind"] = "paper",
        batch_size: int | None = None,
        init_std: float = 0.01,
    ) -> None:
        check_choice(["paper", "deepmind"], variant=variant)
        if batch_size is None:
            batch_size = 1 if variant == "paper" else 128
        check_at_least(1, dim=dim, batch_size=batch_size)
        check_at_least(0, init_std=init_std)
        self.dim = dim
        self.variant = variant
        self.batch_size = batch_size
        self.init_std = init_std
        self.num_coordinates = batch_size * dim

    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0 ~ N(0, init_std²), [B·dim]."""
        return self.init_std * torch.randn(self.num_coordinates, generator=generator)

    def instance(self, generator: torch.Generator) -> Batch:
        """Draws W [B, dim, dim] and y [B, dim]."""
        draw = torch.randn if self.variant == "paper" else torch.rand
        W = draw(self.batch_size, self.dim, self.dim, generator=generator)
        return W, draw(self.batch_size, self.dim, generator=generator)

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes f [...] of θ [..., N], W [..., B, dim, dim] and y [..., B, dim]."""
        W, y = batch
        theta = theta.reshape(y.shape)
        residual = (W @ theta.unsqueeze(-1)).squeeze(-1) - y
        value: Tensor = residual.square().sum(-1).mean(-1)
        return value

    def losses(self, thetas: Tensor, batches: Batch) -> Tensor:
        """Computes the losses [K] of θ [K, N]: `loss` with a leading dimension, without vmap's overhead."""
        return self.loss(thetas, batches)
