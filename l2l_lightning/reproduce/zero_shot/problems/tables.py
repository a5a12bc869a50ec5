"""Logistic regression and small perceptrons on scikit-learn's tables."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import nn

from l2l_lightning.reproduce.zero_shot import data
from l2l_lightning.reproduce.zero_shot.problem import PROBLEMS, QUICK, Problem, prediction
from l2l_lightning.reproduce.zero_shot.problems.networks import mlp


def logistic(name: str, classes: int, steps: int) -> Problem:
    """A linear classifier in minibatches of 32."""
    rows = data.images("digits") if name == "digits" else data.table(name)
    build = partial(nn.Linear, rows.train[0].shape[1], classes)
    loss = prediction(F.cross_entropy)
    return Problem("logistic", steps, build, rows.batches(32), rows.held_out, loss, rows.source)


def diabetes(hidden: tuple[int, ...], steps: int) -> Problem:
    """The progress of diabetes from ten measurements, standardised; the mean squared error of a patient."""
    rows, loss = data.table("diabetes"), prediction(F.mse_loss)
    build = partial(mlp, (10, *hidden, 1), nn.ReLU)
    return Problem("regression", steps, build, rows.batches(32), rows.held_out, loss, rows.source)


for _name, _classes, _steps in (
    *(("digits", 10, 100), ("digits", 10, 300), ("digits", 10, 1000), ("digits", 10, 3000)),
    *(("breast_cancer", 2, 300), ("breast_cancer", 2, 1000), ("wine", 3, 100), ("wine", 3, 300)),
):
    PROBLEMS[f"logistic {_name}, {_steps}"] = partial(logistic, _name, _classes, _steps)
PROBLEMS |= {
    "diabetes linear, 300": partial(diabetes, (), 300),
    "diabetes 10-32-1, 100": partial(diabetes, (32,), 100),
    "diabetes 10-32-32-1, 300": partial(diabetes, (32, 32), 300),
}
QUICK += ["logistic digits, 300", "diabetes 10-32-1, 100"]
