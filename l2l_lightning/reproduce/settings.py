"""How experiments are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXPERIMENT_NAMES = (
    "quadratic",
    "mnist",
    "epochs",
    "relu-to-sigmoid",
    "graph",
    "preprocessing",
    "generalise",
)
"""In the order in which `all` runs them; `command.EXPERIMENTS` has their classes."""


@dataclass(frozen=True)
class Settings:
    """How experiments are run.

    Args:
        out: Folder for the report, a folder per experiment, trained rules and all that is kept.
        data_root: Folder that holds MNIST/raw, as torchvision lays it out; None is the variable L2L_DATA, or
            the subset that the package ships, whose figures are not comparable with those of the whole.
        smiles_root: Folder of your copy of GENKI-4K (or of images in two classes); None is the variable
            L2L_SMILES, and without either the experiments on smiles are not measured.
        from_pretrained: Use the package's trained rules and tuned baselines instead of making them anew.
        seed: Of every random draw.
        num_optimizees: Fresh test optimizees that every optimizer's curves are averaged over.
        num_tuning_optimizees: Seeds that every baseline's setting is chosen on.
        matrix: "star" varies width, depth, horizon and data of the generalisation matrix one at a time, for
            every activation; "full" crosses them all, which takes many hours.
        quick: Everything tiny: to see whether it runs. The figures mean nothing, and the report says so.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    out: str = "reproduction"
    data_root: str | None = None
    smiles_root: str | None = None
    from_pretrained: bool = False
    seed: int = 0
    num_optimizees: int = 32
    num_tuning_optimizees: int = 5
    matrix: Literal["star", "full"] = "star"
    quick: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_optimizees", 2), ("num_tuning_optimizees", 1)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} must be at least {least}, got {getattr(self, name)}")
