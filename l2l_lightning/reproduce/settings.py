"""How experiments are run, and how the command's arguments say so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from l2l_lightning.errors import ReproductionError
from l2l_lightning.program import program

EXPERIMENT_NAMES = (
    *("quadratic", "mnist", "epochs", "relu-to-sigmoid"),
    *("graph", "preprocessing", "generalise", "cifar", "art", "zero-shot"),
)
"""The experiments in the order in which they run; `command.EXPERIMENTS` says what they are."""


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
    cifar_root: str | None = _option(
        None, "folder that holds CIFAR-10's cifar-10-batches-py; else not measured"
    )
    from_pretrained: bool = _option(
        False, "use the package's trained rules and tuned baselines, train and tune nothing that it has"
    )
    seed: int = _option(0, "of every random draw")
    num_optimizees: int = _option(32, "fresh test optimizees that curves are averaged over")
    num_tuning_optimizees: int = _option(5, "seeds that every baseline's setting is chosen on")
    matrix: Literal["star", "full"] = _option(
        "star", "one thing varied at a time, or all crossed (many hours)"
    )
    weights: str | None = _option(
        None, "of art: VGG's, a file of torchvision's or IMAGENET1K_V1; else the package's small network"
    )
    contents: str | None = _option(None, "of art: folder of 6 pictures at least; else two photographs")
    style: str | None = _option(None, "of art: the picture whose style is trained on; else a drawn one")
    new_style: str | None = _option(None, "of art: the picture whose style is new; else two drawn ones")
    problems: tuple[str, ...] = _option((), "of zero-shot: names or patterns such as 'digits*'; all without")
    peers: tuple[str, ...] = _option((), "of zero-shot: names or patterns such as 'adamw*'; all without")
    workers: int = _option(os.cpu_count() or 1, "of zero-shot: processes of one thread each")
    quick: bool = _option(False, "everything tiny, to see whether it runs; the figures mean nothing")

    def __post_init__(self) -> None:
        for name, least in (("num_optimizees", 2), ("num_tuning_optimizees", 1), ("workers", 1)):
            if (value := getattr(self, name)) < least:
                raise ReproductionError(f"{_flag(name)} must be at least {least}, got {value}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse(arguments: Sequence[str]) -> tuple[list[str], Settings]:
    """Parses the experiments' names and how to run them.

    Raises:
        ReproductionError: A value is out of its range; the message names the option.
        argparse.ArgumentError: There is no such option or experiment.
    """
    from jsonargparse import ArgumentParser  # here: settings are made without a command line, too

    parser = ArgumentParser(
        prog=f"{program()} reproduce",
        exit_on_error=False,  # `l2l_lightning.cli.main` says what is wrong in one line
        description="Regenerates the figures of the study and of the paper, and what the study left undone. "
        "Interrupted, the same command goes on where it was.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        choices=[*EXPERIMENT_NAMES, "all"],
        help="which experiments; all: but cifar, art and zero-shot",
    )
    kinds = get_type_hints(Settings)
    for option in fields(Settings):
        how = {"type": kinds[option.name], "default": option.default}
        if kinds[option.name] is bool:
            how = {"action": "store_true"}
        elif isinstance(option.default, tuple):
            how = {"type": str, "nargs": "+", "default": ()}
        parser.add_argument(_flag(option.name), help=option.metadata["help"], **how)
    options = vars(parser.parse_args(list(arguments)))
    options |= {name: tuple(options[name]) for name in ("problems", "peers")}
    return options.pop("names"), Settings(**options)
