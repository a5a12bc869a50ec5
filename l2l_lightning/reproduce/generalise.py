"""The generalisation matrix: every trained rule on every kind of network, against baselines tuned for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from l2l_lightning.comparison.baselines import BASELINES
from l2l_lightning.comparison.plots import heatmap_figure, png
from l2l_lightning.reproduce.bench import Bench, Request, Run, Train, Tune
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome, diverged, final, ratio
from l2l_lightning.reproduce.training import Report
from l2l_lightning.tasks import MNISTMLP, ImageMLP

RULES = {
    "quadratics": "lstm-quadratic",
    "sigmoid": "lstm-mnist",
    "ReLU": "lstm-mnist-relu",
    "tanh": "lstm-mnist-tanh",
    "mixture": "lstm-mnist-mixture",
}
"""What each was meta-trained on, and its name."""

Dataset = Literal["mnist", "digits", "smiles"]
Activation = Literal["sigmoid", "relu", "tanh", "elu"]

ACTIVATIONS: tuple[Activation, ...] = ("sigmoid", "relu", "tanh", "elu")
WIDTHS = (10, 20, 40, 100)
DEPTHS = (1, 2, 3)
HORIZONS = (100, 200, 1000)
DATASETS: tuple[Dataset, ...] = ("mnist", "digits", "smiles")
BASE_WIDTH, BASE_DEPTH, BASE_HORIZON = 20, 1, 100
NUM_OPTIMIZEES = 6
"""Of every cell."""
AIM = 1.10
"""A cell is within the aim if the rule's final loss is at most this multiple of the best baseline's."""


@dataclass(frozen=True)
class Cell:
    """A kind of optimizee, and for how long it is optimised."""

    dataset: Dataset
    activation: Activation
    width: int
    depth: int
    horizon: int

    @property
    def task(self) -> ImageMLP:
        """The optimizee; on MNIST the class that the rules were trained on."""
        sizes = [self.width] * self.depth
        if self.dataset == "mnist":
            return MNISTMLP(sizes, self.activation)
        return ImageMLP(self.dataset, sizes, self.activation)

    def __str__(self) -> str:
        """What a row of the matrix is labelled with."""
        layers = "-".join([str(self.width)] * self.depth)
        return f"{self.dataset} {self.activation} {layers} @{self.horizon}"


def cells(kind: Literal["star", "full"]) -> list[Cell]:
    """The matrix's cells, sorted; "star" varies one thing at a time from 20 hidden units and 100 steps.

    Example:
        >>> len(cells("star")), len(cells("full"))
        (40, 432)
    """
    axes = itertools.product(DATASETS, ACTIVATIONS, WIDTHS, DEPTHS, HORIZONS)
    everything = [Cell(*place) for place in axes]
    if kind == "full":
        return everything
    return [cell for cell in everything if _differences(cell) <= 1]


def _differences(cell: Cell) -> int:
    """In how many respects a cell is not the one that rules are trained on; the activation is none."""
    respects = (
        cell.dataset != "mnist",
        cell.width != BASE_WIDTH,
        cell.depth != BASE_DEPTH,
        cell.horizon != BASE_HORIZON,
    )
    return sum(respects)


class GeneraliseExperiment(Experiment):
    """Rules × networks × horizons × data, as ratios to the best tuned baseline."""

    name = "generalise"
    title = "Generalisation: other activations, widths, depths, horizons and data, undone in the study"
    datasets: ClassVar[set[str | None]] = {"mnist", "digits"}

    def data(self, bench: Bench) -> set[str | None]:
        """The smiles as well, if there is a copy."""
        return self.datasets | ({"smiles"} if bench.has_smiles else set())

    def requests(self, bench: Bench) -> list[Request]:
        """Rules, then cell by cell the search and the runs."""
        requests: list[Request] = [Train(rule) for rule in RULES.values()]
        for cell in _measured(bench):
            requests.append(_tuning(cell, bench))
            requests += _runs(cell, bench).values()
        return requests

    def outcome(self, bench: Bench, folder: Path, report: Report) -> Outcome:
        """The matrix as a table, a picture and numbers."""
        measured = _measured(bench)
        table: dict[Cell, dict[str, dict[str, Any]]] = {}
        rows: list[Sequence[Any]] = []
        for cell in measured:
            horizon = bench.steps(cell.horizon)
            losses = {name: bench.losses(run)[:horizon] for name, run in _runs(cell, bench).items()}
            table[cell] = _compare(losses)
            for name, value in losses.items():
                entry = table[cell].get(name, {})
                rows.append(
                    [
                        *(cell.dataset, cell.activation, cell.width, cell.depth, cell.horizon, name),
                        final(value).mean,
                        *final(value)[1:],
                        entry.get("ratio", math.nan),
                        entry.get("low", math.nan),
                        entry.get("high", math.nan),
                        diverged(value) / value.shape[1],
                    ]
                )
        contenders = [*RULES, *ONE_FOR_ALL]
        picture = heatmap_figure(
            [[table[cell][name]["ratio"] for name in contenders] for cell in measured],
            [str(cell) for cell in measured],
            contenders,
            "Final loss, as a multiple of the best tuned baseline's",
            "ratio",
            middle=1.0,
        )
        results = {
            "matrix": bench.settings.matrix,
            "aim": AIM,
            "cells": [
                {
                    "dataset": cell.dataset,
                    "activation": cell.activation,
                    "hidden_sizes": [cell.width] * cell.depth,
                    "horizon": cell.horizon,
                    "ratios": {name: _json(entry) for name, entry in table[cell].items()},
                }
                for cell in measured
            ],
            "within_aim": {name: _within(table, name) for name in contenders},
            "smiles": "measured" if bench.has_smiles else "not measured: no copy of GENKI-4K given",
        }
        columns = (
            *("dataset", "activation", "width", "depth", "horizon", "optimizer", "final_loss", "final_low"),
            *("final_high", "ratio", "ratio_low", "ratio_high", "share_diverged"),
        )
        return Outcome(
            _findings(table, bench),
            results,
            columns,
            rows,
            {"matrix": png(picture)},
            tables=[_markdown(table, contenders)],
        )


ONE_FOR_ALL = {f"{name} (one for all)": name for name in ("nag", "adam")}
"""Baselines at the setting that is best on the reference task: a rule's fair counterpart."""


