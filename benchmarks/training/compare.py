"""Trains a network with learned rules, as LearnedOptimizer, and with AdamW, at one rate and with a cosine.

    python benchmarks/training/compare.py resnet         # fine-tunes a ResNet-18
    python benchmarks/training/compare.py transformer    # trains a character transformer from scratch

Every optimizer meets the same weights and minibatches. Its learning rate and weight decay are chosen on
validation data and seeds that are not reported, but for rules that have step sizes of their own, of which
nothing is tuned; the folder --out gets results.json, curves.csv, curves.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loop import ADAMW, ADAMW_COSINE, EVALUATIONS, Problem, Run, Setting, draw_network, train
from measuring import print_table
from quality_tables import training as training_table
from resnet import resnet_problem
from torch.utils.data import TensorDataset
from transformer import transformer_problem

from l2l_lightning import load
from l2l_lightning.comparison.curves_file import csv_text
from l2l_lightning.comparison.figures import LOSS_LABELS
from l2l_lightning.comparison.plots import Curve, curves_figure, png
from l2l_lightning.comparison.statistics import Interval, log_interval, paired_difference
from l2l_lightning.comparison.tuning import best_position, search_rates
from l2l_lightning.errors import CommandLineError, L2LError
from l2l_lightning.files import write_atomically, write_json
from l2l_lightning.provenance import origin
from l2l_lightning.rollout.optimizees import derive_generator
from l2l_lightning.rules import ZeroShot

# Positions of the first rates, 0.001 to 0.01 and 0.03 to 0.3; weight decays, the first at every rate and the
# other at the best one: a rule's is multiplied by an lr that is a hundred times AdamW's.
ADAMW_GRID, RULE_GRID = (range(-6, -3), (0.01, 0.1)), (range(-3, 0), (0.0, 1e-3))
MAX_EXTENSIONS = 3


def rate(position: int) -> float:
    """Returns a learning rate of a series that has two a decade, 1 and 3."""
    decade, digit = divmod(position, 2)
    return float(f"{(1, 3)[digit]}e{decade}")


def run(problem: Problem, setting: Setting, stream: Literal["tuning", "test"], args: Any) -> list[Run]:
    """Trains a network for each seed of a stream: the same weights and minibatches for every setting."""
    tuning, runs = stream == "tuning", []
    for index in range(args.num_tuning_seeds if tuning else args.num_seeds):
        generator = derive_generator(args.seed, stream, index)
        network = draw_network(problem.make_network, generator).to(args.device)
        data = (problem.train, problem.validation if tuning else problem.test)
        sizes = {"steps": args.steps, "batch_size": args.batch_size}
        runs.append(train(network, setting, *data, **sizes, generator=generator))
    return runs


def tune(problem: Problem, optimizer: str, args: Any) -> dict[Setting, float]:
    """Returns the last validation loss, averaged over seeds, of every setting that the search tries."""
    start, weight_decays = ADAMW_GRID if optimizer in (ADAMW, ADAMW_COSINE) else RULE_GRID
    trials: dict[Setting, float] = {}

    def score(position: int, weight_decay: float = weight_decays[0]) -> float:
        setting = Setting(optimizer, rate(position), weight_decay)
        print(f"tuning {optimizer}, lr {setting.lr:g}, weight decay {weight_decay:g}")
        mean = statistics.fmean(run.held_out[-1][1] for run in run(problem, setting, "tuning", args))
        trials[setting] = mean if math.isfinite(mean) else math.inf
        return trials[setting]

    scores = search_rates(start[:2] if args.quick else start, score, 0 if args.quick else MAX_EXTENSIONS)
    for weight_decay in () if args.quick else weight_decays[1:]:
        score(best_position(scores), weight_decay)
    if math.isinf(min(trials.values())):
        raise CommandLineError(f"{optimizer} diverged at every setting: leave it out, or take fewer --steps")
    return trials


def compare(problem: Problem, args: Any) -> tuple[dict[str, list[Run]], dict[str, Any]]:
    """Tunes AdamW, with and without a cosine, and every rule, and runs each at its best on the same seeds.

    Returns:
        The reported runs, and what results.json says of them (null for what is not finite), by optimizer.
    """
    runs: dict[str, list[Run]] = {}
    found: dict[str, Any] = {}
    for name in (ADAMW, ADAMW_COSINE, *args.rules):
        started = time.perf_counter()
        trials = {} if name in args.untuned else tune(problem, name, args)
        seconds = round(time.perf_counter() - started, 1)
        best = min(trials, key=lambda setting: trials[setting], default=Setting(name, 1.0, 0.0))
        print(f"{name}, lr {best.lr:g}")
        runs[name] = run(problem, best, "test", args)
        first, reference = ([run.losses[0] for run in runs[key]] for key in (name, ADAMW))
        if not np.allclose(first, reference, rtol=1e-4):
            raise RuntimeError(f"{name} and {ADAMW} are not paired: they begin with other losses")
        (losses, accuracies), (theirs, _) = (
            torch.tensor([run.held_out[-1][1:] for run in runs[key]], dtype=torch.float64).T
            for key in (name, ADAMW)
        )
        found[name] = {
            "held_out_loss": Interval.of(losses).as_json(),
            "held_out_accuracy": Interval.of(accuracies).as_json(),
            "held_out_losses": [loss if math.isfinite(loss) else None for loss in losses.tolist()],
            "held_out_accuracies": accuracies.tolist(),
            "loss_minus_adamw": paired_difference(losses, theirs).as_json(),
            "seconds_per_step": statistics.median(s for run in runs[name] for s in run.step_seconds),
            "cpu_seconds_per_step": statistics.median(s for run in runs[name] for s in run.cpu_seconds),
            "state_bytes": runs[name][0].state_bytes,
            "setting": best._asdict(),
            "tuning": {
                "seconds": seconds,
                "trials": [
                    setting._asdict() | {"validation_loss": loss if math.isfinite(loss) else None}
                    for setting, loss in trials.items()
                ],
            },
        }
    return runs, found


def write_curves(folder: Path, runs: dict[str, list[Run]], args: Any) -> None:
    """Writes curves.csv and curves.png; "train" is a minibatch's loss, "held_out" that of all test data."""
    lines: list[tuple[Any, ...]] = []
    curves, steps = [], np.arange(args.steps + 1)
    for name, ours in runs.items():
        for seed, run in enumerate(ours):
            lines += [(name, seed, "train", step, loss, "") for step, loss in enumerate(run.losses)]
            lines += [(name, seed, "held_out", *evaluation) for evaluation in run.held_out]
        at = [step for step, _, _ in ours[0].held_out]
        losses = torch.tensor([[loss for _, loss, _ in run.held_out] for run in ours], dtype=torch.float64).T
        ours_by_step = (losses.mean(dim=1), *log_interval(losses))
        line, low, high = (np.interp(steps, at, values.numpy()) for values in ours_by_step)
        final = Interval.of(losses[-1])
        curves.append(Curve(f"{name}  {final}", line, low, high, final.mean, name in args.rules[:1], name))
    title = f"{args.problem}: held-out loss, mean of {args.num_seeds} seeds with its 95% interval"
    columns = ("optimizer", "seed", "split", "step", "loss", "accuracy")
    write_atomically(folder / "curves.csv", csv_text(columns, lines))
    figure = curves_figure(curves, title, f"loss after {args.steps} steps", "log", LOSS_LABELS["log"])
    write_atomically(folder / "curves.png", png(figure))


