"""The ablation that the study left undone: how gradients enter, how large updates and windows are."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from l2l_lightning.comparison.plots import heatmap_figure, png
from l2l_lightning.comparison.statistics import Interval
from l2l_lightning.reproduce.bench import Bench, Request, Run, Train
from l2l_lightning.reproduce.experiment import (
    Experiment,
    Finding,
    Outcome,
    diverged,
    final,
    loss_rows,
    summary,
)
from l2l_lightning.reproduce.recipes import ABLATION_ROLLOUTS, ABLATIONS, Ablation
from l2l_lightning.reproduce.training import Report
from l2l_lightning.tasks import MNISTMLP

CHANCE = 0.97
"""A sum of losses above this share of 100·ln 10 has learned nothing."""


class PreprocessingExperiment(Experiment):
    """Short meta-trainings on MNIST, alike but for the preprocessing, the output scale and the window."""

    name = "preprocessing"
    title = "Preprocessing × output scale × truncation: the ablation that the study left undone"
    datasets: ClassVar[set[str | None]] = {"mnist"}

    def requests(self, bench: Bench) -> list[Request]:
        """Every setting's meta-training, then its curves."""
        rules: list[Request] = [Train(ablation.name) for ablation in ABLATIONS]
        return rules + [_run(ablation, bench) for ablation in ABLATIONS]

    def outcome(self, bench: Bench, folder: Path, report: Report) -> Outcome:
        """A table and a heat map of the sums of losses."""
        losses = {ablation: bench.losses(_run(ablation, bench)) for ablation in ABLATIONS}
        sums = {ablation: Interval.of(value.double().sum(0)) for ablation, value in losses.items()}
        inputs = list(dict.fromkeys(ablation.inputs for ablation in ABLATIONS))
        columns = list(dict.fromkeys((ablation.output_scale, ablation.unroll) for ablation in ABLATIONS))
        heads = [f"output × {scale:g}, {_window(unroll)}" for scale, unroll in columns]
        by_cell = {(a.inputs, (a.output_scale, a.unroll)): a for a in ABLATIONS}
        values = [[sums[by_cell[row, column]].mean for column in columns] for row in inputs]
        picture = heatmap_figure(
            values,
            inputs,
            heads,
            f"Sum of 100 losses on MNIST after {ABLATION_ROLLOUTS} rollouts of meta-training",
            "sum of losses",
        )
        table = ["| gradients enter | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
        for row in inputs:
            cells = [str(sums[by_cell[row, column]]) for column in columns]
            table.append(f"| {row} | " + " | ".join(cells) + " |")
        rows = [
            row
            for a, value in losses.items()
            for row in loss_rows([a.preprocessing, a.factor, a.output_scale, a.unroll], value)
        ]
        results = {
            ablation.name: summary(value)
            | {
                "preprocessing": ablation.preprocessing,
                "factor": ablation.factor,
                "output_scale": ablation.output_scale,
                "unroll": ablation.unroll,
            }
            for ablation, value in losses.items()
        }
        return Outcome(
            _findings(losses, sums),
            {"rollouts": ABLATION_ROLLOUTS, "settings": results},
            ("preprocessing", "factor", "output_scale", "unroll", "seed", "step", "loss"),
            rows,
            {"preprocessing": png(picture)},
            tables=["\n".join(table)],
        )


def _window(unroll: int) -> str:
    return "whole rollout" if unroll == 100 else f"windows of {unroll}"


def _run(ablation: Ablation, bench: Bench) -> Run:
    return Run(MNISTMLP(), ablation.name, bench.steps(100), bench.count(16))


def _findings(losses: dict[Ablation, Tensor], sums: dict[Ablation, Interval]) -> list[Finding]:
    """The best of each kind, and how many of each stayed at chance or diverged."""
    findings = []
    for kind, what in (("identity", "gradients as they are, or scaled"), ("log_sign", "log and sign")):
        of_kind = [ablation for ablation in ABLATIONS if ablation.preprocessing == kind]
        best = min(of_kind, key=lambda ablation: sums[ablation].mean)
        stuck = sum(not sums[a].mean < CHANCE * float(losses[a][0].mean()) * len(losses[a]) for a in of_kind)
        lost = sum(diverged(losses[a]) > 0 for a in of_kind)
        findings.append(
            Finding(
                f"{what}: best setting",
                "as they are: at chance" if kind == "identity" else "not tried",
                "p = 10, output × 0.1" if kind == "log_sign" else "–",
                f"{best.inputs}, output × {best.output_scale:g}, {_window(best.unroll)}: sum {sums[best]}, "
                f"final {final(losses[best])}",
                f"New: {stuck} of {len(of_kind)} settings learn nothing; in {lost} some optimizee ends above "
                "where it began.",
            )
        )
    return findings
