"""A mixture of tasks: rollout after rollout of another kind of optimizee."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2l_lightning.class_paths import class_config, from_class_config
from l2l_lightning.round_robin import turn
from l2l_lightning.tasks.base import Batch, Task


class Mixture(Task):
    """A distribution over tasks, so that one rule learns to optimise all of them.

    All optimizees of a rollout are of one member. Of M members, every stretch of M rollouts meets each once,
    in an order that is drawn anew: each has a share of 1/M, without the noise of independent draws. To weigh
    a member more, list it more than once.

    Members may differ in anything but the data set: in their numbers of coordinates too, as a rule sees
    coordinates only.

    Args:
        tasks: The members; in a configuration, {"class_path", "init_args"} each.

    Raises:
        ValueError: No members, a mixture among them, or two that need different data sets.
        TypeError: A member is no task.

    Example:
        >>> from l2l_lightning.tasks import MNISTMLP
        >>> mixture = Mixture([MNISTMLP(activation="sigmoid"), MNISTMLP(activation="relu")])
        >>> sorted(mixture.member(i).activation for i in range(2))
        ['relu', 'sigmoid']

    Source: the idea is that of training on a distribution of tasks, Andrychowicz et al. 2016, equation 2.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = [from_class_config(task, Task) if isinstance(task, dict) else task for task in tasks]
        if not self.tasks:
            raise ValueError("tasks must name at least one task")
        for task in self.tasks:
            if not isinstance(task, Task):
                raise TypeError(f"tasks must hold tasks, got {task!r}")
        if any(isinstance(task, Mixture) for task in self.tasks):
            raise ValueError("tasks must not hold a mixture: list its members instead")
        datasets = sorted({task.dataset for task in self.tasks if task.dataset is not None})
        if len(datasets) > 1:
            raise ValueError(f"tasks must share one data set, got {', '.join(datasets)}")
        self.dataset = datasets[0] if datasets else None
        self.accepts_own_data = all(task.accepts_own_data for task in self.tasks if task.dataset is not None)
        sources = dict.fromkeys(task.data_source for task in self.tasks if task.data_source)
        self.data_source = "; ".join(sources) or None
        self.num_coordinates = max(task.num_coordinates for task in self.tasks)

    def __repr__(self) -> str:
        return f"Mixture({self.tasks!r})"

    @property
    def members(self) -> list[Task]:
        """The distinct tasks, in the order given."""
        distinct: dict[str, Task] = {}
        for task in self.tasks:
            distinct.setdefault(task.describe(), task)
        return list(distinct.values())

    def member(self, index: int) -> Task:
        """Returns the task of the run's index-th rollout."""
        return self.tasks[turn(index, len(self.tasks), "member")]

    def init(self, generator: torch.Generator) -> Tensor:
        """Raises TypeError: a mixture has no θ of its own."""
        raise TypeError("a Mixture has no optimizees of its own: take a member's")

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Raises TypeError: a mixture has no loss of its own."""
        raise TypeError("a Mixture has no loss of its own: take a member's")

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, members as {"class_path", "init_args"}."""
        return {"tasks": [class_config(task) for task in self.tasks]}

    def describe(self) -> str:
        """Describes the members in one line."""
        return f"Mixture of {', '.join(task.describe() for task in self.members)}"
