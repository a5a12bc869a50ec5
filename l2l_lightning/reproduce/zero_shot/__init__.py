"""The suite that says how good a rule without tuning is against what a user would otherwise take.

Problems and peers are entries of two dictionaries, and a script adds its own:

Example:
    >>> import torch
    >>> from l2l_lightning.reproduce.zero_shot import PEERS, PROBLEMS, Data, Peer, Problem
    >>> def line():
    ...     x = torch.linspace(-1, 1, 60)[:, None]
    ...     data = Data.split("a line", x, 2 * x + 1)
    ...     def loss(module, batch):
    ...         return (module(batch[0]) - batch[1]).square().mean()
    ...     return Problem(
    ...         "mine", 100, lambda: torch.nn.Linear(1, 1), data.batches(8), data.held_out, loss, data.source
    ...     )
    >>> def adagrad(module, steps, rate):
    ...     return [torch.optim.Adagrad(module.parameters(), rate)]
    >>> PROBLEMS["a line, 100"], PEERS["adagrad"] = line, Peer(adagrad, grid=range(-7, 1))
    >>> del PROBLEMS["a line, 100"], PEERS["adagrad"]  # or run them: `reproduce(["zero-shot"], Settings())`
"""

from l2l_lightning.reproduce.zero_shot.data import Data
from l2l_lightning.reproduce.zero_shot.peers import PEERS, Peer
from l2l_lightning.reproduce.zero_shot.problem import PROBLEMS, Problem
from l2l_lightning.reproduce.zero_shot.problems import images  # noqa: F401  they register themselves

__all__ = ["PEERS", "PROBLEMS", "Data", "Peer", "Problem"]
