"""A comparison in the loggers of a run: numbers in all of them, the figure where one can show it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from l2l_lightning.comparison.result import LEARNED, MEASURES, Comparison
from l2l_lightning.comparison.statistics import final_loss, sum_loss

HPARAMS_METRIC = "hp_metric"
"""What TensorBoard's HPARAMS tab compares runs by, as Lightning names it."""


def comparison_numbers(comparison: Comparison, prefix: str = "comparison") -> dict[str, float]:
    """Returns final losses, sums, and paired differences learned − other, by "prefix/optimizer/what"."""
    numbers = {}
    for name, losses in comparison.losses.items():
        numbers[f"{prefix}/{name}/final_loss"] = final_loss(losses).mean
        numbers[f"{prefix}/{name}/sum_loss"] = sum_loss(losses).mean
        if name in comparison.compared:
            for measure in MEASURES:
                difference = comparison.difference(name, measure).mean
                numbers[f"{prefix}/{name}/{comparison.reference}_minus_it/{measure}"] = difference
    return numbers


def log_comparison(
    loggers: Iterable[Logger], comparison: Comparison, step: int, prefix: str = "comparison"
) -> None:
    """Logs a comparison to loggers, but for CSVLogger: the files beside its own say the same.

    All get `comparison_numbers`; W&B also a chart of the curves and a table of every loss; W&B and
    TensorBoard the figure; TensorBoard the learned optimizer's final loss as its HPARAMS tab's metric.

    Args:
        loggers: Where to.
        comparison: What.
        step: The meta-step after which it was made.
        prefix: What the names of its parts begin with.
    """
    numbers = comparison_numbers(comparison, prefix)
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            continue
        if isinstance(logger, WandbLogger):
            # wandb is needed by those who log to it only.
            from l2l_lightning.comparison.wandb_curves import log_curves

            log_curves(logger, comparison, numbers, prefix)
            continue
        if isinstance(logger, TensorBoardLogger):
            _log_to_tensorboard(logger, comparison, numbers, step, prefix)
        else:
            logger.log_metrics(numbers, step)
            logger.save()


def _log_to_tensorboard(
    logger: TensorBoardLogger, comparison: Comparison, numbers: dict[str, float], step: int, prefix: str
) -> None:
    # The fit has closed its file. A new one is named by the second, and would write over one of that name.
    while list(Path(logger.log_dir).glob(f"*.tfevents.{int(time.time())}.*")):
        time.sleep(0.1)
    if LEARNED in comparison.results:
        numbers = numbers | {HPARAMS_METRIC: numbers[f"{prefix}/{LEARNED}/final_loss"]}
    logger.log_metrics(numbers, step)
    logger.experiment.add_figure(f"{prefix}/curves", comparison.figure(), step, close=False)
    logger.finalize("success")  # flushing alone does not wait for what is on its way to the file
