"""Learned optimizers of the LSTM kind: meta-train them in PyTorch Lightning, on fused kernels."""

from l2l_lightning.data_module import MetaData
from l2l_lightning.meta_learner import MetaLearner
from l2l_lightning.optimizees import Optimizees
from l2l_lightning.rollout import Rollout, run_rule
from l2l_lightning.rules import CoordinatewiseLSTM, UpdateRule
from l2l_lightning.tasks import MNISTMLP, FunctionTask, ModuleTask, NoisyScaledSquare, Quadratic, Task
from l2l_lightning.trainer import ComparisonSettings, MetaTrainer

__all__ = [
    "MNISTMLP",
    "ComparisonSettings",
    "CoordinatewiseLSTM",
    "FunctionTask",
    "MetaData",
    "MetaLearner",
    "MetaTrainer",
    "ModuleTask",
    "NoisyScaledSquare",
    "Optimizees",
    "Quadratic",
    "Rollout",
    "Task",
    "UpdateRule",
    "run_rule",
]
