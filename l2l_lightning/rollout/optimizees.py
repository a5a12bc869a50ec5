"""K optimizees side by side: their parameters, their random streams, and their losses and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from l2l_lightning.data.examples import Examples
from l2l_lightning.errors import TaskError
from l2l_lightning.rollout.uneven import Uneven, check_batches
from l2l_lightning.tasks.base import Batch, Separate, Task, WithBuffers, WithSeed

STREAMS = {"train": 0, "validation": 1, "tuning": 2, "test": 3, "phi": 4, "perturbation": 5}
"""Independent families of random draws; a number, once given, is never changed."""

SPLITS = {"tuning": "validation"}
"""The split of the data that a stream of optimizees draws from, where it is not of the stream's name."""


def derive_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """Returns the CPU generator of one draw, a function of (seed, stream, index) and of nothing else.

    Raises:
        ValueError: An unknown stream, or a negative seed or index.

    Example:
        >>> a, b = (derive_generator(0, "train", 7) for _ in range(2))
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {', '.join(STREAMS)}, got {stream!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got seed {seed} and index {index}")
    entropy = np.random.SeedSequence([seed, STREAMS[stream], index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(entropy[0] >> np.uint64(1)))


@contextmanager
def _default_float32() -> Iterator[None]:
    """Within this context tasks draw in float32: a generator's float64 numbers are others."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on a device; the host waits neither for the transfer nor for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def unstack(batches: Batch, count: int) -> list[Batch]:
    """Splits what `Optimizees.draw` gives into the minibatches [K, …] of `count` evaluations, as views."""
    if isinstance(batches, Uneven):
        return batches.evaluations
    leaves, structure = tree_flatten(batches)
    rows = [leaf.expand(count, *leaf.shape[1:]).unbind() for leaf in leaves]
    return [tree_unflatten([row[t] for row in rows], structure) for t in range(count)]


def gather(task: Task, images: Examples | None, theta: Tensor, batches: Batch) -> Batch:
    """Returns what `task.losses` reads of one evaluation's minibatches [K, …], in θ's dtype beside θ."""
    if isinstance(batches, Separate):
        stacked = (tree_map(lambda leaf: leaf[None], batch) for batch in batches)
        alone = (gather(task, images, theta, batch) for batch in stacked)
        return Separate(tree_map(lambda leaf: leaf[0], batch) for batch in alone)
    gathered = task.gather(batches, images)
    if images is not None and images.device != theta.device:
        gathered = tree_map(lambda tensor: to_device(tensor, theta.device), gathered)
    elif gathered is batches:
        return batches
    # Images are float32; the task computes in θ's dtype.
    return tree_map(lambda tensor: _in_dtype(tensor, theta.dtype), gathered)


def with_buffers(batches: Batch, buffers: Mapping[str, Tensor] | None) -> Batch:
    """Returns gathered minibatches with the buffers [K, …] of K optimizees, if they have any."""
    if not buffers:
        return batches
    # Aliases: an update may be differentiable, and its graph must not outlive the evaluation.
    aliases = {name: value.detach() for name, value in buffers.items()}
    if not isinstance(batches, Separate):
        return WithBuffers(batches, aliases)
    return Separate(
        WithBuffers(batch, {name: value[k] for name, value in aliases.items()})
        for k, batch in enumerate(batches)
    )


