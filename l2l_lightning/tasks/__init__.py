"""Tasks: what is optimised."""

from l2l_lightning.tasks.base import Task
from l2l_lightning.tasks.convnet import ImageConvNet
from l2l_lightning.tasks.function import FunctionTask
from l2l_lightning.tasks.mixture import Mixture
from l2l_lightning.tasks.mlp import MNISTMLP, ImageMLP
from l2l_lightning.tasks.module import ModuleTask
from l2l_lightning.tasks.quadratic import Quadratic
from l2l_lightning.tasks.small_problems import SmallProblem, SmallProblems
from l2l_lightning.tasks.squares import NoisyScaledSquare, SimpleSquare
from l2l_lightning.tasks.style_transfer import StyleTransfer

__all__ = [
    "MNISTMLP",
    "FunctionTask",
    "ImageConvNet",
    "ImageMLP",
    "Mixture",
    "ModuleTask",
    "NoisyScaledSquare",
    "Quadratic",
    "SimpleSquare",
    "SmallProblem",
    "SmallProblems",
    "StyleTransfer",
    "Task",
]