def _measured(bench: Bench) -> list[Cell]:
    chosen = [cell for cell in cells(bench.settings.matrix) if cell.dataset != "smiles" or bench.has_smiles]
    return [chosen[0], chosen[-1]] if bench.settings.quick else chosen


def _horizons(cell: Cell, bench: Bench) -> tuple[int, ...]:
    """The horizons at which a kind of optimizee is measured: one search serves them all."""
    kind = (cell.dataset, cell.activation, cell.width, cell.depth)
    return tuple(
        bench.steps(other.horizon)
        for other in _measured(bench)
        if (other.dataset, other.activation, other.width, other.depth) == kind
    )


def _tuning(cell: Cell, bench: Bench) -> Tune:
    return Tune(cell.task, _horizons(cell, bench))


def _runs(cell: Cell, bench: Bench) -> dict[str, Run]:
    """Every contender's run of a cell, by name: rules, tuned baselines, baselines with one setting for all.

    What does not depend on the horizon runs for the longest of its kind, once; a cell reads its beginning.
    """
    task, number, horizons = cell.task, bench.count(NUM_OPTIMIZEES), _horizons(cell, bench)
    longest, horizon = max(horizons), bench.steps(cell.horizon)
    runs = {name: Run(task, rule, longest, number) for name, rule in RULES.items()}
    runs |= {name: Run(task, name, horizon, number, "tuned", horizons) for name in BASELINES}
    return runs | {
        label: Run(task, name, longest, number, "reference") for label, name in ONE_FOR_ALL.items()
    }


def _compare(losses: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Every contender's ratio to the best tuned baseline: the best on these very optimizees."""
    best = min(BASELINES, key=lambda name: _or_infinite(final(losses[name]).mean))
    entries = {}
    for name in (*RULES, *ONE_FOR_ALL):
        value = ratio(losses[name], losses[best])
        entries[name] = {
            "ratio": value.mean,
            "low": value.low,
            "high": value.high,
            "diverged": diverged(losses[name]),
            "num_optimizees": losses[name].shape[1],
            "best_baseline": best,
            "best_baseline_loss": final(losses[best]).mean,
        }
    return entries


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _json(entry: dict[str, Any]) -> dict[str, Any]:
    """Null for what is not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }


def _within(table: dict[Cell, dict[str, dict[str, Any]]], name: str) -> int:
    """In how many cells a contender reaches the aim, none of its runs diverged."""
    entries = [row[name] for row in table.values()]
    return sum(entry["ratio"] <= AIM and not entry["diverged"] for entry in entries)


def _findings(table: dict[Cell, dict[str, dict[str, Any]]], bench: Bench) -> list[Finding]:
    findings = []
    for name in (*RULES, *ONE_FOR_ALL):
        entries = [row[name] for row in table.values()]
        lost = sum(entry["diverged"] for entry in entries)
        runs = sum(entry["num_optimizees"] for entry in entries)
        worst_cell = max(table, key=lambda cell: _or_infinite(table[cell][name]["ratio"]))
        ahead = sum(entry["ratio"] < 1 for entry in entries)
        what = f"trained on {name}" if name in RULES else name
        findings.append(
            Finding(
                what,
                "not tried",
                "–",
                f"{_within(table, name)} of {len(table)} cells within 10% of the best tuned baseline, none "
                f"diverged; ahead of it in {ahead}",
                f"New: worst {table[worst_cell][name]['ratio']:.2f} times the best baseline ({worst_cell}); "
                f"{lost} of {runs} runs diverged.",
            )
        )
    if not bench.has_smiles:
        findings.append(
            Finding("GENKI-4K", "not done", "–", "not measured", "Not measured: give --smiles-root FOLDER.")
        )
    return findings


def _markdown(table: dict[Cell, dict[str, dict[str, Any]]], contenders: Iterable[str]) -> str:
    names = list(contenders)
    lines = [
        "Final loss as a multiple of the best tuned baseline's, with its 95% interval; runs that diverged in "
        "brackets. Bold: within 10%.",
        "",
        "| cell | best baseline | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for cell, row in table.items():
        first = row[names[0]]
        texts = [f"{cell}", f"{first['best_baseline']} {first['best_baseline_loss']:.3f}"]
        for name in names:
            entry = row[name]
            text = f"{entry['ratio']:.2f} ± {(entry['high'] - entry['low']) / 2:.2f}"
            if not math.isfinite(entry["ratio"]):
                text = "∞"
            if entry["ratio"] <= AIM and not entry["diverged"]:
                text = f"**{text}**"
            if entry["diverged"]:
                text += f" [{entry['diverged']}/{entry['num_optimizees']}]"
            texts.append(text)
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)
