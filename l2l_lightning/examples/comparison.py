"""AdamW and learned rules on the same networks and minibatches, each at its tuned setting."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from l2l_lightning.comparison.plots import Curve, curves_figure, png
from l2l_lightning.comparison.statistics import Interval, mean_and_half_width
from l2l_lightning.examples.module import ADAMW, OptimizerSetting
from l2l_lightning.examples.problem import Problem
from l2l_lightning.examples.training import Run
from l2l_lightning.examples.tuning import Tuned, tune
from l2l_lightning.files import write_atomically, write_json
from l2l_lightning.provenance import commit, device_name, timestamp, versions


@dataclass(frozen=True)
class Contender:
    """An optimizer's search and its reported runs, one for each seed."""

    tuned: Tuned
    runs: list[Run]


def compare(
    problem: Problem,
    rules: Sequence[str],
    *,
    num_seeds: int,
    num_tuning_seeds: int,
    state_dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda _: None,
    quick: bool = False,
) -> dict[str, Contender]:
    """Tunes AdamW and every rule, and runs each at its best on the same seeds.

    Args:
        problem: What is trained.
        rules: As LearnedOptimizer takes them.
        num_seeds: Reported runs of each optimizer.
        num_tuning_seeds: Runs of each setting of a search.
        state_dtype: Of the rules' states.
        progress: Called before every setting and every reported optimizer.
        quick: Two settings a search.

    Raises:
        CommandLineError: An optimizer diverged at every setting.
        RuntimeError: Two optimizers met another network or another first minibatch.
    """
    contenders: dict[str, Contender] = {}
    for name in (ADAMW, *rules):
        tuned = tune(problem, name, num_tuning_seeds, state_dtype=state_dtype, progress=progress, quick=quick)
        progress(f"{name}, lr {tuned.setting.lr:g}")
        runs = [problem.run(tuned.setting, "test", index) for index in range(num_seeds)]
        contenders[name] = Contender(tuned, runs)
        _check_paired(name, runs, contenders[ADAMW].runs)
    return contenders


def _check_paired(name: str, runs: list[Run], reference: list[Run]) -> None:
    for index, (ours, theirs) in enumerate(zip(runs, reference, strict=True)):
        pairs = ((ours.losses[0], theirs.losses[0]), (ours.held_out[0].loss, theirs.held_out[0].loss))
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs):
            raise RuntimeError(
                f"{name} and {ADAMW} begin with other losses for seed {index}: they are not paired"
            )


def summary(
    problem: Problem, contenders: dict[str, Contender], *, device: torch.device, quick: bool
) -> dict[str, Any]:
    """What results.json holds; null for what is not finite."""
    parameters = sum(parameter.numel() for parameter in problem.network(torch.Generator()).parameters())
    reference = _finals(contenders[ADAMW].runs)[0]
    optimizers: dict[str, Any] = {}
    for name, contender in contenders.items():
        losses, accuracies = _finals(contender.runs)
        optimizers[name] = {
            "held_out_loss": Interval.of(losses).as_json(),
            "held_out_accuracy": Interval.of(accuracies).as_json(),
            "held_out_losses": _finite(losses.tolist()),
            "held_out_accuracies": _finite(accuracies.tolist()),
            "loss_minus_adamw": Interval.of(losses - reference).as_json(),
            "seconds_per_step": statistics.median(s for run in contender.runs for s in run.step_seconds),
            "cpu_seconds_per_step": statistics.median(s for run in contender.runs for s in run.cpu_seconds),
            "state_bytes": contender.runs[0].state_bytes,
            "setting": _setting(contender.tuned.setting),
            "tuning": {
                "seconds": round(contender.tuned.seconds, 1),
                "trials": [
                    _setting(trial.setting) | {"validation_loss": _finite([trial.loss])[0]}
                    for trial in contender.tuned.trials
                ],
            },
        }
    return {
        "example": problem.name,
        "description": problem.description,
        "data": problem.source,
        "quick": quick,
        "seed": problem.seed,
        "num_seeds": len(contenders[ADAMW].runs),
        "steps": problem.steps,
        "batch_size": problem.batch_size,
        "parameters": parameters,
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions() | {name: metadata.version(name) for name in ("lightning", "torchvision")},
        "finished": timestamp(),
        "optimizers": optimizers,
    }


