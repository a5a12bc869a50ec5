"""The arguments of `python -m l2l_lightning reproduce`, parsed before the experiments are imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser

from l2l_lightning.errors import CommandLineError
from l2l_lightning.reproduce.settings import EXPERIMENT_NAMES, Settings


def parser() -> ArgumentParser:
    """The command's arguments; `Settings` says more of them."""
    result = ArgumentParser(
        prog="python -m l2l_lightning reproduce",
        exit_on_error=False,  # `l2l_lightning.cli.main` says what is wrong in one line
        description="Regenerates the figures of the study and of the paper, and what the study left undone. "
        "Interrupted, the same command goes on where it was.",
    )
    default = Settings()

    def add(name: str, kind: Any, text: str) -> None:
        value = getattr(default, name.replace("-", "_"))
        result.add_argument(f"--{name}", type=kind, default=value, help=text)

    result.add_argument("names", nargs="+", choices=[*EXPERIMENT_NAMES, "all"], help="which experiments")
    add("out", str, "folder for the report and all that is kept")
    add("data-root", str | None, "folder of all of MNIST; else L2L_DATA, else the subset in the package")
    add("smiles-root", str | None, "folder of your copy of GENKI-4K; else L2L_SMILES, else not measured")
    add("seed", int, "of every random draw")
    add("num-optimizees", int, "fresh test optimizees that curves are averaged over")
    add("num-tuning-optimizees", int, "seeds that the baselines are tuned on")
    add("matrix", Literal["star", "full"], "one thing varied at a time, or all crossed (many hours)")
    for name, text in (
        ("from-pretrained", "use the package's trained rules and tuned baselines, train and tune nothing"),
        ("quick", "everything tiny, to see whether it runs; the figures mean nothing"),
    ):
        result.add_argument(f"--{name}", action="store_true", help=text)
    return result


def parse(arguments: Sequence[str]) -> tuple[list[str], Settings]:
    """The experiments' names and how to run them.

    Raises:
        CommandLineError: A value is out of its range; the message names the option.
        argparse.ArgumentError: There is no such option or experiment.
    """
    options = vars(parser().parse_args(list(arguments)))
    names: list[str] = options.pop("names")
    try:
        return names, Settings(**options)
    except ValueError as error:
        raise CommandLineError(str(error)) from error
