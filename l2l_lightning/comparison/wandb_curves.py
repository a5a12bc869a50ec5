"""Learned and baseline curves in Weights & Biases: one chart that overlays them, and one long table."""

from __future__ import annotations

import io
from collections.abc import Mapping

import wandb
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from l2l_lightning.comparison.curves_file import COLUMNS, loss_rows
from l2l_lightning.comparison.figures import curves_picture
from l2l_lightning.comparison.result import Comparison


def log_curves(
    logger: WandbLogger, comparison: Comparison, numbers: Mapping[str, float], prefix: str = "comparison"
) -> None:
    """Logs a comparison to a W&B run.

    `comparison/curves` is the mean loss by step of every optimizer in one chart, `comparison/figure` the same
    with intervals, `comparison/table` every loss (task, optimizer, seed, step, loss); the numbers go into the
    run's summary.
    """
    losses = comparison.losses
    chart = wandb.plot.line_series(
        xs=list(range(comparison.horizon)),
        ys=[value.mean(dim=1).tolist() for value in losses.values()],
        keys=list(losses),
        title=f"Loss on {comparison.task}, mean of {comparison.num_optimizees} optimizees",
        xname="step",
    )
    table = wandb.Table(columns=list(COLUMNS))
    for name, value in losses.items():
        for row in loss_rows([comparison.task, name], value):
            table.add_data(*row)
    picture = Image.open(io.BytesIO(curves_picture(losses, comparison.task, comparison.learned)))
    logger.experiment.log(
        {f"{prefix}/curves": chart, f"{prefix}/figure": wandb.Image(picture), f"{prefix}/table": table}
    )
    for name, number in numbers.items():
        logger.experiment.summary[name] = number
