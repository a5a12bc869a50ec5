"""The ablation that the study left undone: how gradients enter, how large updates and windows are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from l2l_lightning.comparison.plots import heatmap_figure, png
from l2l_lightning.comparison.report import loss_rows
from l2l_lightning.comparison.statistics import Interval, diverged, final_loss, sum_loss, summary
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome, markdown_table
from l2l_lightning.reproduce.recipes import ABLATION_ROLLOUTS, ABLATIONS, Ablation
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.tasks import MNISTMLP

CHANCE = 0.97
"""A sum of losses above this share of 100·ln 10 has learned nothing."""


class PreprocessingExperiment(Experiment):
    """Short meta-trainings on MNIST, alike but for the preprocessing, the output scale and the window."""

    name = "preprocessing"
    title = "Preprocessing × output scale × truncation: the ablation that the study left undone"

    def requests(self, store: ResultStore) -> list[Request]:
        """Lists the losses of every setting's rule."""
        horizon, number = store.steps(100), store.count(16)
        return [Request(MNISTMLP(), ablation.name, horizon, number) for ablation in ABLATIONS]

    def outcome(self, store: ResultStore, folder: Path) -> Outcome:
        """Makes a table and a heat map of the sums of losses."""
        losses = dict(zip(ABLATIONS, map(store.losses, self.requests(store)), strict=True))
        sums = {ablation: sum_loss(value) for ablation, value in losses.items()}
        inputs = list(dict.fromkeys(ablation.inputs for ablation in ABLATIONS))
        columns = list(dict.fromkeys((ablation.output_scale, ablation.unroll) for ablation in ABLATIONS))
        heads = [f"output × {scale:g}, {_window(unroll)}" for scale, unroll in columns]
        by_cell = {(a.inputs, (a.output_scale, a.unroll)): sums[a] for a in ABLATIONS}
        table = [[by_cell[row, column] for column in columns] for row in inputs]
        picture = heatmap_figure(
            [[cell.mean for cell in row] for row in table],
            inputs,
            heads,
            f"Sum of 100 losses on MNIST after {ABLATION_ROLLOUTS} rollouts of meta-training",
            "sum of losses",
        )
        settings = {
            a.name: summary(value) | {"num_optimizees": value.shape[1]} | asdict(a)
            for a, value in losses.items()
        }
        named_rows = ([name, *row] for name, row in zip(inputs, table, strict=True))
        return Outcome(
            _findings(losses, sums),
            {"rollouts": ABLATION_ROLLOUTS, "settings": settings},
            ("preprocessing", "factor", "output_scale", "unroll", "seed", "step", "loss"),
            [row for a, value in losses.items() for row in loss_rows(list(asdict(a).values()), value)],
            {"preprocessing": png(picture)},
            tables=[markdown_table(["gradients enter", *heads], named_rows)],
        )


def _window(unroll: int) -> str:
    return "whole rollout" if unroll == 100 else f"windows of {unroll}"


def _findings(losses: dict[Ablation, Tensor], sums: dict[Ablation, Interval]) -> list[Finding]:
    """Names the best of each kind, and counts those of each that stayed at chance or diverged."""
    findings = []
    for kind, what, study, paper in (
        ("identity", "gradients as they are, or scaled", "as they are: at chance", "–"),
        ("log_sign", "log and sign", "not tried", "p = 10, output × 0.1"),
    ):
        of_kind = [ablation for ablation in ABLATIONS if ablation.preprocessing == kind]
        best = min(of_kind, key=lambda ablation: sums[ablation].mean)
        stuck = sum(not sums[a].mean < CHANCE * float(losses[a][0].mean()) * len(losses[a]) for a in of_kind)
        lost = sum(diverged(losses[a]) > 0 for a in of_kind)
        findings.append(
            Finding(
                f"{what}: best setting",
                study,
                paper,
                f"{best.inputs}, output × {best.output_scale:g}, {_window(best.unroll)}: sum {sums[best]}, "
                f"final {final_loss(losses[best])}",
                f"New: {stuck} of {len(of_kind)} settings learn nothing; in {lost} some optimizee ends above "
                "where it began.",
            )
        )
    return findings
