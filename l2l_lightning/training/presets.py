"""A preset's plain values, and the objects that they describe: learner, data, callbacks and trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from l2l_lightning.class_paths import from_class_config
from l2l_lightning.configs import presets
from l2l_lightning.rules import Rule
from l2l_lightning.tasks.base import Task
from l2l_lightning.training.callbacks import CollapseGuard, PhiAveraging
from l2l_lightning.training.data_module import MetaData
from l2l_lightning.training.latest_checkpoint import LatestCheckpoint
from l2l_lightning.training.meta_learner import MetaLearner
from l2l_lightning.training.metrics_log import MetricsLog
from l2l_lightning.training.trainer import MetaTrainer

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    # Validation rollouts need the optimizees' gradients.
    "inference_mode": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""The trainer's arguments where a meta-training's options do not say otherwise."""

CALLBACKS: dict[str, type[Callback]] = {
    "checkpoint": ModelCheckpoint,
    "latest": LatestCheckpoint,
    "early_stopping": EarlyStopping,
    "averaging": PhiAveraging,
    "collapse": CollapseGuard,
}
"""The callbacks of every meta-training, by the name of their options."""

CALLBACK_DEFAULTS: dict[str, dict[str, Any]] = {
    "checkpoint": {
        "monitor": "val/sum_loss",
        "filename": "best-{step}",
        # A run that was killed and goes on writes its best one again, not beside it.
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
        "save_on_train_epoch_end": False,
    },
    "early_stopping": {
        "monitor": "val/sum_loss",
        "patience": 30,
        "check_finite": False,
        # A run that goes on from its end has no validation of its own to look at.
        "check_on_train_epoch_end": False,
    },
}
"""The callbacks' arguments where the options do not say otherwise, if they are not the class's default."""


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested values with others put over them, key by key; both are left as they are.

    Example:
        >>> merged({"model": {"unroll": 20, "horizon": 100}}, {"model": {"unroll": 50}})
        {'model': {'unroll': 50, 'horizon': 100}}
    """
    result = dict(values)
    for key, value in overrides.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if nested else value
    return result


def preset_values(name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the values of a shipped preset, with some of them overridden.

    Example:
        >>> preset_values("quadratic", {"model": {"unroll": 50}})["model"]["unroll"]
        50
    """
    return merged(yaml.safe_load(presets()[name].read_text(encoding="utf-8")), overrides or {})


def make_learner(values: Mapping[str, Any], seed: int) -> MetaLearner:
    """Makes the learner that a preset's section "model" describes; φ is drawn from the seed.

    Like the command line it seeds the process's random generators.
    """
    seed_everything(seed, workers=True, verbose=False)
    settings = dict(values)
    task: Task = from_class_config(settings.pop("task"), Task)
    rule: Rule = from_class_config(settings.pop("rule"), Rule)
    return MetaLearner(task, rule, **settings, seed=seed)


def make_callbacks(values: Mapping[str, Any]) -> dict[str, Callback]:
    """Makes CALLBACKS with the options that a preset gives them, by name."""
    options = merged(CALLBACK_DEFAULTS, {name: values[name] for name in CALLBACKS if name in values})
    return {name: kind(**options.get(name, {})) for name, kind in CALLBACKS.items()}


def make_trainer(
    values: Mapping[str, Any],
    folder: Path,
    model: MetaLearner,
    data: MetaData,
    callbacks: Sequence[Callback],
) -> MetaTrainer:
    """Makes the trainer that a preset's section "trainer" describes; it logs into the run's folder.

    A validation interval that is longer than the run, which Lightning refuses, becomes the run's length. Of
    the callbacks, which are called in their order, those that write checkpoints are called last.
    """
    options = {**TRAINER_DEFAULTS, **values}
    interval = options.get("val_check_interval")
    if isinstance(interval, int):
        options["val_check_interval"] = min(interval, len(data.windows(model)))
    return MetaTrainer(
        **options,
        default_root_dir=folder,
        logger=MetricsLog(folder),
        callbacks=[LearningRateMonitor("step"), *callbacks],
        enable_progress_bar=False,
    )
