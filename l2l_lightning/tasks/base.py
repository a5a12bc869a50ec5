"""The contract of a task: a distribution of optimizees, and the data that they are optimised on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2l_lightning.data.images import Images

Batch = Any
"""A pytree of tensors: what one evaluation of the loss is computed on."""


class Task(ABC):
    """A distribution of optimizees: θ0 ~ init, and at every step a loss f(θ, batch).

    An optimizee is a flat vector θ [N]. Its randomness comes from one torch.Generator (always on the CPU,
    so that every device draws the same), in this order: `init`, `instance`, then one `batch` per evaluation.

    A subclass sets `num_coordinates` and implements `init` and `loss`; it overrides `instance` if an
    optimizee has constants of its own (a quadratic's W and y), `batch` if every evaluation has its own
    minibatch, `losses` if it can beat torch.func.vmap, and `losses_and_grads` if it can beat autograd.
    `gather` and `losses` are functions of their arguments: where the device allows it they are recorded once
    and replayed. A task knows nothing of update rules.
    """

    dataset: str | None = None
    """Name of the image data set that batches are drawn from; None needs no data."""

    num_coordinates: int
    """N, the length of θ."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> Tensor:
        """θ0, [N] float32 on the CPU."""

    @abstractmethod
    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """f(θ): a scalar, for one optimizee θ [N]; traceable by torch.func.vmap."""

    def instance(self, generator: torch.Generator) -> Batch:
        """What distinguishes this optimizee besides θ0, drawn once a rollout (CPU tensors); () if nothing."""
        return ()

    def batch(self, instance: Batch, images: Images | None, generator: torch.Generator) -> Batch:
        """What the next evaluation of the loss is computed on (CPU tensors, small: indices, not images).

        The shapes are the same at every evaluation: those of a whole window are drawn ahead and stacked.
        """
        return instance

    def gather(self, batches: Batch, images: Images | None) -> Batch:
        """Turns stacked batches [K, …], already on the device, into what `losses` reads (pixels)."""
        return batches

    def losses(self, thetas: Tensor, batches: Batch) -> Tensor:
        """The losses [K] of K optimizees at once, from θ [K, N] and gathered batches [K, …]."""
        result: Tensor = torch.func.vmap(self.loss)(thetas, batches)
        return result

    def losses_and_grads(self, thetas: Tensor, batches: Batch) -> tuple[Tensor, Tensor]:
        """The losses [K] and every optimizee's own gradient [K, N], neither of which carries a graph.

        Raises:
            ValueError: The losses cannot be differentiated by θ.
        """
        # A leaf of its own for every evaluation: autocast may keep a leaf's conversion, and θ moves in place.
        leaf = thetas.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(leaf, batches)
            if not losses.requires_grad:
                raise ValueError(
                    f"the loss of {self.describe()} cannot be differentiated: it does not depend on θ, or "
                    "through operations without a gradient only; or it runs in inference mode, and needs "
                    "Trainer(inference_mode=False), --trainer.inference_mode false"
                )
            # Optimizees share nothing, so the gradient of the losses' sum holds each one's own.
            (grads,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
        return losses.detach(), grads

    @property
    def members(self) -> Sequence[Task]:
        """The kinds of optimizee, one task each: a mixture has several."""
        return [self]

    def member(self, index: int) -> Task:
        """The task that the run's index-th rollout is of."""
        return self

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, for checkpoints and result files."""

    def describe(self) -> str:
        """One line for a table or a file name."""
        arguments = ", ".join(f"{name}={value}" for name, value in self.config().items())
        return f"{type(self).__name__}({arguments})"


def split_vector(theta: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Views of a flat θ [..., N] with the given shapes, in order: [..., *shape] each."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = torch.split(theta, sizes, dim=-1)
    return [part.reshape(*theta.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]
