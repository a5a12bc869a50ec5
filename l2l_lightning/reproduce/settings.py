"""How experiments are run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from l2l_lightning.errors import ReproductionError

EXPERIMENT_NAMES = (
    "quadratic",
    "mnist",
    "epochs",
    "relu-to-sigmoid",
    "graph",
    "preprocessing",
    "generalise",
)
"""The experiments in the order in which `all` runs them; `command.EXPERIMENTS` has their classes."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """How experiments are run; what each setting means is in the command's help.

    Raises:
        ReproductionError: A value is out of its range; the message names its option.
    """

    out: str = _option("reproduction", "folder for the report, the experiments' folders and all that is kept")
    data_root: str | None = _option(None, "folder of all of MNIST; else L2L_DATA, else the package's subset")
    smiles_root: str | None = _option(None, "your copy of GENKI-4K; else L2L_SMILES, else not measured")
    from_pretrained: bool = _option(
        False, "use the package's trained rules and tuned baselines, train and tune nothing"
    )
    seed: int = _option(0, "of every random draw")
    num_optimizees: int = _option(32, "fresh test optimizees that curves are averaged over")
    num_tuning_optimizees: int = _option(5, "seeds that every baseline's setting is chosen on")
    matrix: Literal["star", "full"] = _option(
        "star", "one thing varied at a time, or all crossed (many hours)"
    )
    quick: bool = _option(False, "everything tiny, to see whether it runs; the figures mean nothing")

    def __post_init__(self) -> None:
        for name, least in (("num_optimizees", 2), ("num_tuning_optimizees", 1)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise ReproductionError(f"{option} must be at least {least}, got {getattr(self, name)}")
