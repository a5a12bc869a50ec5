"""The contract of a task: a distribution of optimizees, and the data that they are optimised on."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from l2l_lightning.class_paths import Configurable
from l2l_lightning.data.examples import Examples
from l2l_lightning.rules.layout import ParameterInfo

Batch = Any
"""A pytree of tensors: what one evaluation of the loss is computed on."""


class WithSeed(NamedTuple):
    """A batch whose loss draws random numbers, and the seed that its optimizee's generator gives them."""

    batch: Batch
    seed: Tensor
    """[] int64, of K optimizees [K]: on the CPU, where the host reads it."""


class WithBuffers(NamedTuple):
    """A gathered batch, and what the loss reads besides it and updates in place."""

    batch: Batch
    buffers: dict[str, Tensor]
    """By name, of K optimizees [K, …]."""


class Separate(tuple[Batch, ...]):
    """The batches of K optimizees that differ in shape, and so cannot be stacked to one of [K, …]."""


class Task(Configurable, ABC):
    """A distribution of optimizees: θ0 ~ init, and at every step a loss f(θ, batch).

    An optimizee is a flat vector θ [N]. Its randomness comes from one torch.Generator (always on the CPU,
    so that every device draws the same), in this order: `init`, `instance`, then one `batch` per evaluation.

    A subclass sets `num_coordinates` and implements `init` and `loss`. It overrides `instance` if an
    optimizee has constants of its own (a quadratic's W and y), `begin` if they are drawn together with θ0,
    `batch` if every evaluation has its own minibatch, `buffers` if evaluations update more than θ, `losses`
    if it can beat torch.func.vmap, `losses_and_grads` if it can beat autograd, and `config` if it does not
    keep its constructor's arguments as attributes. `gather` and `losses` must be functions of their arguments
    alone: where the device allows it they are recorded once and replayed.

    In the shapes below, K optimizees are evaluated side by side, and N is the length of θ.
    """

    dataset: str | None = None
    """The data set that minibatches are drawn from: one that `load_images` knows, or "own" for the user's
    own, which MetaData was given; None where the task needs no data."""

    accepts_own_data: bool = False
    """Whether the user's own data takes the data set's place if MetaData was given any."""

    data_source: str | None = None
    """Where the task's own examples come from, for the record; None where it has none."""

    num_coordinates: int
    """N, the length of θ."""

    @property
    def tensors(self) -> tuple[ParameterInfo, ...]:
        """The tensors that θ is made of, in order, which a rule may tell apart; all of it one if unknown."""
        return (ParameterInfo("theta", (self.num_coordinates,)),)

    _one_by_one: Mapping[str, bool] = MappingProxyType({})
    """Whether `losses` loops over optimizees, by type of device and mode: decided at the first call."""

    _mode: str = ""
    """What the loss is computed for besides training, within `evaluation_mode`, if it is then another one."""

    _met_separate: bool = False
    """Whether batches have been Separate before."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0, [N] float32 on the CPU."""

    @abstractmethod
    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes f(θ), a scalar, of one optimizee θ [N]; fastest where torch.func.vmap can run it."""

    def instance(self, generator: torch.Generator) -> Batch:
        """Draws what distinguishes an optimizee besides θ0, once a rollout: CPU tensors, or ()."""
        return ()

    def begin(self, generator: torch.Generator) -> tuple[Tensor, Batch]:
        """Draws an optimizee: θ0 by `init`, and by `instance` what else distinguishes it."""
        return self.init(generator), self.instance(generator)

    def buffers(self, instance: Batch, images: Examples | None, device: torch.device) -> dict[str, Tensor]:
        """Returns what evaluations of an optimizee's loss update besides θ, as it is at θ0: CPU tensors.

        If there are any, the loss is given WithBuffers(batch, buffers), and updates these in place.

        Args:
            instance: The optimizee's.
            images: What its minibatches are drawn from.
            device: Where the loss will be evaluated.
        """
        return {}

    def on_split(self, split: str) -> Task:
        """Returns the task as it is on a split, "train", "validation" or "test", of the data it makes itself.

        Only a task whose optimizees have examples of their own, other than images, or that makes its data
        itself, by split, needs to override this.
        """
        return self

    def batch(self, instance: Batch, images: Examples | None, generator: torch.Generator) -> Batch:
        """Draws what the next evaluation of the loss is computed on: CPU tensors; indices of examples.

        It is fastest if their shapes are the same at every evaluation: a whole window's are drawn ahead and
        stacked. WithSeed(batch, seed) keeps the seed on the CPU.
        """
        return instance

    def held_out_batch(self, instance: Batch, images: Examples | None, generator: torch.Generator) -> Batch:
        """Draws what the final θ is judged on: a minibatch of held-out examples, given or the task's own.

        Only a task whose examples are neither fresh at every evaluation nor given needs to override this.
        """
        return self.batch(instance, images, generator)

    def gather(self, batches: Batch, images: Examples | None) -> Batch:
        """Turns batches [K, …], beside the examples, into what `losses` reads: indices into inputs."""
        return batches

    def evaluation_mode(self) -> AbstractContextManager[Any]:
        """Within this context losses are those of held-out examples: of a network without dropout, say."""
        return nullcontext()

    def losses(self, thetas: Tensor, batches: Batch) -> Tensor:
        """Computes the losses [K] of K optimizees from θ [K, N] and gathered batches [K, …].

        torch.func.vmap computes them at once. Where it cannot run what `loss` does (nn.LSTM, `.item()`), one
        is computed after the other from the first call on, and so it is with batches that are Separate; a
        warning says so.

        Raises:
            ValueError: `loss` draws from torch's global random stream, so that it would not repeat.
        """
        if isinstance(batches, Separate):
            return self._separate_losses(thetas, batches)
        way = thetas.device.type + self._mode  # what vmap can run is not the same on every device
        if way not in self._one_by_one:
            one_by_one, losses = self._first_losses(thetas, batches)
            self._one_by_one = {**self._one_by_one, way: one_by_one}
            return losses
        if self._one_by_one[way]:
            return self._looped(thetas, rows(batches, len(thetas)))
        losses = torch.func.vmap(self.loss)(thetas, batches)
        return losses

    def _looped(self, thetas: Tensor, batches: Iterable[Batch]) -> Tensor:
        return torch.stack([self.loss(theta, batch) for theta, batch in zip(thetas, batches, strict=True)])

    def _first_looped(self, thetas: Tensor, batches: Iterable[Batch]) -> Tensor:
        """Runs the loop, and raises if it draws from the global stream."""
        before = _global_stream(thetas.device)
        losses = self._looped(thetas, batches)
        if not torch.equal(before, _global_stream(thetas.device)):
            raise ValueError(
                f"the loss of {self.describe()} draws from torch's global random stream, so that it "
                "would not repeat: leave out what is random in it, such as dropout, or draw it in `batch`"
            )
        return losses

    def _first_losses(self, thetas: Tensor, batches: Batch) -> tuple[bool, Tensor]:
        """Tries vmap; returns whether optimizees must run one by one instead, and their losses [K]."""
        buffers = batches.buffers if isinstance(batches, WithBuffers) else {}
        before = {name: value.clone() for name, value in buffers.items()}
        try:
            return False, torch.func.vmap(self.loss)(thetas, batches)
        except Exception as error:  # what vmap cannot run it says in many ways
            if buffers:  # of which it may have updated some
                kept = {name: value.detach().copy_(before[name]) for name, value in buffers.items()}
                batches = batches._replace(buffers=kept)
            losses = self._first_looped(thetas, rows(batches, len(thetas)))  # raises the loss's own fault
            if not any(self._one_by_one.values()):
                reason = str(error).partition("\n")[0].partition(". ")[0]
                message = (
                    f"{self.describe()} cannot run under torch.func.vmap ({reason}): its optimizees are "
                )
                warnings.warn(f"{message}computed one after the other, which takes longer", stacklevel=2)
            return True, losses

    def _separate_losses(self, thetas: Tensor, batches: Separate) -> Tensor:
        if self._met_separate:
            return self._looped(thetas, batches)
        losses = self._first_looped(thetas, batches)
        self._met_separate = True
        warnings.warn(
            f"{self.describe()} draws minibatches of different shapes for one optimizee and another: they "
            "are computed one after the other, which takes longer than padded ones of one shape",
            stacklevel=2,
        )
        return losses

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


def rows(batches: Batch, count: int) -> list[Batch]:
    """Returns batches [K, …] one by one, as views."""
    return [tree_map(lambda leaf, k=k: leaf[k], batches) for k in range(count)]


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
