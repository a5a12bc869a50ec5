"""`python -m l2l_lightning example resnet | transformer`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from rich.console import Console
from torch.utils.data import Subset

from l2l_lightning import pretrained
from l2l_lightning.errors import CommandLineError
from l2l_lightning.examples.comparison import compare, summary, table, write
from l2l_lightning.examples.problem import Problem
from l2l_lightning.examples.resnet import resnet_problem
from l2l_lightning.examples.training import EVALUATIONS
from l2l_lightning.examples.transformer import transformer_problem

RULES = ["lstm-mnist-mixture", "lstm-mnist-relu"]

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

QUICK: dict[str, dict[str, int]] = {
    "resnet": {"width": 4, "pretraining_steps": EVALUATIONS},
    "transformer": {"context": 16, "dim": 16},
}
"""Sizes of a quick run, beside its few steps."""

QUICK_HELD_OUT = 32


def parser() -> ArgumentParser:
    """The command's arguments."""
    result = ArgumentParser(
        exit_on_error=False,
        prog="python -m l2l_lightning example",
        description="Trains a network with learned rules, as LearnedOptimizer, and with AdamW: the same "
        "weights and minibatches, every optimizer at its tuned settings.",
    )
    examples = result.add_subcommands(dest="example")
    resnet = ArgumentParser(
        exit_on_error=False, description="Fine-tunes a torchvision ResNet-18 on MNIST's digits 5 to 9."
    )
    resnet.add_argument("--width", type=int, default=16, help="channels of the first stage; ResNet-18 has 64")
    resnet.add_argument(
        "--weights",
        type=str | None,
        help="torchvision's name of pretrained weights, downloaded (IMAGENET1K_V1, with --width 64); "
        "else the network is pretrained here, on the digits 0 to 4",
    )
    resnet.add_argument(
        "--data-root",
        type=str | None,
        help="folder of all of MNIST; else L2L_DATA, else the subset in the package",
    )
    _add_common(resnet, "resnet", steps=100, batch_size=64)
    examples.add_subcommand("resnet", resnet)
    transformer = ArgumentParser(
        exit_on_error=False,
        description="Trains a small transformer to predict the next character of Python's documentation.",
    )
    _add_common(transformer, "transformer", steps=300, batch_size=16)
    examples.add_subcommand("transformer", transformer)
    return result


def _add_common(options: ArgumentParser, name: str, *, steps: int, batch_size: int) -> None:
    def add(flag: str, kind: Any, default: Any, text: str) -> None:
        options.add_argument(flag, type=kind, default=default, help=text)

    add("--out", str, f"runs/example-{name}", "folder for results.json, curves.csv and curves.png")
    add("--rules", list[str], RULES, "rules to train with: names or .safetensors files")
    add("--state-dtype", Literal["float32", "bfloat16"], "float32", "of the rules' states")
    add("--steps", int, steps, f"of every run, a multiple of {EVALUATIONS}")
    add("--batch-size", int, batch_size, "of every step")
    add("--num-seeds", int, 3, "reported runs of each optimizer")
    add("--num-tuning-seeds", int, 1, "runs that each setting of a search is scored on")
    add("--seed", int, 0, "of every random draw")
    add("--accelerator", str, "auto", "kind of device, as Lightning names it")
    options.add_argument(
        "--quick",
        action="store_true",
        help="everything tiny, whatever the other sizes, to see whether it runs; the figures mean nothing",
    )


def example(
    name: str,
    *,
    out: str,
    rules: Sequence[str],
    state_dtype: str,
    num_seeds: int,
    num_tuning_seeds: int,
    quick: bool,
    **sizes: Any,
) -> dict[str, Any]:
    """Runs an example, writes its results and prints their table.

    Args:
        name: "resnet" or "transformer".
        out: Folder for the results.
        rules: As LearnedOptimizer takes them.
        state_dtype: Of STATE_DTYPES.
        num_seeds: Reported runs of each optimizer.
        num_tuning_seeds: Runs of each setting of a search.
        quick: Everything tiny.
        **sizes: Of the problem, see `resnet_problem` and `transformer_problem`.

    Returns:
        What results.json holds.

    Raises:
        CommandLineError: An option is not possible; the message names it.
        DataNotFoundError: MNIST is not where the options say.
        WeightsError: There is no such rule.
        OSError: The folder cannot be written.
    """
    for option, value in (("num-seeds", num_seeds), ("num-tuning-seeds", num_tuning_seeds)):
        if value < 1:
            raise CommandLineError(f"--{option} must be at least 1, got {value}")
    if len(set(rules)) < len(rules):
        raise CommandLineError(f"--rules names a rule twice: {', '.join(rules)}")
    for rule in rules:
        pretrained.load(rule)  # what is missing shows now rather than after AdamW's runs
    Path(out).mkdir(parents=True, exist_ok=True)  # or fail now
    if quick:
        num_seeds, num_tuning_seeds = 2, 1
        sizes |= QUICK[name] | {"steps": EVALUATIONS, "batch_size": 4}
    problems: dict[str, Callable[..., Problem]] = {
        "resnet": resnet_problem,
        "transformer": transformer_problem,
    }
    problem = problems[name](**sizes)
    if quick:
        few = range(QUICK_HELD_OUT)
        problem = replace(problem, validation=Subset(problem.validation, few), test=Subset(problem.test, few))
    console = Console()
    console.print(f"{problem.description}\nData: {problem.source}")
    contenders = compare(
        problem,
        rules,
        num_seeds=num_seeds,
        num_tuning_seeds=num_tuning_seeds,
        state_dtype=STATE_DTYPES[state_dtype],
        progress=console.print,
        quick=quick,
    )
    device = Trainer(accelerator=sizes["accelerator"], devices=1, logger=False).strategy.root_device
    document = summary(problem, contenders, device=device, quick=quick)
    write(Path(out), problem, contenders, document)
    console.print(table(document))
    print(f"Results: {out}")
    return document


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    options = parser().parse_args(list(arguments))
    # Lightning's remarks on its set-up, once for every run.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    try:
        example(options.example, **vars(options[options.example]))
    except (ValueError, MemoryError) as error:
        raise CommandLineError(str(error)) from error
    except OSError as error:
        raise CommandLineError(f"{error} (--out says where results are written)") from error
