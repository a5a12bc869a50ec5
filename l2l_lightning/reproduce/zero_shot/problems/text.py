"""Language models of characters and bytes: transformers of several sizes, an LSTM, a GRU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import nn

from l2l_lightning.reproduce.zero_shot import data
from l2l_lightning.reproduce.zero_shot.problem import PROBLEMS, Problem, prediction
from l2l_lightning.reproduce.zero_shot.problems.networks import CausalTransformer, Recurrent

CONTEXT, BATCH = 32, 16
VOCABULARY = {"help": 128, "code": 256}


Text = Literal["help", "code"]


def language(family: str, build: Callable[[int], nn.Module], name: Text, steps: int) -> Problem:
    """A model, made for a size of the vocabulary, on 16 pieces of 32 characters at a time."""
    rows = data.characters(name, CONTEXT)
    loss, make = prediction(F.cross_entropy), partial(build, VOCABULARY[name])
    return Problem(family, steps, make, rows.batches(BATCH), rows.held_out, loss, rows.source)


def transformer(width: int, depth: int, name: Text, steps: int) -> Problem:
    """A causal transformer of four heads."""
    return language("transformer", lambda size: CausalTransformer(size, CONTEXT, width, depth), name, steps)


def recurrent(cells: type[nn.LSTM] | type[nn.GRU], name: Text, steps: int) -> Problem:
    """An LSTM or a GRU of 48 units."""
    return language("recurrent", lambda size: Recurrent(cells, size, 48), name, steps)


_levels: dict[str, Text] = {"character": "help", "byte": "code"}
for _kind, _name in _levels.items():
    for _width, _depth, _steps in ((32, 1, 300), (32, 1, 1000), (64, 2, 300), (96, 3, 300)):
        PROBLEMS[f"{_kind} transformer {_width}×{_depth}, {_steps}"] = partial(
            transformer, _width, _depth, _name, _steps
        )
PROBLEMS |= {
    "character LSTM, 300": partial(recurrent, nn.LSTM, "help", 300),
    "character GRU, 300": partial(recurrent, nn.GRU, "help", 300),
    "byte LSTM, 1000": partial(recurrent, nn.LSTM, "code", 1000),
}
