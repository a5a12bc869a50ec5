"""What a problem of the suite is, and the registry of those that there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from l2l_lightning.errors import ReproductionError

Part = Literal["validation", "test"]
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """A network, what it is trained on, and the held-out loss after the last step that it is judged by.

    The package's docstring shows how a script adds one.
    """

    family: str
    steps: int
    """T, the number of updates."""
    build: Callable[[], nn.Module]
    """Draws a fresh network from torch's global stream."""
    batch: Callable[[torch.Generator], Any]
    """Draws a minibatch of the training data."""
    held_out: Callable[[Part], list[Any]]
    """Returns the minibatches, always the same, of the data that is tuned or reported on."""
    loss: Loss
    """The mean loss of a network on a minibatch, a scalar."""
    data: str
    """Says where the data comes from, with a hash of it where versions of that place may differ."""
    score: Loss | None = None
    """What is held out is judged by this; None is the loss."""
    version: int = 1
    """To be raised when the definition changes: results are kept by it."""

    def held_out_loss(self, module: nn.Module, part: Part) -> float:
        """Returns the mean over the minibatches of a part, in the module's evaluation mode."""
        module.eval()
        with torch.no_grad():
            losses = [(self.score or self.loss)(module, batch).item() for batch in self.held_out(part)]
        module.train()
        return sum(losses) / len(losses)


PROBLEMS: dict[str, Callable[[], Problem]] = {}
"""Every problem by name; called in each process that works on it. `problems` fills it."""

QUICK: list[str] = []
"""The names of those that `--quick` runs."""


def make_problem(name: str) -> Problem:
    """Returns a registered problem.

    Raises:
        ReproductionError: There is none of that name.
    """
    if name not in PROBLEMS:
        raise ReproductionError(f"--problems: there is no problem {name!r}, only {', '.join(PROBLEMS)}")
    return PROBLEMS[name]()


def prediction(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Makes a loss of predictions and targets that of a module on a minibatch (inputs, targets)."""
    return lambda module, batch: loss(module(batch[0]), batch[1])
