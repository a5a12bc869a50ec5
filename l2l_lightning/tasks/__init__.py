"""Tasks: what is optimised."""

from l2l_lightning.tasks.base import Task
from l2l_lightning.tasks.mlp import MNISTMLP
from l2l_lightning.tasks.quadratic import Quadratic
from l2l_lightning.tasks.squares import NoisyScaledSquare, SimpleSquare

__all__ = ["MNISTMLP", "NoisyScaledSquare", "Quadratic", "SimpleSquare", "Task"]


class FunctionTask(Task):
    """Stand-in until the next commit, so that the package imports."""


class ModuleTask(Task):
    """Stand-in until the next commit, so that the package imports."""
