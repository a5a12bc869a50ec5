"""Learned and baseline curves in Weights & Biases: one chart that overlays them, and one long table."""

from __future__ import annotations

import wandb
from lightning.pytorch.loggers import WandbLogger

from l2l_lightning.comparison.compare import Comparison
from l2l_lightning.comparison.report import loss_rows
from l2l_lightning.comparison.statistics import final_loss, sum_loss


def log_comparison(logger: WandbLogger, comparison: Comparison) -> None:
    """Logs a comparison to a W&B run.

    `comparison/curves` is the mean loss by step of every optimizer in one chart, `comparison/table` every
    loss (task, optimizer, seed, step, loss); final losses and sums go into the run's summary.
    """
    losses = {name: result.losses for name, result in comparison.results.items()}
    chart = wandb.plot.line_series(
        xs=list(range(comparison.horizon)),
        ys=[value.mean(dim=1).tolist() for value in losses.values()],
        keys=list(losses),
        title=f"Loss on {comparison.task}, mean of {comparison.num_optimizees} optimizees",
        xname="step",
    )
    table = wandb.Table(columns=["task", "optimizer", "seed", "step", "loss"])
    for name, value in losses.items():
        for row in loss_rows([comparison.task, name], value):
            table.add_data(*row)
    logger.experiment.log({"comparison/curves": chart, "comparison/table": table})
    for name, value in losses.items():
        logger.experiment.summary[f"comparison/{name}/final_loss"] = final_loss(value).mean
        logger.experiment.summary[f"comparison/{name}/sum_loss"] = sum_loss(value).mean
