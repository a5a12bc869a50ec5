"""How far a meta-training has come: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from l2l_lightning.progress import ProgressLines, duration


def progress_text(trainer: Trainer) -> str:
    """Returns the meta-step that a run is at, and its newest validation beside what chance is.

    Example: "meta-step 600 of 2,000, validation loss 0.412 (2.31 before the first inner step)".
    """
    text = f"meta-step {trainer.global_step:,} of {int(trainer.estimated_stepping_batches):,}"
    final, initial = (trainer.callback_metrics.get(f"val/{name}_loss") for name in ("final", "initial"))
    if final is None or initial is None:
        return text
    return f"{text}, validation loss {float(final):.3g} ({float(initial):.3g} before the first inner step)"


class MetaStepBar(RichProgressBar):
    """Lightning's bar, which says that what it counts are meta-steps, a window of inner steps each."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "meta-steps".ljust(len(self.validation_description))


class MetaStepLines(Callback):
    """Prints a line soon after a run's start, and then every 30 seconds: for output that is no terminal.

    It says the meta-step, the newest validation, and how long the rest takes here at the rate so far.

    Args:
        clock: Tells the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines = ProgressLines(clock=clock)
        self._first = 0

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lines, self._first = ProgressLines(clock=self._clock), trainer.global_step

    @rank_zero_only
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # Of a run that goes on, the rate is that of the steps since.
        done = trainer.global_step - self._first
        total = int(trainer.estimated_stepping_batches) - self._first
        self._lines.report(lambda: progress_text(trainer), done, total)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print(f"{progress_text(trainer)}, in {duration(self._lines.seconds)}", flush=True)
