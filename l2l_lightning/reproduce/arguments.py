"""The arguments of `python -m l2l_lightning reproduce`, parsed before the experiments are imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import get_type_hints

from jsonargparse import ArgumentParser

from l2l_lightning.reproduce.settings import EXPERIMENT_NAMES, Settings


def parse(arguments: Sequence[str]) -> tuple[list[str], Settings]:
    """Parses the experiments' names and how to run them.

    Raises:
        ReproductionError: A value is out of its range; the message names the option.
        argparse.ArgumentError: There is no such option or experiment.
    """
    parser = ArgumentParser(
        prog="python -m l2l_lightning reproduce",
        exit_on_error=False,  # `l2l_lightning.cli.main` says what is wrong in one line
        description="Regenerates the figures of the study and of the paper, and what the study left undone. "
        "Interrupted, the same command goes on where it was.",
    )
    parser.add_argument("names", nargs="+", choices=[*EXPERIMENT_NAMES, "all"], help="which experiments")
    kinds = get_type_hints(Settings)
    for field in fields(Settings):
        name, text, kind = f"--{field.name.replace('_', '-')}", field.metadata["help"], kinds[field.name]
        if kind is bool:
            parser.add_argument(name, action="store_true", help=text)
        else:
            parser.add_argument(name, type=kind, default=field.default, help=text)
    options = vars(parser.parse_args(list(arguments)))
    names: list[str] = options.pop("names")
    return names, Settings(**options)
