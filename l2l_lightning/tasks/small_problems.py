"""A distribution of small problems of many kinds, which a rule for every problem is meta-trained on."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from l2l_lightning.checks import check_choice, check_whole_numbers
from l2l_lightning.data.examples import Examples
from l2l_lightning.round_robin import turn
from l2l_lightning.rules.layout import ParameterInfo
from l2l_lightning.tasks.base import Batch, Task, split_vector
from l2l_lightning.tasks.small.draw import Draw
from l2l_lightning.tasks.small.families import FAMILIES

VALIDATION_SEED = 2**31
"""The seed of the problems that validations run; those of training count from 0."""


class SmallProblem(Task):
    """One problem of a family: examples, a network and a loss, all drawn from a seed.

    θ0 and the minibatches differ from optimizee to optimizee; the examples and the network are the problem's.

    Args:
        family: Of FAMILIES.
        seed: What the problem is drawn from.

    Raises:
        ValueError: There is no such family, or the seed is not in [0, 2^32).

    Example:
        >>> task = SmallProblem("regression", seed=3)
        >>> task.init(torch.Generator().manual_seed(0)).shape == (task.num_coordinates,)
        True
    """

    def __init__(self, family: str, seed: int = 0) -> None:
        check_choice(FAMILIES, family=family)
        check_whole_numbers(0, 2**32 - 1, seed=seed)  # generators read 32 bits: others would repeat these
        self.family = family
        self.seed = seed
        position = list(FAMILIES).index(family)
        draw = Draw(torch.Generator().manual_seed(seed * len(FAMILIES) + position))
        self.problem = FAMILIES[family](draw)
        self.batch_size = draw.size(*self.problem.batch_sizes)
        self.num_coordinates = sum(math.prod(shape) for shape in self.problem.network.shapes.values())
        self._moved: dict[torch.device, list[Tensor]] = {}

    @property
    def tensors(self) -> tuple[ParameterInfo, ...]:
        """The network's parameters, by name."""
        return tuple(ParameterInfo(name, shape) for name, shape in self.problem.network.shapes.items())

    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0, [N]."""
        trained, drawn = self.problem.trained, self.problem.network.init(generator)
        return torch.cat([value.flatten() for value in (*trained, *drawn[len(trained) :])])

    def batch(self, instance: Batch, images: Examples | None, generator: torch.Generator) -> Batch:
        """Draws the indices of a minibatch of training examples, [B]."""
        return torch.randint(self.problem.examples.num_train, (self.batch_size,), generator=generator)

    def held_out_batch(self, instance: Batch, images: Examples | None, generator: torch.Generator) -> Batch:
        """The indices of all examples that are held out."""
        return torch.arange(self.problem.examples.num_train, len(self.problem.examples.inputs))

    def gather(self, batches: Batch, images: Examples | None) -> Batch:
        """Turns indices [K, B] into examples."""
        inputs, targets = self._examples_on(batches.device)
        return inputs[batches], targets[batches]

    def _examples_on(self, device: torch.device) -> Sequence[Tensor]:
        """Returns all inputs and targets on a device, which are moved there once."""
        if device not in self._moved:
            self._moved[device] = [values.to(device) for values in self.problem.examples[:2]]
        return self._moved[device]

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """The loss of one optimizee's network θ [N] on a minibatch (inputs, targets)."""
        inputs, targets = batch
        parameters = split_vector(theta, list(self.problem.network.shapes.values()))
        return self.problem.loss(self.problem.network.forward(parameters, inputs), targets)


class SmallProblems(Task):
    """A distribution of small problems: rollout after rollout of a new one, of each family in turn.

    Perceptrons of seven activations, one to four layers and 4 to 32 units, normalised or not, on images,
    clouds of points and curves; linear models; convolutions; attention, recurrent networks and embeddings
    on Markov chains; factorisations; autoencoders; starts that were trained on something else. Examples are
    few or many, with noise or without. Of images it reads those that ship with the package and with
    scikit-learn, and nothing but their training part.

    Args:
        families: Of FAMILIES; None is all.

    Raises:
        ValueError: There is no such family, or none was given.

    Example:
        >>> SmallProblems(["regression", "linear"]).member(0).family in ("regression", "linear")
        True
    """

    def __init__(self, families: Sequence[str] | None = None) -> None:
        self.families = list(FAMILIES) if families is None else list(families)
        if not self.families:
            raise ValueError("families must name at least one family")
        for family in self.families:
            check_choice(FAMILIES, families=family)
        self.num_coordinates = max(member.num_coordinates for member in self.members)

    @functools.cached_property
    def members(self) -> list[SmallProblem]:
        """The problems that validations run: one of each family, which no rollout is of."""
        return [SmallProblem(family, VALIDATION_SEED) for family in self.families]

    def member(self, index: int) -> SmallProblem:
        """Returns the problem of the run's index-th rollout."""
        return SmallProblem(self.families[turn(index, len(self.families), "family")], index)

    def init(self, generator: torch.Generator) -> Tensor:
        """Raises TypeError: a distribution of tasks has no θ of its own."""
        raise TypeError("SmallProblems has no optimizees of its own: take a member's")

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Raises TypeError: a distribution of tasks has no loss of its own."""
        raise TypeError("SmallProblems has no loss of its own: take a member's")
