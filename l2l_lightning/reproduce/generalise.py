"""The generalisation matrix: every trained rule on every kind of network, against baselines tuned for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

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
TRAINED_ON = ("mnist", 20, 1, 100)
"""The data set, width, depth and horizon that the rules were trained on."""
NUM_OPTIMIZEES = 6
"""The test optimizees of every cell."""
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
    everything = [Cell(*place) for place in itertools.product(*AXES)]
    return everything if kind == "full" else [cell for cell in everything if _differences(cell) <= 1]


def _differences(cell: Cell) -> int:
    """Counts the respects in which a cell is not the rules' own; the activation is none."""
    respects = (cell.dataset, cell.width, cell.depth, cell.horizon)
    return sum(ours != theirs for ours, theirs in zip(respects, TRAINED_ON, strict=True))


Entries = dict[str, dict[str, Any]]
"""A cell's results by contender: its ratio to the best tuned baseline, with the interval, and divergences."""


class GeneraliseExperiment(Experiment):
    """Rules × networks × horizons × data, as ratios to the best tuned baseline."""

    name = "generalise"
    title = "Generalisation: other activations, widths, depths, horizons and data, undone in the study"
    datasets: ClassVar[set[str | None]] = {"mnist", "digits"}

    def data(self, store: ResultStore) -> set[str | None]:
        """Names the smiles as well, if there is a copy."""
        return self.datasets | ({"smiles"} if store.has_smiles else set())

    def requests(self, store: ResultStore) -> list[Request]:
        """Lists every contender's losses, cell by cell."""
        return [request for cell in _measured(store) for request in _requests(cell, store).values()]

    def outcome(self, store: ResultStore, folder: Path) -> Outcome:
        """Makes the matrix as a table, a picture and numbers."""
        table: dict[Cell, Entries] = {}
        rows: list[Sequence[Any]] = []
        for cell in _measured(store):
            horizon, requests = store.steps(cell.horizon), _requests(cell, store)
            losses = {name: store.losses(request)[:horizon] for name, request in requests.items()}
            table[cell] = _compare(losses)
            for name, value in losses.items():
                ratio = [table[cell].get(name, {}).get(key, math.nan) for key in ("ratio", "low", "high")]
                share = diverged(value) / value.shape[1]
                rows.append([*astuple(cell), name, *final_loss(value), *ratio, share])
        picture = heatmap_figure(
            [[row[name]["ratio"] for name in CONTENDERS] for row in table.values()],
            [str(cell) for cell in table],
            CONTENDERS,
            "Final loss, as a multiple of the best tuned baseline's",
            "ratio",
            middle=1.0,
        )
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
        findings = [_finding(table, name) for name in CONTENDERS]
        if not store.has_smiles:
            how = "Not measured: give --smiles-root FOLDER."
            findings.append(Finding("GENKI-4K", "not done", "–", "not measured", how))
        pictures = {"matrix": png(picture)}
        return Outcome(findings, results, columns, rows, pictures, tables=[_markdown(table)])


def _measured(store: ResultStore) -> list[Cell]:
    chosen = [cell for cell in cells(store.settings.matrix) if cell.dataset != "smiles" or store.has_smiles]
    return [chosen[0], chosen[-1]] if store.settings.quick else chosen


def _requests(cell: Cell, store: ResultStore) -> dict[str, Request]:
    """Lists the losses of every contender in a cell, by the contender's name.

    One search serves all the horizons at which a kind of optimizee is measured. What does not depend on the
    horizon runs for the longest of its kind, once; a cell reads its beginning.
    """
    task, number, horizon = cell.task, store.count(NUM_OPTIMIZEES), store.steps(cell.horizon)
    kind = [other for other in _measured(store) if astuple(other)[:-1] == astuple(cell)[:-1]]
    horizons = tuple(store.steps(other.horizon) for other in kind)
    longest = max(horizons)
    requests = {name: Request(task, rule, longest, number) for name, rule in RULES.items()}
    requests |= {name: Request(task, name, horizon, number, "tuned", horizons) for name in BASELINES}
    return requests | {
        label: Request(task, name, longest, number, "reference") for label, name in ONE_FOR_ALL.items()
    }


def _compare(losses: dict[str, Tensor]) -> Entries:
    """Compares every contender with the tuned baseline that is best on these very optimizees."""
    best = min(BASELINES, key=lambda name: _or_infinite(final_loss(losses[name]).mean))
    entries = {}
    for name in CONTENDERS:
        ratio = paired_ratio(final_losses(losses[name]), final_losses(losses[best]))
        entries[name] = {
            "ratio": ratio.mean,
            "low": ratio.low,
            "high": ratio.high,
            "diverged": diverged(losses[name]),
            "num_optimizees": losses[name].shape[1],
            "best_baseline": best,
            "best_baseline_loss": final_loss(losses[best]).mean,
        }
    return entries


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _json(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }


def _reaches_aim(entry: dict[str, Any]) -> bool:
    return entry["ratio"] <= AIM and not entry["diverged"]


def _within(table: dict[Cell, Entries], name: str) -> int:
    """Counts the cells in which a contender reaches the aim and none of its runs diverged."""
    return sum(_reaches_aim(row[name]) for row in table.values())


def _finding(table: dict[Cell, Entries], name: str) -> Finding:
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


def _markdown(table: dict[Cell, Entries]) -> str:
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
