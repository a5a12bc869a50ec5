"""What a meta-training says while it runs: how long it will take here, how far it is, and what is good."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from l2l_lightning.progress import LINE_EVERY, Clock, duration
from l2l_lightning.training.data_module import WindowIndex, WindowLoader

FIRST_AFTER = 3.0
"""Seconds of meta-steps from which the time of the rest is estimated."""


class MetaStepBar(RichProgressBar):
    """Lightning's bar, which counts meta-steps and says so."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'meta-step':{len(self.validation_description)}}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the logger's name for the run, which the run's folder has
        return metrics


class ProgressLines(Callback):
    """Says after a few seconds how long the meta-training will take, and then, in lines, how far it is.

    The time left is that of the inner steps left (windows differ in length) and of the validations left, each
    at their mean time so far; the first meta-step, in which kernels are compiled, does not count.

    Args:
        every: Seconds from one line to the next; inf is only the first, where a bar says the rest.
        clock: The time.

    Example:
        >>> lines = ProgressLines()
        >>> lines.every
        30.0
    """

    def __init__(self, every: float = LINE_EVERY, clock: Clock = time.monotonic) -> None:
        self.every, self.clock = every, clock

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        windows: WindowLoader = pl_module.data.windows(pl_module)  # type: ignore[operator, union-attr]
        steps = trainer.accumulate_grad_batches
        count = min(int(trainer.num_training_batches), len(windows))
        if trainer.max_steps > 0:
            count = min(count, trainer.max_steps * steps)
        lengths = (windows[index].length for index in range(count))
        self._ends = [0, *itertools.accumulate(lengths)]  # inner steps up to each meta-step's end
        self._total = math.ceil(count / steps)
        self._begun: int | None = None
        self._validations, self._validating, self._least = 0, 0.0, math.inf
        self._next_line: float | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_began = self.clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and hasattr(self, "_validating"):
            self._validations += 1
            self._validating += self.clock() - self._validation_began
            self._least = min(self._least, float(trainer.callback_metrics["val/final_loss"]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: WindowIndex, batch_idx: int
    ) -> None:
        now, done = self.clock(), batch_idx + 1
        if self._begun is None:
            self._begun, self._start = done, now
            self._validated_before = self._validating
        elif self._next_line is None and now - self._start >= FIRST_AFTER:
            self._next_line = now + self.every
            self._say(trainer, self._estimate(trainer, done, now))
        elif self._next_line is not None and now >= self._next_line:
            self._next_line = now + self.every
            self._say(trainer, self._progress(trainer, done, now))

    def _say(self, trainer: Trainer, line: str) -> None:
        if trainer.is_global_zero:
            print(line, flush=True)

    def _estimate(self, trainer: Trainer, done: int, now: float) -> str:
        seconds, without = self._left(trainer, done, now)
        return f"Meta-training: {self._total:,} meta-steps, {duration(seconds)} on this machine{without}."

    def _progress(self, trainer: Trainer, done: int, now: float) -> str:
        metrics = trainer.callback_metrics
        parts = [f"meta-step {trainer.global_step:,} of {self._total:,}"]
        if "val/final_loss" in metrics:
            final, initial = float(metrics["val/final_loss"]), float(metrics["val/initial_loss"])
            parts.append(f"validation loss {final:.3g} (least {self._least:.3g}, at θ0 {initial:.3g})")
        seconds, without = self._left(trainer, done, now)
        return ", ".join([*parts, f"{duration(seconds)} left{without}"])

    def _left(self, trainer: Trainer, done: int, now: float) -> tuple[float, str]:
        """Seconds to the end of the meta-training, and what they do not count, in words."""
        assert self._begun is not None
        in_steps = now - self._start - (self._validating - self._validated_before)
        done = min(done, len(self._ends) - 1)
        inner = self._ends[done] - self._ends[self._begun]
        seconds = in_steps / max(inner, 1) * (self._ends[-1] - self._ends[done])
        interval = trainer.val_check_batch
        if not isinstance(interval, int) or not trainer.enable_validation:  # by the clock, or none
            return seconds, ""
        left = (len(self._ends) - 1) // interval - done // interval
        if self._validations:
            return seconds + left * self._validating / self._validations, ""
        return seconds, " without its validations" if left else ""