def parse(arguments: list[str] | None) -> Any:
    """Reads the command line; a quick run's sizes are tiny whatever else it says."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    problems = parser.add_subparsers(dest="problem", required=True)
    resnet, transformer = problems.add_parser("resnet"), problems.add_parser("transformer")
    resnet.set_defaults(pretraining_steps=200, steps=100, batch_size=64, out=Path("runs/training-resnet"))
    transformer.set_defaults(
        context=64, dim=64, steps=300, batch_size=16, out=Path("runs/training-transformer")
    )
    resnet.add_argument("--width", type=int, default=16, help="channels of the first stage; ResNet-18 has 64")
    resnet.add_argument("--weights", help="torchvision's pretrained weights (IMAGENET1K_V1), of width 64")
    resnet.add_argument("--data-root", help="folder of all of MNIST; default: the subset in the package")
    for command in (resnet, transformer):
        command.add_argument("--out", type=Path)
        command.add_argument("--rules", nargs="+", default=["zero-shot", "lstm-mnist-mixture"])
        command.add_argument("--steps", type=int, help=f"a multiple of {EVALUATIONS}")
        command.add_argument("--batch-size", type=int)
        command.add_argument("--num-seeds", type=int, default=3, help="reported runs of each optimizer")
        command.add_argument("--num-tuning-seeds", type=int, default=1, help="runs of each setting tried")
        command.add_argument("--seed", type=int, default=0, help="of every random draw")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--quick", action="store_true", help="everything tiny, to see whether it runs")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps = args.pretraining_steps = EVALUATIONS
        args.batch_size = args.width = 4
        args.context = args.dim = 16
        args.num_seeds, args.num_tuning_seeds = 2, 1
    for name in ("width", "steps", "batch_size", "num_seeds", "num_tuning_seeds"):
        if (value := getattr(args, name, 1)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.steps % EVALUATIONS:
        parser.error(f"--steps must be a multiple of {EVALUATIONS}, got {args.steps}")
    if len(set(args.rules)) < len(args.rules):
        parser.error(f"--rules names a rule twice: {', '.join(args.rules)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; what a user can mend is one line on standard error."""
    args = parse(arguments)
    try:
        rules = {name: load(name) for name in args.rules}  # what is missing shows now
        args.untuned = [name for name, rule in rules.items() if isinstance(rule, ZeroShot)]
        args.out.mkdir(parents=True, exist_ok=True)  # or fail now
        problem = {"resnet": resnet_problem, "transformer": transformer_problem}[args.problem](args)
        if args.quick:
            few = (TensorDataset(*data[:32]) for data in (problem.validation, problem.test))
            problem = Problem(*problem[:-2], *few)
        print(f"{problem.description}\nData: {problem.source}")
        runs, found = compare(problem, args)
        found_on = origin(args.device)
        document = {
            **{name: value for name, value in vars(args).items() if name not in ("out", "data_root")},
            "description": problem.description,
            "data": problem.source,
            "parameters": sum(parameter.numel() for parameter in problem.make_network().parameters()),
            **found_on,
            "versions": found_on["versions"] | {"torchvision": metadata.version("torchvision")},
            "optimizers": found,
        }
        write_curves(args.out, runs, args)
        write_json(args.out / "results.json", document)
    except L2LError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error} (--out says where results are written)")
    print_table(training_table(document))
    print(f"Results: {args.out}")


if __name__ == "__main__":
    # As on the package's command line: subnormal numbers are ten times as slow.
    torch.set_flush_denormal(True)
    main()