def _finals(runs: list[Run]) -> tuple[Tensor, Tensor]:
    """Each run's last held-out loss and accuracy, [K] float64 both."""
    last = torch.tensor([run.held_out[-1][1:] for run in runs], dtype=torch.float64)
    return last[:, 0], last[:, 1]


def _setting(setting: OptimizerSetting) -> dict[str, Any]:
    dtype = {} if setting.state_dtype is None else {"state_dtype": str(setting.state_dtype)[len("torch.") :]}
    return {"lr": setting.lr, "weight_decay": setting.weight_decay, **dtype}


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


COLUMNS = (
    "optimizer",
    "held-out loss",
    "accuracy",
    "minus AdamW's loss",
    "lr, weight decay",
    "tried",
    "s / step",
    "CPU s / step",
    "state B / parameter",
)
"""Of a table of results; "tried" is how many settings the search tried."""


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of COLUMNS for every optimizer of results.json, as they are printed."""

    def interval(value: dict[str, Any]) -> str:
        low, high = (math.nan if x is None else x for x in value["ci95"])
        return str(Interval(math.nan if value["mean"] is None else value["mean"], low, high))

    return [
        (
            name,
            interval(numbers["held_out_loss"]),
            interval(numbers["held_out_accuracy"]),
            "" if name == ADAMW else interval(numbers["loss_minus_adamw"]),
            f"{numbers['setting']['lr']:g}, {numbers['setting']['weight_decay']:g}",
            str(len(numbers["tuning"]["trials"])),
            f"{numbers['seconds_per_step']:.2g}",
            f"{numbers['cpu_seconds_per_step']:.2g}",
            f"{numbers['state_bytes'] / document['parameters']:.1f}",
        )
        for name, numbers in document["optimizers"].items()
    ]


def table(document: dict[str, Any]) -> Table:
    """What is printed at the end."""
    result = Table(title=document["description"])
    for column in COLUMNS:
        result.add_column(column, overflow="fold", no_wrap=column == "optimizer")
    for row in rows(document):
        result.add_row(*row)
    return result


def write(folder: Path, problem: Problem, contenders: dict[str, Contender], document: dict[str, Any]) -> None:
    """Writes curves.csv, curves.png and, last, results.json.

    curves.csv has the columns optimizer, seed, split, step, loss, accuracy: "train" is the loss of a step's
    minibatch, "held_out" that of all test data after so many steps.
    """
    write_atomically(folder / "curves.csv", _csv(contenders))
    write_atomically(folder / "curves.png", _picture(problem, contenders))
    write_json(folder / "results.json", document)


def _csv(contenders: dict[str, Contender]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["optimizer", "seed", "split", "step", "loss", "accuracy"])
    for name, contender in contenders.items():
        for seed, run in enumerate(contender.runs):
            writer.writerows([name, seed, "train", t, f"{x:.9g}", ""] for t, x in enumerate(run.losses))
            writer.writerows(
                [name, seed, "held_out", t, f"{loss:.9g}", f"{accuracy:.9g}"]
                for t, loss, accuracy in run.held_out
            )
    return buffer.getvalue()


def _picture(problem: Problem, contenders: dict[str, Contender]) -> bytes:
    curves = []
    steps = np.arange(problem.steps + 1)
    for position, (name, contender) in enumerate(contenders.items()):
        at = [evaluation.step for evaluation in contender.runs[0].held_out]
        losses = torch.tensor([[e.loss for e in run.held_out] for run in contender.runs], dtype=torch.float64)
        mean, half = (values.numpy() for values in mean_and_half_width(losses.T))
        final = Interval.of(losses[:, -1])
        curves.append(
            Curve(
                label=f"{name}  {final}",
                mean=np.interp(steps, at, mean),
                low=np.interp(steps, at, mean - half),
                high=np.interp(steps, at, mean + half),
                final=final.mean,
                highlight=position == 1,  # AdamW comes first
            )
        )
    number = len(contenders[ADAMW].runs)
    title = f"{problem.name}: held-out loss, mean of {number} seeds with its 95% interval"
    return png(curves_figure(curves, title, f"loss after {problem.steps} steps"))
