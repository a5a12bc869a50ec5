"""Learned and baseline curves in Weights & Biases: one chart that overlays them, and one long table."""

from __future__ import annotations

import wandb
from lightning.pytorch.loggers import WandbLogger

from l2l_lightning.comparison.compare import Comparison


def log_comparison(logger: WandbLogger, comparison: Comparison) -> None:
    """Logs a comparison to a W&B run.

    `comparison/curves` is the mean loss by step of every optimizer in one chart, `comparison/table` every
    loss (task, optimizer, seed, step, loss); final losses and sums go into the run's summary.
    """
    names = list(comparison.results)
    means = [result.losses.mean(dim=1).tolist() for result in comparison.results.values()]
    chart = wandb.plot.line_series(
        xs=list(range(comparison.horizon)),
        ys=means,
        keys=names,
        title=f"Loss on {comparison.task}, mean of {comparison.num_optimizees} optimizees",
        xname="step",
    )
    table = wandb.Table(columns=["task", "optimizer", "seed", "step", "loss"])
    for name, result in comparison.results.items():
        for index, losses in enumerate(result.losses.T.tolist()):
            for step, loss in enumerate(losses):
                table.add_data(comparison.task, name, index, step, loss)
    experiment = logger.experiment
    experiment.log({"comparison/curves": chart, "comparison/table": table})
    for name, result in comparison.results.items():
        experiment.summary[f"comparison/{name}/final_loss"] = result.final_loss.mean
        experiment.summary[f"comparison/{name}/sum_loss"] = result.sum_loss.mean
