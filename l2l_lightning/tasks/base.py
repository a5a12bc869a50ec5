"""The contract of a task: a distribution of optimizees, and the data that they are optimised on."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from l2l_lightning.class_paths import Configurable
from l2l_lightning.data.images import Images
from l2l_lightning.rules.layout import ParameterInfo

Batch = Any
"""A pytree of tensors: what one evaluation of the loss is computed on."""


class Task(Configurable, ABC):
    """A distribution of optimizees: θ0 ~ init, and at every step a loss f(θ, batch).

    An optimizee is a flat vector θ [N]. Its randomness comes from one torch.Generator (always on the CPU,
    so that every device draws the same), in this order: `init`, `instance`, then one `batch` per evaluation.

    A subclass sets `num_coordinates` and implements `init` and `loss`. It overrides `instance` if an
    optimizee has constants of its own (a quadratic's W and y), `batch` if every evaluation has its own
    minibatch, `losses` if it can beat torch.func.vmap, `losses_and_grads` if it can beat autograd, and
    `config` if it does not keep its constructor's arguments as attributes. `gather` and `losses` must be
    functions of their arguments alone: where the device allows it they are recorded once and replayed.

    In the shapes below, K optimizees are evaluated side by side, and N is the length of θ.
    """

    dataset: str | None = None
    """The image data set that minibatches are drawn from; None where the task needs no data."""

    data_source: str | None = None
    """Where the task's own examples come from, for the record; None where it has none."""

    num_coordinates: int
    """N, the length of θ."""

    @property
    def tensors(self) -> tuple[ParameterInfo, ...]:
        """The tensors that θ is made of, in order, which a rule may tell apart; all of it one if unknown."""
        return (ParameterInfo("theta", (self.num_coordinates,)),)

    _one_by_one: Mapping[str, bool] = MappingProxyType({})
    """Whether `losses` loops over optimizees, by type of device: decided at the first call on each."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0, [N] float32 on the CPU."""

    @abstractmethod
    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes f(θ), a scalar, of one optimizee θ [N]; fastest where torch.func.vmap can run it."""

    def instance(self, generator: torch.Generator) -> Batch:
        """Draws what distinguishes an optimizee besides θ0, once a rollout: CPU tensors, or ()."""
        return ()

    def for_split(self, split: str) -> Task:
        """Returns the task on one split's examples, "train", "validation" or "test": itself.

        Only a task whose optimizees have examples of their own, other than images, needs to override this.
        """
        return self

    def batch(self, instance: Batch, images: Images | None, generator: torch.Generator) -> Batch:
        """Draws what the next evaluation of the loss is computed on: CPU tensors, indices rather than images.

        Their shapes must be the same at every evaluation: a whole window's are drawn ahead and stacked.
        """
        return instance

    def held_out_batch(self, instance: Batch, images: Images | None, generator: torch.Generator) -> Batch:
        """Draws what the final θ is judged on: a minibatch of held-out images, or of a task's own examples.

        Only a task whose examples are neither fresh at every evaluation nor images needs to override this.
        """
        return self.batch(instance, images, generator)

    def gather(self, batches: Batch, images: Images | None) -> Batch:
        """Turns batches [K, …], already on the device, into what `losses` reads: indices into pixels."""
        return batches

    def losses(self, thetas: Tensor, batches: Batch) -> Tensor:
        """Computes the losses [K] of K optimizees from θ [K, N] and gathered batches [K, …].

        torch.func.vmap computes them at once. Where it cannot run what `loss` does (nn.LSTM, `.item()`), one
        is computed after the other from the first call on, and a warning says so.

        Raises:
            ValueError: `loss` draws from torch's global random stream, so that it would not repeat.
        """
        device = thetas.device.type  # what vmap can run is not the same on every device
        if device not in self._one_by_one:
            one_by_one, losses = self._first_losses(thetas, batches)
            self._one_by_one = {**self._one_by_one, device: one_by_one}
            return losses
        if self._one_by_one[device]:
            return self._looped(thetas, batches)
        losses = torch.func.vmap(self.loss)(thetas, batches)
        return losses

    def _looped(self, thetas: Tensor, batches: Batch) -> Tensor:
        rows = [tree_map(lambda leaf, k=k: leaf[k], batches) for k in range(len(thetas))]
        return torch.stack([self.loss(theta, row) for theta, row in zip(thetas, rows, strict=True)])

    def _first_losses(self, thetas: Tensor, batches: Batch) -> tuple[bool, Tensor]:
        """Tries vmap; returns whether optimizees must run one by one instead, and their losses [K]."""
        try:
            return False, torch.func.vmap(self.loss)(thetas, batches)
        except Exception as error:  # what vmap cannot run it says in many ways
            before = _global_stream(thetas.device)
            losses = self._looped(thetas, batches)  # raises what is the loss's own fault
            if not torch.equal(before, _global_stream(thetas.device)):
                raise ValueError(
                    f"the loss of {self.describe()} draws from torch's global random stream, so that it "
                    "would not repeat: leave out what is random in it, such as dropout, or draw it in `batch`"
                ) from error
            reason = str(error).partition("\n")[0].partition(". ")[0]
            message = f"{self.describe()} cannot run under torch.func.vmap ({reason}): its optimizees are "
            warnings.warn(f"{message}computed one after the other, which takes longer", stacklevel=2)
            return True, losses

    def losses_and_grads(self, thetas: Tensor, batches: Batch) -> tuple[Tensor, Tensor]:
        """Computes the losses [K] and every optimizee's own gradient [K, N]; neither carries a graph.

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
        """The kinds of optimizee, one task each; a mixture has several."""
        return [self]

    def member(self, index: int) -> Task:
        """Returns the task that the run's index-th rollout is of."""
        return self

    def describe(self) -> str:
        """Describes the task in one line, for tables and messages."""
        try:
            arguments = ", ".join(f"{name}={value}" for name, value in self.config().items())
        except TypeError:  # arguments that are not kept must not hide what a message is about
            return type(self).__name__
        return f"{type(self).__name__}({arguments})"


def _global_stream(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def split_vector(theta: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns views of a flat θ [..., N] that have the given shapes, in order: [..., *shape] each."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = torch.split(theta, sizes, dim=-1)
    return [part.reshape(*theta.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]


def check_scalar(value: object, name: str) -> None:
    """Raises TypeError unless one optimizee's loss is a tensor, ValueError unless it has no dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a scalar tensor, got {type(value).__name__}")
    if value.ndim:
        raise ValueError(f"{name} must return a scalar tensor, got one of shape {list(value.shape)}")
