"""The generalisation matrix: every trained rule on every kind of network, against baselines tuned for it."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from l2l_lightning.comparison.baselines import BASELINES
from l2l_lightning.comparison.plots import heatmap_figure, png
from l2l_lightning.comparison.statistics import diverged, final_loss, final_losses, paired_ratio
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome, markdown_table
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.tasks import MNISTMLP, ImageMLP

RULES = {
    "quadratics": "lstm-quadratic",
    "sigmoid": "lstm-mnist",
    "ReLU": "lstm-mnist-relu",
    "tanh": "lstm-mnist-tanh",
    "mixture": "lstm-mnist-mixture",
}
"""The rules' names, by what they were meta-trained on."""

ONE_FOR_ALL = {f"{name} (one for all)": name for name in ("nag", "adam")}
"""Baselines at the setting that is best on the reference task: a rule's fair counterpart."""

CONTENDERS = (*RULES, *ONE_FOR_ALL)

Dataset = Literal["mnist", "digits", "smiles"]
Activation = Literal["sigmoid", "relu", "tanh", "elu"]

AXES = (get_args(Dataset), get_args(Activation), (10, 20, 40, 100), (1, 2, 3), (100, 200, 1000))
"""What is crossed: data sets, activations, widths, depths and horizons."""
TRAINED_ON = ("mnist", None, 20, 1, 100)
"""The cell that the rules were trained on, whatever the activation."""
NUM_OPTIMIZEES = 6
"""The test optimizees of every cell."""
RATIO = ("ratio", "low", "high")
"""The results' names of a final loss as a multiple of the best baseline's, and of its interval."""
AIM = 1.10
"""A cell is within the aim if the rule's final loss is at most this multiple of the best baseline's."""


class Cell(NamedTuple):
    """A kind of optimizee, and for how long it is optimised."""

    dataset: Dataset
    activation: Activation
    width: int
    depth: int
    horizon: int

    @property
    def task(self) -> ImageMLP:
        """The optimizee's task; on MNIST it is of the class that the rules were trained on."""
        sizes = [self.width] * self.depth
        if self.dataset == "mnist":
            return MNISTMLP(sizes, self.activation)
        return ImageMLP(self.dataset, sizes, self.activation)

    def __str__(self) -> str:
        """Labels a row of the matrix."""
        layers = "-".join([str(self.width)] * self.depth)
        return f"{self.dataset} {self.activation} {layers} @{self.horizon}"


def cells(kind: Literal["star", "full"]) -> list[Cell]:
    """Lists the matrix's cells, sorted; "star" varies one thing at a time from 20 hidden units and 100 steps.

    Example:
        >>> len(cells("star")), len(cells("full"))
        (40, 432)
    """
    crossed = [Cell(*place) for place in itertools.product(*AXES)]
    if kind == "full":
        return crossed
    # What a cell shares with the rules' training; the activation does not count.
    return [cell for cell in crossed if sum(map(operator.eq, cell, TRAINED_ON)) >= len(cell) - 2]


def _measured(store: ResultStore) -> list[Cell]:
    chosen = [cell for cell in cells(store.settings.matrix) if cell.dataset != "smiles" or store.has_smiles]
    return [chosen[0], chosen[-1]] if store.settings.quick else chosen


def _requests(store: ResultStore) -> dict[tuple[Cell, str], Request]:
    """Lists every contender's losses, cell by cell.

    One search serves all the horizons at which a kind of optimizee is measured. What does not depend on the
    horizon runs for the longest of its kind, once; a cell reads its beginning.
    """
    requests = {}
    measured, number = _measured(store), store.count(NUM_OPTIMIZEES)
    for cell in measured:
        horizons = tuple(store.steps(other.horizon) for other in measured if other[:-1] == cell[:-1])
        longest, horizon = max(horizons), store.steps(cell.horizon)
        for label, rule in RULES.items():
            requests[cell, label] = Request(cell.task, rule, longest, number)
        for name in BASELINES:
            requests[cell, name] = Request(cell.task, name, horizon, number, "tuned", horizons)
        for label, name in ONE_FOR_ALL.items():
            requests[cell, label] = Request(cell.task, name, longest, number, "reference")
    return requests


Table = dict[Cell, dict[str, dict[str, Any]]]
"""A contender's ratio to the best tuned baseline, its interval and divergences, by cell and contender."""


