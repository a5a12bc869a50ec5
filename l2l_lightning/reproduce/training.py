"""Meta-training for an experiment: a preset's run in a folder of its own, taken up again where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback, Timer

from l2l_lightning import pretrained
from l2l_lightning.errors import RunStoppedError
from l2l_lightning.files import write_json
from l2l_lightning.progress import duration
from l2l_lightning.provenance import origin
from l2l_lightning.rules import Rule
from l2l_lightning.training import checkpoints
from l2l_lightning.training.callbacks import PhiAveraging, RuleSnapshots
from l2l_lightning.training.data_module import MetaData
from l2l_lightning.training.meta_learner import MetaLearner
from l2l_lightning.training.presets import (
    make_callbacks,
    make_learner,
    make_trainer,
    merged,
    preset_values,
)

Report = Callable[[str], None]
"""A function that is told in a few words what is being done."""


def meta_train(
    preset: str,
    folder: Path,
    *,
    seed: int,
    report: Report,
    options: Mapping[str, Any] | None = None,
    snapshots: Sequence[int] = (),
) -> Rule:
    """Returns the rule that a preset's meta-training gives: its best φ by validation.

    The folder keeps `rule.safetensors`, `training.json` (settings, seed, seconds, commit, device, data), the
    snapshots, checkpoints and logs. Called again it returns the finished rule, or goes on from the last
    checkpoint.

    Args:
        preset: Its short name.
        folder: The run's own.
        seed: The seed of every random draw.
        report: Told how far the training is.
        options: Values that are put over the preset's, nested as they are.
        snapshots: Numbers of rollouts after which φ̄ is written to `after-ROLLOUTS.safetensors`.

    Raises:
        MetaTrainingError: It collapsed more often than the preset allows.
        KeyboardInterrupt: A signal has stopped it.
    """
    finished = folder / "rule.safetensors"
    if finished.is_file():
        return pretrained.load(finished)
    run = {"checkpoint": {"dirpath": folder / "checkpoints"}, "latest": {"every_n_meta_steps": 20}}
    values = merged(run, preset_values(preset, options))
    model, data = make_learner(values["model"], seed), MetaData(**values["data"])

    def report_step(trainer: Trainer, *_: Any) -> None:
        loss = trainer.callback_metrics.get("val/final_loss")
        validated = "" if loss is None else f", validation loss {float(loss):.3g}"
        done, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        left = duration(timer.time_elapsed("train") / max(done, 1) * (total - done))
        report(f"meta-step {done:,} of {total:,}{validated}, {left} left of it")

    callbacks = make_callbacks(values)
    averaging = callbacks["averaging"]
    assert isinstance(averaging, PhiAveraging)
    timer = Timer()  # it counts over all interruptions
    own = [timer, LambdaCallback(on_train_batch_end=report_step), RuleSnapshots(averaging, snapshots, folder)]
    trainer: Any = make_trainer(values["trainer"], folder, model, data, [*callbacks.values(), *own])
    last = folder / "checkpoints" / "last.ckpt"
    try:
        trainer.fit(model, data, ckpt_path=last if last.is_file() else None)
    except (RunStoppedError, SystemExit):
        # A signal after a whole meta-step; or what Lightning makes of one at any other moment.
        raise KeyboardInterrupt from None
    best = trainer.checkpoint_callback.best_model_path
    rule = MetaLearner.from_checkpoint(best).rule
    training = {
        "preset": preset,
        "settings": model.settings(),
        "num_rollouts": data.num_rollouts,
        "seed": model.seed,
        "data": data.source,
        "meta_steps": trainer.global_step,
        "best_meta_step": checkpoints.read(best)["global_step"],
        "seconds": round(timer.time_elapsed("train"), 1),
        **origin(trainer.strategy.root_device),
    }
    write_json(folder / "training.json", training)
    pretrained.save(rule, finished)  # the last: its presence says that all is done
    return rule