def cloned(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of buffers, for an evaluation that is to leave them as they are."""
    return {name: value.clone() for name, value in buffers.items()}


def evaluate(
    task: Task,
    images: Examples | None,
    theta: Tensor,
    batches: Batch,
    buffers: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns f(θ) [K] and ∇f(θ) [K, N] at θ [K, N] on minibatches [K, …], without a graph.

    Buffers [K, …] are updated in place.
    """
    gathered = gather(task, images, theta, batches)
    if buffers:  # looked at here: a call that does nothing is a part of a small optimizee's step
        gathered = with_buffers(gathered, buffers)
    return task.losses_and_grads(theta, gathered)


class Optimizees:
    """K optimizees of one task, flat and side by side.

    Each draws from its own generator, derived from (seed, stream, index): which others share the batch,
    the process or the device changes nothing, and the same indices give every optimizer the same θ0 and the
    same minibatches (a paired comparison).

    Args:
        task: What they are drawn from.
        images: The data set's split if the task needs one: Images or other Examples, on `device` or where
            they are kept.
        seed: The run's seed.
        stream: "train", "validation", "tuning" or "test".
        indices: One index per optimizee.
        device: Where θ and the batches live.
        dtype: θ's dtype.

    Raises:
        ValueError: No indices, a negative one or seed, an unknown stream, or a dtype that is no float's.
        TypeError: task is no Task.
    """

    def __init__(
        self,
        task: Task,
        images: Examples | None,
        seed: int,
        stream: str,
        indices: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(task, Task):
            raise TypeError(f"task must be a Task (FunctionTask makes one of a function), got {task!r}")
        if not len(indices):
            raise ValueError("indices must name at least one optimizee")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self.generators = [derive_generator(seed, stream, index) for index in indices]
        split = SPLITS.get(stream, stream)
        self._held_out_task = task.on_split("validation" if split == "train" else split)
        self.task = task = task.on_split(split)
        self.images = images
        self.device = torch.device(device)
        self.gathers_on_device = images is None or images.device.type == self.device.type
        self.dtype = dtype
        with _default_float32():
            thetas, instances = zip(*(task.begin(g) for g in self.generators), strict=True)
            self._instances: list[Batch] = list(instances)
            buffers = [task.buffers(instance, images, self.device) for instance in instances]
        self.theta = torch.stack(thetas).to(self.device, dtype)  # [K, N]
        # [K, …] each
        self.buffers: dict[str, Tensor] = unstack(self._stack([buffers], None), 1)[0] if any(buffers) else {}
        self._batches_are_constant = type(task).batch is Task.batch
        self._constant_batches = self._stack([self._instances], None) if self._batches_are_constant else None

    def __repr__(self) -> str:
        count, n = self.theta.shape
        return f"{count} Optimizees of {self.task!r}, each of {n:,} coordinates, on {self.theta.device}"

    def __len__(self) -> int:
        return len(self.generators)

    @property
    def data_source(self) -> str:
        """Where the data came from, for the record; "none" if there is none."""
        return self.task.data_source or "none" if self.images is None else self.images.source

    def _stack(self, evaluations: list[list[Batch]], images: Examples | None) -> Batch:
        if isinstance(evaluations[0][0], WithSeed):
            seeds = torch.stack([batch.seed for batch in itertools.chain(*evaluations)])
            batches = self._stack([[batch.batch for batch in one] for one in evaluations], images)
            return WithSeed(batches, seeds.view(len(evaluations), -1))
        device = self.device if images is None or self.gathers_on_device else images.device

        def stack(*leaves: Tensor) -> Tensor:
            stacked = torch.stack(leaves).view(len(evaluations), len(evaluations[0]), *leaves[0].shape)
            return to_device(_in_dtype(stacked, self.dtype), device)

        batches = tree_map(stack, *itertools.chain(*evaluations))
        if images is not None and isinstance(batches, Tensor) and batches.dtype == torch.int64:  # indices
            images.prefetch(batches)
        return batches

    def draw(self, count: int) -> Batch:
        """Draws the minibatches of `count` evaluations, not yet gathered, [count, K, …] on the device.

        Advances every optimizee's generator as `count` calls with 1 would, and moves the draws in one
        transfer. Where all evaluations have the same batch, [1, K, …]. `Uneven` where their shapes differ.

        Raises:
            TypeError: A minibatch holds something else than tensors.
            ValueError: Minibatches differ in structure.
        """
        if self._batches_are_constant:
            return self._constant_batches
        pairs = list(zip(self._instances, self.generators, strict=True))
        with _default_float32():
            drawn = [[self.task.batch(i, self.images, g) for i, g in pairs] for _ in range(count)]
        return self._stacked(drawn, self.images if self.task.dataset else None)

    def _stacked(self, drawn: list[list[Batch]], images: Examples | None) -> Batch:
        """Stacks minibatches, and keeps apart what cannot be stacked."""
        try:
            return self._stack(drawn, images)
        except (RuntimeError, TypeError, ValueError):  # not looked for before, which would take time
            if check_batches(self.task, list(itertools.chain(*drawn))):
                raise
        evaluations = []
        for batches in drawn:
            try:
                (stacked,) = unstack(self._stack([batches], images), 1)
            except RuntimeError:
                alone = (tree_map(lambda leaf: leaf[0, 0], self._stack([[one]], images)) for one in batches)
                stacked = Separate(alone)
            evaluations.append(stacked)
        return Uneven(evaluations)

    def next_batches(self) -> Batch:
        """Draws and gathers the minibatches [K, …] of the next evaluation; WithBuffers, if there are any."""
        gathered = gather(self.task, self.images, self.theta, unstack(self.draw(1), 1)[0])
        return with_buffers(gathered, self.buffers)

    def losses_and_grads(self) -> tuple[Tensor, Tensor]:
        """Returns f_t(θ) [K] and ∇f_t(θ) [K, N] on fresh minibatches, without a graph; updates buffers."""
        return evaluate(self.task, self.images, self.theta, unstack(self.draw(1), 1)[0], self.buffers)

    @torch.no_grad()
    def held_out_losses(self, images: Examples | None) -> Tensor:
        """Returns the losses of θ on examples that it was not optimised on, [K].

        Args:
            images: Those held out, if the task needs any, where those that it is optimised on are.
        """
        gathered = gather(self.task, images, self.theta, self._held_out_batches(images))
        with self.task.evaluation_mode():
            return self.task.losses(self.theta, with_buffers(gathered, cloned(self.buffers)))

    @torch.no_grad()
    def held_out_losses_and_grads(self, images: Examples | None) -> tuple[Tensor, Tensor]:
        """Returns the losses of `held_out_losses` [K] and their gradients [K, N], without a graph."""
        batches = self._held_out_batches(images)
        with self.task.evaluation_mode():
            return evaluate(self.task, images, self.theta, batches, cloned(self.buffers))

    def _held_out_batches(self, images: Examples | None) -> Batch:
        with _default_float32():
            drawn = [
                self._held_out_task.held_out_batch(instance, images, generator)
                for instance, generator in zip(self._instances, self.generators, strict=True)
            ]
        return unstack(self._stacked([drawn], images if self.task.dataset else None), 1)[0]

    def state_dict(self) -> dict[str, Any]:
        """Returns what resuming in mid-rollout needs: θ, instances, generators' states, and any buffers."""
        state = {
            "theta": self.theta.clone(),
            "instances": self._instances,
            "generators": [g.get_state() for g in self.generators],
        }
        return state | ({"buffers": cloned(self.buffers)} if self.buffers else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state_dict of optimizees of the same task and number.

        Raises:
            ValueError: It is of another task: θ, an instance or a buffer has another shape.
        """
        buffers = state.get("buffers", {})
        pairs = [(state["theta"][0], self.theta[0]), *zip(state["instances"], self._instances, strict=False)]
        firsts = [{name: value[0] for name, value in of.items()} for of in (buffers, self.buffers)]
        pairs.append((firsts[0], firsts[1]))
        if any(tree_map(_shape, saved) != tree_map(_shape, ours) for saved, ours in pairs):
            raise ValueError("the saved optimizees are of other shapes than the task's")
        # A copy: θ is advanced in place, and the saved state must stay what it is.
        self.theta = state["theta"].to(self.device, self.dtype, copy=True)
        self.buffers = {
            name: _in_dtype(value, self.dtype).to(self.device, copy=True) for name, value in buffers.items()
        }
        self._instances = state["instances"]
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved.cpu())
        if self._batches_are_constant:
            self._constant_batches = self._stack([self._instances], None)


def check_evaluable(task: Task, images: Examples | None, seed: int) -> None:
    """Evaluates an optimizee of every kind, on the CPU: what is wrong with a task shows before a run.

    One that has no finite loss and gradient may be bad luck; four are the task's.

    Args:
        task: The task, or a mixture.
        images: The validation split, if the task needs one, on the CPU.
        seed: The run's seed.

    Raises:
        TaskError: The task's loss or gradient is not finite at θ0, or its code raises an error.
    """
    for member in task.members:
        losses: list[float] = []
        for index in range(4):  # one by one, for a large one's sake
            try:
                loss, grad = Optimizees(member, images, seed, "validation", [index]).losses_and_grads()
            except Exception as error:  # whatever code of the user's raises
                source = "" if images is None else f" (on {images.source})"
                raise TaskError(
                    f"{member.describe()} cannot be evaluated: {type(error).__name__}: {error}{source}"
                ) from error
            if loss.isfinite().all() and grad.isfinite().all():
                break
            losses.append(loss.item())
        else:
            raise TaskError(
                f"{member.describe()} has no finite loss and gradient at θ0: the losses of four optimizees "
                f"are {losses}"
            )


def _shape(leaf: Any) -> Any:
    return list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf)