def _outcome(store: ResultStore, losses: Mapping[tuple[Cell, str], Tensor], folder: Path) -> Outcome:
    """Makes the matrix as a table, a picture and numbers."""
    table: Table = {}
    rows: list[Sequence[Any]] = []
    for cell in _measured(store):
        found = {name: v[: store.steps(cell.horizon)] for (of, name), v in losses.items() if of == cell}
        table[cell] = _compare(found)
        for name, value in found.items():
            ratio = [table[cell].get(name, {}).get(key, math.nan) for key in RATIO]
            rows.append([*cell, name, *final_loss(value), *ratio, diverged(value) / value.shape[1]])
    picture = heatmap_figure(
        [[row[name]["ratio"] for name in CONTENDERS] for row in table.values()],
        [str(cell) for cell in table],
        CONTENDERS,
        "Final loss, as a multiple of the best tuned baseline's",
        "ratio",
        middle=1.0,
    )
    findings = [_finding(table, name) for name in CONTENDERS]
    if not store.has_smiles:
        how = "Not measured: give --smiles-root FOLDER."
        findings.append(Finding("GENKI-4K", "not done", "–", "not measured", how))
    results = {
        "matrix": store.settings.matrix,
        "aim": AIM,
        "cells": [
            {
                "dataset": cell.dataset,
                "activation": cell.activation,
                "hidden_sizes": [cell.width] * cell.depth,
                "horizon": cell.horizon,
                "ratios": {name: _json(entry) for name, entry in row.items()},
            }
            for cell, row in table.items()
        ],
        "within_aim": {name: _within(table, name) for name in CONTENDERS},
        "smiles": "measured" if store.has_smiles else "not measured: no copy of GENKI-4K given",
    }
    columns = (
        *("dataset", "activation", "width", "depth", "horizon", "optimizer", "final_loss", "final_low"),
        *("final_high", "ratio", "ratio_low", "ratio_high", "share_diverged"),
    )
    return Outcome(findings, results, columns, rows, {"matrix": png(picture)}, [_markdown(table)])


def _compare(losses: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Compares every contender with the tuned baseline that is best on these very optimizees."""
    best = min(BASELINES, key=lambda name: _or_infinite(final_loss(losses[name]).mean))
    return {
        name: dict(
            zip(RATIO, paired_ratio(final_losses(losses[name]), final_losses(losses[best])), strict=True)
        )
        | {
            "diverged": diverged(losses[name]),
            "num_optimizees": losses[name].shape[1],
            "best_baseline": best,
            "best_baseline_loss": final_loss(losses[best]).mean,
        }
        for name in CONTENDERS
    }


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _json(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value != value or value == math.inf else value for key, value in entry.items()}


def _reaches_aim(entry: dict[str, Any]) -> bool:
    return entry["ratio"] <= AIM and not entry["diverged"]


def _within(table: Table, name: str) -> int:
    """Counts the cells in which a contender reaches the aim and none of its runs diverged."""
    return sum(_reaches_aim(row[name]) for row in table.values())


def _finding(table: Table, name: str) -> Finding:
    entries = {cell: row[name] for cell, row in table.items()}
    lost, runs = (sum(entry[key] for entry in entries.values()) for key in ("diverged", "num_optimizees"))
    worst = max(entries, key=lambda cell: _or_infinite(entries[cell]["ratio"]))
    ahead = sum(entry["ratio"] < 1 for entry in entries.values())
    return Finding(
        f"trained on {name}" if name in RULES else name,
        "not tried",
        "–",
        f"{_within(table, name)} of {len(table)} cells within 10% of the best tuned baseline, none "
        f"diverged; ahead of it in {ahead}",
        f"New: worst {entries[worst]['ratio']:.2f} times the best baseline ({worst}); "
        f"{lost} of {runs} runs diverged.",
    )


def _markdown(table: Table) -> str:
    def text(entry: dict[str, Any]) -> str:
        value = f"{entry['ratio']:.2f} ± {(entry['high'] - entry['low']) / 2:.2f}"
        value = value if math.isfinite(entry["ratio"]) else "∞"
        value = f"**{value}**" if _reaches_aim(entry) else value
        return value + (f" [{entry['diverged']}/{entry['num_optimizees']}]" if entry["diverged"] else "")

    rows = []
    for cell, row in table.items():
        any_entry = row[CONTENDERS[0]]
        best = f"{any_entry['best_baseline']} {any_entry['best_baseline_loss']:.3f}"
        rows.append([cell, best, *(text(row[name]) for name in CONTENDERS)])
    return (
        "Final loss as a multiple of the best tuned baseline's, with its 95% interval; runs that diverged in "
        f"brackets. Bold: within 10%.\n\n{markdown_table(['cell', 'best baseline', *CONTENDERS], rows)}"
    )


GENERALISE = Experiment(
    "Generalisation: other activations, widths, depths, horizons and data, undone in the study",
    _requests,
    _outcome,
)
"""Rules × networks × horizons × data, as ratios to the best tuned baseline."""
