"""The newest checkpoint of a run: what it goes on from after a kill, a Ctrl-C or a preemption."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from l2l_lightning.checks import check_whole_numbers
from l2l_lightning.errors import RunStoppedError
from l2l_lightning.program import program
from l2l_lightning.training.data_settings import named_code
from l2l_lightning.training.meta_learner import MetaLearner
from l2l_lightning.training.metrics_log import MetricsLog
from l2l_lightning.trust import foreign_modules

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LatestCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, the run's newest checkpoint, and ends a run cleanly when a signal asks for it.

    Going on from it gives the same φ, bit for bit, and the same logs as a run that was never interrupted,
    wherever it was cut. For that a checkpoint is first written under another name, and takes the old one's
    place when everything that was logged up to it is on the disk; the old one is whole until then.

    SIGINT (Ctrl-C), SIGTERM (preemption) and SLURM's signal to requeue take effect after the meta-step in
    progress, on all processes after the same one; the first two raise RunStoppedError. Ctrl-C acts at once if
    the run is being stopped already. A signal that the process was started to ignore stays ignored.

    Args:
        every_n_meta_steps: Meta-steps from one to the next: what a kill can cost at most.
        dirpath: Its folder, in the run's folder unless it is absolute; None is "checkpoints".

    Raises:
        ValueError: every_n_meta_steps < 1.
    """

    def __init__(self, every_n_meta_steps: int = 50, dirpath: str | None = None) -> None:
        check_whole_numbers(1, 10**9, **{"latest.every_n_meta_steps": every_n_meta_steps})
        self.every_n_meta_steps = every_n_meta_steps
        self.path = self._given_path = Path(dirpath or "checkpoints") / "last.ckpt"
        self._saved_step = self._step_before = 0
        self._is_new = False
        self._received = self._agreed = 0  # signals: this process's, and that of all
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.path = trainer.strategy.broadcast(Path(trainer.default_root_dir) / self._given_path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLog):
                logger.go_on_from(trainer.global_step)
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*STOP_SIGNALS, *_requeue_signals(trainer)):
            # Whoever started the process to ignore a signal (nohup, a script's `&`) wants that; one whose
            # handler is not Python's (None) could not be given back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers[number] = signal.signal(number, self._receive)

    @property
    def _new_path(self) -> Path:
        return self.path.with_suffix(".new")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received in STOP_SIGNALS:
            # A second SIGTERM is common, to the process and to its group, and asks for nothing else.
            if number == signal.SIGINT:
                self._give_signals_back()
                raise KeyboardInterrupt
            return
        self._received = number
        if number in STOP_SIGNALS:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nStopping after this meta-step; Ctrl-C stops at once.\n")

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Now what was logged up to the last meta-step is complete.
        self._put_in_place_and_stop(trainer)
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_whole(trainer):
            self._agreed = self._agree(trainer)
        validates = trainer.should_stop or (batch_idx + 1) % (trainer.val_check_batch or math.inf) == 0
        if not (validates and trainer.enable_validation):
            self._write_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A comparison is not begun if a signal has come.
        received = self._agree(trainer)
        if received in STOP_SIGNALS:  # since the last meta-step
            self._agreed = received
        self._write_if_due(trainer)
        self._put_in_place_and_stop(trainer)
        # Before Lightning gives back its own: the other way round, its handlers would outlive the run.
        self._give_signals_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_signals_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_signals_back()
        if not trainer.is_global_zero:
            return
        self._new_path.unlink(missing_ok=True)
        if self.path.is_file() and not isinstance(exception, RunStoppedError):
            rank_zero_info(f"The run's newest checkpoint, to go on from: {self.command(pl_module)}")

    def command(self, model: LightningModule) -> str:
        """What goes on from the newest checkpoint."""
        options = getattr(model.trainer, "options", {}).get("trainer", {})
        named = [options.get("logger"), options.get("callbacks")]
        if isinstance(model, MetaLearner):
            settings = model.settings()
            named += [settings["task"], settings["rule"], named_code(model.data.settings())]
        modules = foreign_modules(named)
        trust = f" --trust {','.join(modules)}" if modules else ""
        return f"{program()} fit --ckpt_path {self.path}{trust}"

    def _is_whole(self, trainer: Trainer) -> bool:
        # A gradient that is being accumulated would not be saved.
        return trainer.global_step > self._step_before

    def _agree(self, trainer: Trainer) -> int:
        """The signal that any of the processes has received: all stop after the same meta-step."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received)

    def _write_if_due(self, trainer: Trainer) -> None:
        if not self._is_whole(trainer):
            return
        since = trainer.global_step - self._saved_step
        ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        due = since >= self.every_n_meta_steps or ends or self._agreed
        if not (since and due):
            return
        trainer.save_checkpoint(self._new_path, weights_only=False)
        self._saved_step, self._is_new = trainer.global_step, True
        if self._agreed not in STOP_SIGNALS:
            # Lightning saves and requeues, if SLURM has asked for it; the run goes on until it is ended.
            number, self._received, self._agreed = self._agreed, 0, 0
            if number:
                self._handlers[number](number, None)

    def _put_in_place_and_stop(self, trainer: Trainer) -> None:
        if self._is_new and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            self._new_path.replace(self.path)
        self._is_new = False
        if self._agreed:
            raise RunStoppedError(self._agreed, trainer.global_step, self.command(trainer.lightning_module))


def _requeue_signals(trainer: Trainer) -> list[int]:
    """SLURM's, if Lightning listens to it: its handler saves a checkpoint, which needs a whole meta-step."""
    environment = trainer._accelerator_connector.cluster_environment
    if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
        return []
    return [] if environment.requeue_signal is None else [environment.requeue_signal]
