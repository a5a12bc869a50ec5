"""The trained rules that the experiments are about, and how each of them is trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from l2l_lightning.reproduce.art_tasks import HORIZON, training_task
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.tasks.base import Task

SNAPSHOTS = {f"lstm-mnist-relu-{rollouts}": ("lstm-mnist-relu", rollouts) for rollouts in (10, 200)}
"""Rules as they were after so many rollouts of a training: the study shows its ReLU rule then, too."""


@dataclass(frozen=True)
class Recipe:
    """A meta-training: a preset, and what differs from it."""

    preset: str
    options: dict[str, Any] = field(default_factory=dict)
    """Values that are put over the preset's, nested as they are."""
    start: str | None = None
    """The trained rule that this one goes on from."""
    dataset: str = "mnist"
    """The data set that the preset's task draws from, if it draws from any."""
    task: Callable[[Settings], Task] | None = None
    """Makes the task of an experiment's settings, in place of the preset's."""


@dataclass(frozen=True)
class Ablation:
    """One setting of the preprocessing ablation."""

    preprocessing: str
    """How gradients enter the rule: "log_sign" or "identity"."""
    factor: float
    """The p of log_sign; for identity what gradients are multiplied by."""
    output_scale: float
    unroll: int
    """T, the inner steps of a window: 20 is truncated, 100 is the whole rollout."""

    @property
    def name(self) -> str:
        """The name of the rule that it trains."""
        return f"ablation-{self.preprocessing}-{self.factor:g}-{self.output_scale:g}-{self.unroll}"

    @property
    def inputs(self) -> str:
        """Says how gradients enter."""
        if self.preprocessing == "log_sign":
            return f"log and sign, p = {self.factor:g}"
        return "as they are" if self.factor == 1 else f"times {self.factor:g}"

    @property
    def column(self) -> str:
        """Says how large updates and windows are."""
        window = "whole rollout" if self.unroll == 100 else f"windows of {self.unroll}"
        return f"output × {self.output_scale:g}, {window}"

    @property
    def recipe(self) -> Recipe:
        """A short run of the preset `mnist`: the same inner steps for every setting."""
        rule = {
            "preprocessing": self.preprocessing,
            "p" if self.preprocessing == "log_sign" else "gradient_scale": self.factor,
            "output_scale": self.output_scale,
        }
        model = {"rule": {"init_args": rule}, "unroll": self.unroll, "num_tasks": 1}
        options = {
            "model": {**model, "num_validation_optimizees": 8},
            "data": {"num_rollouts": ABLATION_ROLLOUTS},
            "trainer": {"val_check_interval": ABLATION_ROLLOUTS * 100 // self.unroll // 4},
            # It is the outcome if a setting stays at chance.
            "collapse": {"start_patience": 100, "patience": 100},
        }
        return Recipe("mnist", options)


ABLATION_ROLLOUTS = 50
INPUTS = (("identity", 1.0), ("identity", 100.0), ("identity", 1000.0), ("log_sign", 10.0))
ABLATIONS = [
    Ablation(*inputs, output_scale, unroll)
    for inputs, output_scale, unroll in itertools.product(INPUTS, (0.1, 1.0), (20, 100))
]

LABELS: dict[str, tuple[int, ...] | None] = {"10": None, "5": (2, 3, 4, 5, 6), "2": (8, 9)}
"""The labels that the paper's convolutional experiment is evaluated on; of CIFAR-10, five animals and two
vehicles."""
HELD_OUT_LABELS = (0, 1, 7)
"""The labels that only all ten have: what the paper's "LSTM-sub" is trained on."""

_DEEPMIND = {
    "model": {
        "rule": {
            "init_args": {
                "rules": {
                    key: {"init_args": {"p": 5.0, "output_scale": 0.01}} for key in ("conv.*weight", ".")
                }
            }
        },
        "unroll": 20,
        "learning_rate": 0.001,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "start_from": None,
    },
    "averaging": {"decay": 0.99},
    "trainer": {"val_check_interval": 100},
}
"""The settings of DeepMind's code, as in the preset `deepmind_code_mnist`, over the preset of a data set."""


def _convolutional(dataset: str, preset: str, start: str) -> dict[str, Recipe]:
    """The rules of the paper's convolutional experiment on a data set."""
    sub = {"model": {"task": {"init_args": {"classes": list(HELD_OUT_LABELS)}}}}
    return {
        f"lstm-{dataset}": Recipe(preset, start=start, dataset=dataset),
        f"lstm-{dataset}-sub": Recipe(preset, sub, start=start, dataset=dataset),
        f"lstm-{dataset}-deepmind": Recipe(preset, _DEEPMIND, dataset=dataset),
    }


ART_RECIPE = Recipe(
    "mnist",
    {
        # The paper's windows, and its steps for a picture.
        "model": {"horizon": HORIZON, "unroll": 32, "num_tasks": 1, "num_validation_optimizees": 6},
        "data": {"num_rollouts": 300},
        "trainer": {"val_check_interval": 100},
    },
    task=training_task,
)

RECIPES: dict[str, Recipe] = {
    "lstm-quadratic": Recipe("quadratic"),
    "lstm-study-quadratic": Recipe("study_quadratic"),
    "lstm-mnist": Recipe("mnist"),
    "lstm-mnist-relu": Recipe("mnist_relu"),
    "lstm-mnist-tanh": Recipe("mnist_tanh"),
    "lstm-mnist-activations": Recipe("mnist_activations"),
    "lstm-mnist-mixture": Recipe("mnist_mixture", start="lstm-mnist-activations"),
    "lstm-art": ART_RECIPE,
    **{ablation.name: ablation.recipe for ablation in ABLATIONS},
    **_convolutional("colour-digits", "colour_digits", start="lstm-mnist-mixture"),
    **_convolutional("cifar10", "cifar", start="lstm-mnist-mixture"),
}
"""How every rule is trained, by the rule's name."""
