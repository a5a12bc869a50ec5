"""Learned optimizers of the LSTM kind: meta-train them in PyTorch Lightning, on fused kernels.

Names are imported when they are first used: rules, tasks and rollouts need torch alone, not Lightning. Those
that need an extra of the package, such as `MetaLearner`, say which where it is not installed.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l2l_lightning.optim import LearnedOptimizer
    from l2l_lightning.pretrained import load
    from l2l_lightning.rollout import Optimizees, Rollout, run_rule
    from l2l_lightning.rules import CoordinatewiseLSTM, UpdateRule
    from l2l_lightning.tasks import (
        MNISTMLP,
        FunctionTask,
        ImageMLP,
        Mixture,
        ModuleTask,
        NoisyScaledSquare,
        Quadratic,
        Task,
    )
    from l2l_lightning.training.data_module import MetaData
    from l2l_lightning.training.meta_learner import MetaLearner
    from l2l_lightning.training.trainer import ComparisonSettings, MetaTrainer

__version__ = "0.1.0"

__all__ = [
    "MNISTMLP",
    "ComparisonSettings",
    "CoordinatewiseLSTM",
    "FunctionTask",
    "ImageMLP",
    "LearnedOptimizer",
    "MetaData",
    "MetaLearner",
    "MetaTrainer",
    "Mixture",
    "ModuleTask",
    "NoisyScaledSquare",
    "Optimizees",
    "Quadratic",
    "Rollout",
    "Task",
    "UpdateRule",
    "load",
    "run_rule",
]

_MODULES = {
    "optim": ("LearnedOptimizer",),
    "pretrained": ("load",),
    "rollout": ("Optimizees", "Rollout", "run_rule"),
    "rules": ("CoordinatewiseLSTM", "UpdateRule"),
    "tasks": (
        "MNISTMLP",
        "FunctionTask",
        "ImageMLP",
        "Mixture",
        "ModuleTask",
        "NoisyScaledSquare",
        "Quadratic",
        "Task",
    ),
    "training.data_module": ("MetaData",),
    "training.meta_learner": ("MetaLearner",),
    "training.trainer": ("ComparisonSettings", "MetaTrainer"),
}

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name):
        for module, names in _MODULES.items():
            if name in names:
                from l2l_lightning.extras import needed_by

                with needed_by(name):
                    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
