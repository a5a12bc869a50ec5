"""Meta-training for an experiment: a preset's run in a folder of its own, taken up again where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from l2l_lightning import pretrained
from l2l_lightning.cli import presets
from l2l_lightning.cli.lightning_cli import MetaLearningCLI
from l2l_lightning.errors import RunStoppedError
from l2l_lightning.files import write_json
from l2l_lightning.provenance import commit, device_name, versions
from l2l_lightning.rules import Rule
from l2l_lightning.training import checkpoints
from l2l_lightning.training.callbacks import PhiAveraging, RuleSnapshots
from l2l_lightning.training.meta_learner import MetaLearner

Report = Callable[[float, str], None]
"""(fraction done, what is being done) of one piece of work."""


class Stopwatch(Callback):
    """Reports a meta-training's progress, and counts its seconds over all its interruptions."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.seconds = 0.0
        self._last: float | None = None

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds += 0.0 if self._last is None else now - self._last
        self._last = now

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._tick()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Reports; the validations since the last window count as well."""
        self._tick()
        total = max(int(trainer.estimated_stepping_batches), 1)
        loss = trainer.callback_metrics.get("val/final_loss")
        validated = "" if loss is None else f", validation loss {float(loss):.3g}"
        self.report(trainer.global_step / total, f"meta-step {trainer.global_step:,} of {total:,}{validated}")

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counts on."""
        self.seconds = state_dict["seconds"]


def meta_train(
    preset: str,
    folder: Path,
    *,
    report: Report,
    arguments: Sequence[str] = (),
    snapshots: Sequence[int] = (),
) -> Rule:
    """The rule that a preset's meta-training gives: its best φ by validation.

    The folder keeps `rule.safetensors`, `training.json` (settings, seed, seconds, commit, device, data), the
    snapshots, checkpoints and logs. Called again it returns the finished rule, or goes on from the last
    checkpoint.

    Args:
        preset: Its short name.
        folder: The run's own.
        report: Told how far it is.
        arguments: Options of `fit` that override the preset's.
        snapshots: Numbers of rollouts after which φ̄ is written to `after-ROLLOUTS.safetensors`.

    Raises:
        MetaTrainingError: It collapsed more often than the preset allows.
    """
    finished = folder / "rule.safetensors"
    if finished.is_file():
        return pretrained.load(finished)
    cli = MetaLearningCLI.build(
        [
            f"--config={presets()[preset]}",
            f"--trainer.default_root_dir={folder}",
            f"--checkpoint.dirpath={folder / 'checkpoints'}",
            "--trainer.enable_progress_bar=false",
            "--latest.every_n_meta_steps=20",
            *arguments,
        ],
        run=False,
    )
    trainer: Any = cli.trainer
    model = cli.model
    cli.limit_validation()
    averaging = next(callback for callback in trainer.callbacks if isinstance(callback, PhiAveraging))
    stopwatch = Stopwatch(report)
    trainer.callbacks += [stopwatch, RuleSnapshots(averaging, snapshots, folder)]
    last = folder / "checkpoints" / "last.ckpt"
    try:
        trainer.fit(model, cli.datamodule, ckpt_path=last if last.is_file() else None)
    except (RunStoppedError, SystemExit):
        # A signal after a whole meta-step; or what Lightning makes of one at any other moment.
        raise KeyboardInterrupt from None
    best = trainer.checkpoint_callback.best_model_path
    rule = MetaLearner.from_checkpoint(best).rule
    training = {
        "preset": preset,
        "settings": model.settings(),
        "num_rollouts": cli.datamodule.num_rollouts,
        "seed": model.seed,
        "data": cli.datamodule.source,
        "meta_steps": trainer.global_step,
        "best_meta_step": checkpoints.read(best)["global_step"],
        "seconds": round(stopwatch.seconds, 1),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "device": device_name(trainer.strategy.root_device),
        "versions": versions(),
    }
    write_json(folder / "training.json", training)
    pretrained.save(rule, finished)  # the last: its presence says that all is done
    return rule
