"""Makes the rules, cards and tuned baselines that ship with the package, from a complete reproduction.

    python -m l2l_lightning reproduce all --data-root FOLDER
    python benchmarks/make_pretrained.py reproduction --data-root FOLDER

Every figure of a card is read from the reproduction's results, but for those on the images that the package
ships and at a gradient of zero, which tests repeat: they are measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from l2l_lightning import LearnedOptimizer, Optimizees, pretrained, run_rule
from l2l_lightning.class_paths import class_config
from l2l_lightning.comparison.baselines import BASELINES, TunedBaseline
from l2l_lightning.comparison.statistics import final_loss, sum_loss, summary
from l2l_lightning.data import load_images
from l2l_lightning.files import write_json
from l2l_lightning.provenance import commit
from l2l_lightning.reproduce import result_store
from l2l_lightning.reproduce.command import EXPERIMENTS
from l2l_lightning.reproduce.experiment import Experiment
from l2l_lightning.reproduce.generalise import AIM, RULES
from l2l_lightning.reproduce.recipes import ABLATIONS, RECIPES, SNAPSHOTS
from l2l_lightning.reproduce.result_store import Request, ResultStore, tuning_key
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.rules import UpdateRule
from l2l_lightning.tasks import MNISTMLP, NoisyScaledSquare, Quadratic
from l2l_lightning.tasks.base import Task

HEADLINES: dict[str, Task] = {
    "lstm-quadratic": Quadratic(),
    "lstm-study-quadratic": NoisyScaledSquare(),
    "lstm-mnist": MNISTMLP(),
    "lstm-mnist-relu": MNISTMLP([20], "relu"),
    "lstm-mnist-tanh": MNISTMLP([20], "tanh"),
    "lstm-mnist-activations": MNISTMLP(),
    "lstm-mnist-mixture": MNISTMLP(),
}
"""What each rule's headline is measured on, over 100 steps."""

EXPERIMENT_RULES = ["lstm-art", *SNAPSHOTS, *(ablation.name for ablation in ABLATIONS)]
"""Rules that an experiment needs and nobody else: no cards."""


def measure(rule: UpdateRule, task: Task, num_optimizees: int = 32) -> dict[str, Any]:
    """Final loss and sum of 100 losses on test optimizees of seed 0, with the images of the package."""
    images = None if task.dataset is None else load_images(task.dataset).test
    losses = run_rule(rule, Optimizees(task, images, 0, "test", range(num_optimizees)), 100)
    return {
        "task": class_config(task),
        "data": "none (synthetic task)" if images is None else images.source,
        "seed": 0,
        "num_optimizees": num_optimizees,
        "horizon": 100,
        "final_loss": final_loss(losses).as_json(),
        "sum_of_losses": sum_loss(losses).as_json(),
    }


def headline(store: ResultStore, name: str) -> dict[str, Any]:
    """A rule and the tuned baselines on what it is for, on all of the data."""
    task = HEADLINES[name]
    number = 128 if task.dataset is None else store.settings.num_optimizees
    requests = {"learned": Request(task, name, 100, number)}
    requests |= {baseline: Request(task, baseline, 100, number) for baseline in BASELINES}
    optimizers = {}
    for label, request in requests.items():
        optimizers[label] = summary(store.losses(request)) | {"num_optimizees": number}
        if label in BASELINES:
            tuned = store.baseline(request)
            optimizers[label] |= {"learning_rate": tuned.learning_rate, "setting": tuned.setting}
    curve = store.losses(requests["learned"]).double().mean(1)
    return {
        "task": task.describe(),
        "data": store.source(task.dataset),
        "horizon": 100,
        "seed": store.settings.seed,
        "optimizers": optimizers,
        "learning_curve": [round(loss, 5) for loss in curve.tolist()],
    }


