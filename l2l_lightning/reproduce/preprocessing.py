"""The ablation that the study left undone: how gradients enter, how large updates and windows are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from l2l_lightning.comparison.curves_file import loss_rows
from l2l_lightning.comparison.plots import heatmap_figure, png
from l2l_lightning.comparison.statistics import diverged, final_loss, sum_loss, summary
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome, markdown_table
from l2l_lightning.reproduce.recipes import ABLATION_ROLLOUTS, ABLATIONS, Ablation
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.tasks import MNISTMLP

CHANCE = 0.97
"""A sum of losses above this share of 100·ln 10 has learned nothing."""


def _requests(store: ResultStore) -> dict[Ablation, Request]:
    horizon, number = store.steps(100), store.count(16)
    return {ablation: Request(MNISTMLP(), ablation.name, horizon, number) for ablation in ABLATIONS}


def _outcome(store: ResultStore, losses: Mapping[Ablation, Tensor], folder: Path) -> Outcome:
    """Makes a table and a heat map of the sums of losses."""
    inputs = list(dict.fromkeys(ablation.inputs for ablation in ABLATIONS))
    heads = list(dict.fromkeys(ablation.column for ablation in ABLATIONS))
    sums = {(ablation.inputs, ablation.column): sum_loss(losses[ablation]) for ablation in ABLATIONS}
    picture = heatmap_figure(
        [[sums[row, column].mean for column in heads] for row in inputs],
        inputs,
        heads,
        f"Sum of 100 losses on MNIST after {ABLATION_ROLLOUTS} rollouts of meta-training",
        "sum of losses",
    )
    settings = {
        a.name: summary(value) | {"num_optimizees": value.shape[1]} | asdict(a) for a, value in losses.items()
    }
    return Outcome(
        [
            _finding(losses, "identity", "gradients as they are, or scaled", "as they are: at chance", "–"),
            _finding(losses, "log_sign", "log and sign", "not tried", "p = 10, output × 0.1"),
        ],
        {"rollouts": ABLATION_ROLLOUTS, "settings": settings},
        ("preprocessing", "factor", "output_scale", "unroll", "seed", "step", "loss"),
        [row for a, value in losses.items() for row in loss_rows(list(asdict(a).values()), value)],
        {"preprocessing": png(picture)},
        [
            markdown_table(
                ["gradients enter", *heads],
                [[row, *(sums[row, column] for column in heads)] for row in inputs],
            )
        ],
    )


def _finding(losses: Mapping[Ablation, Tensor], kind: str, what: str, study: str, paper: str) -> Finding:
    """Names the best of a kind, and counts those that stayed at chance or diverged."""
    found = {a: value for a, value in losses.items() if a.preprocessing == kind}
    best = min(found, key=lambda a: sum_loss(found[a]).mean)
    stuck = sum(not sum_loss(v).mean < CHANCE * float(v[0].mean()) * len(v) for v in found.values())
    lost = sum(diverged(value) > 0 for value in found.values())
    return Finding(
        f"{what}: best setting",
        study,
        paper,
        f"{best.inputs}, {best.column}: sum {sum_loss(found[best])}, final {final_loss(found[best])}",
        f"New: {stuck} of {len(found)} settings learn nothing; in {lost} some optimizee ends above where it "
        "began.",
    )


PREPROCESSING = Experiment(
    "Preprocessing × output scale × truncation: the ablation that the study left undone", _requests, _outcome
)
"""Short meta-trainings on MNIST, alike but for the preprocessing, the output scale and the window."""