def matrix(out: Path, name: str) -> list[dict[str, Any]]:
    """A rule's row of the generalisation matrix, [] if it is not in it."""
    labels = {rule: label for label, rule in RULES.items()}
    if name not in labels:
        return []
    cells = json.loads((out / "generalise/results.json").read_text(encoding="utf-8"))["results"]["cells"]
    rows = []
    for cell in cells:
        entry = cell["ratios"][labels[name]]
        place = {key: cell[key] for key in ("dataset", "activation", "hidden_sizes", "horizon")}
        keys = ("ratio", "low", "high", "diverged", "num_optimizees", "best_baseline")
        rows.append(place | {key: entry[key] for key in keys})
    return rows


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """The cells in which a rule is more than 10% behind the best tuned baseline, the worst first."""
    behind = [row for row in rows if row["ratio"] is None or row["ratio"] > AIM or row["diverged"]]
    behind.sort(key=lambda row: -(row["ratio"] or float("inf")))
    return [
        f"{row['dataset']}, {row['activation']}, hidden {row['hidden_sizes']}, {row['horizon']} steps: "
        + (
            "not finite"
            if row["ratio"] is None
            else f"{row['ratio']:.2f} times {row['best_baseline']}'s loss"
        )
        + (f", {row['diverged']} of {row['num_optimizees']} diverged" if row["diverged"] else "")
        for row in behind
    ]


def drift(rule: UpdateRule, steps: int = 1000) -> float:
    """Where LearnedOptimizer takes a float32 parameter from 0 while its gradient is exactly zero."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = LearnedOptimizer([parameter], rule, total_steps=steps)
    for _ in range(steps):
        optimizer.step()
    return parameter.item()


def drift_failure(theta: float) -> str:
    """The known failure that `drift` measures, in words: the update settles at a constant, which is not 0."""
    return (
        "gradient exactly zero (padding_idx rows, embedding rows outside a minibatch, dead units): "
        f"a parameter moves from 0 to {theta:+#.3g} in 1,000 steps, and on without bound"
    )


def unmoved() -> str:
    """What a card says of a rule that stays where no gradient was, in place of `drift_failure`."""
    return "none known of gradients that are exactly zero: a parameter stays at 0 in 1,000 steps"


def tuned_table(store: ResultStore, experiments: Iterable[Experiment]) -> dict[str, list[dict[str, Any]]]:
    """Every search that experiments asked for: the setting chosen, without all that was tried."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for experiment in experiments:
        for request in experiment.requests(store).values():
            if request.optimizer in BASELINES and request.tuning == "tuned":
                task, name = request.tuned_on or request.task, request.optimizer
                for horizon, found in store.tuned(task, request.searched, [name]).items():
                    row = TunedBaseline(found[name].baseline, found[name].learning_rate, found[name].setting)
                    table.setdefault(tuning_key(task, horizon), {})[name] = row.as_json()
    return {key: list(rows.values()) for key, rows in table.items()}


def main() -> None:
    """Writes weights, cards and tuned baselines into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("reproduction", help="its --out folder")
    parser.add_argument("--data-root", required=True, help="folder of all of MNIST")
    args = parser.parse_args()
    store = ResultStore(Settings(out=args.reproduction, data_root=args.data_root))
    package = Path(pretrained.__file__).parent
    for name, task in HEADLINES.items():
        rule = store.rule(name)
        training = json.loads((store.rule_folder(name) / "training.json").read_text(encoding="utf-8"))
        rows = matrix(store.out, name)
        card = {
            "rule": {"class": type(rule).__name__, **rule.config()},
            "meta_training": training
            | {"data": store.source(task.dataset), "start_from": RECIPES[name].start},
            "headline": headline(store, name),
            "repeatable": measure(rule, task),
            "known_failures": [*failures(rows), drift_failure(drift(rule))],
            "generalisation": rows,
            "measured_at": commit(),
        }
        pretrained.save(rule, package / f"{name}.safetensors")
        write_json(package / f"{name}.json", card)
    for name in EXPERIMENT_RULES:
        pretrained.save(store.rule(name), package / "experiments" / f"{name}.safetensors")
    document = {
        "data": store.source("mnist"),
        "seed": store.settings.seed,
        "num_tuning_optimizees": store.settings.num_tuning_optimizees,
        "commit": commit(),
        "searches": tuned_table(store, (one for one in EXPERIMENTS.values() if one.in_all)),
    }
    write_json(Path(result_store.__file__).parent / result_store.SHIPPED_TUNING, document)


if __name__ == "__main__":
    main()
