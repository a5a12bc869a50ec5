"""One training run: a network, an optimizer, minibatches; what is kept of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from l2l_lightning.examples.module import OptimizerSetting, Predictor

EVALUATIONS = 10
"""How often the held-out data is looked at in a run, beside the time before the first step."""

EVALUATION_BATCH_SIZE = 256

Data = Dataset[tuple[Tensor, ...]]


class Evaluation(NamedTuple):
    """A look at all of the held-out data."""

    step: int
    """Updates made before it."""
    loss: float
    accuracy: float


@dataclass
class Run:
    """What an optimizer did to one network."""

    losses: list[float] = field(default_factory=list)
    """Of the minibatches, before the update that each of them led to."""
    held_out: list[Evaluation] = field(default_factory=list)
    """Before the first step, and EVALUATIONS times since."""
    step_seconds: list[float] = field(default_factory=list)
    """Forward, backward and update, of every step."""
    cpu_seconds: list[float] = field(default_factory=list)
    """The same in time that this process computed, in all its threads: other work does not lengthen it."""
    state_bytes: int = 0
    """What the optimizer's state took at the end."""


class Recorder(Callback):
    """Fills in a Run."""

    def __init__(self) -> None:
        self.run = Run()
        self._started = self._cpu_started = 0.0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Starts the clocks."""
        self._started, self._cpu_started = _now(trainer), time.process_time()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        *_: Any,
    ) -> None:
        """Stops the clocks; keeps the loss."""
        self.run.cpu_seconds.append(time.process_time() - self._cpu_started)
        self.run.step_seconds.append(_now(trainer) - self._started)
        assert isinstance(outputs, Mapping)
        self.run.losses.append(outputs["loss"].item())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the held-out loss and accuracy."""
        loss, accuracy = (
            trainer.callback_metrics[f"held_out_{name}"].item() for name in ("loss", "accuracy")
        )
        self.run.held_out.append(Evaluation(len(self.run.losses), loss, accuracy))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up the optimizer's state."""
        (optimizer,) = trainer.optimizers
        self.run.state_bytes = sum(
            value.nbytes
            for entries in optimizer.state.values()
            for value in entries.values()
            if isinstance(value, Tensor)
        )


def train(
    network: nn.Module,
    setting: OptimizerSetting,
    data: Data,
    held_out: Data,
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    accelerator: str = "auto",
) -> Run:
    """Trains a network in place.

    Args:
        network: As `Predictor` takes it.
        setting: The optimizer.
        data: (input, label) pairs to train on.
        held_out: Those to evaluate on.
        steps: Updates, a multiple of EVALUATIONS.
        batch_size: Pairs in a minibatch, drawn with replacement.
        generator: On the CPU; minibatches depend on it alone, and so are alike for every optimizer.
        accelerator: Lightning's name of the kind of device.

    Raises:
        ValueError: steps is no positive multiple of EVALUATIONS.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(50, 4), torch.randint(2, (50,)))
        >>> setting = OptimizerSetting("adamw", lr=0.01, weight_decay=0.0)
        >>> sizes = {"steps": 10, "batch_size": 8, "generator": torch.Generator()}
        >>> run = train(nn.Linear(4, 2), setting, data, data, accelerator="cpu", **sizes)
        >>> len(run.losses), len(run.held_out)
        (10, 11)
    """
    if steps < 1 or steps % EVALUATIONS:
        raise ValueError(f"--steps must be a positive multiple of {EVALUATIONS}, got {steps}")
    sampler = RandomSampler(data, replacement=True, num_samples=steps * batch_size, generator=generator)  # type: ignore[arg-type]
    recorder = Recorder()
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=1,
        val_check_interval=steps // EVALUATIONS,
        num_sanity_val_steps=0,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(data, batch_size, sampler=sampler)
    evaluation = DataLoader(held_out, EVALUATION_BATCH_SIZE)
    module = Predictor(network, setting)
    trainer.validate(module, evaluation, verbose=False)
    trainer.fit(module, batches, evaluation)
    return recorder.run


def _now(trainer: Trainer) -> float:
    """The time when the device has finished."""
    if trainer.strategy.root_device.type != "cpu":
        torch.accelerator.synchronize(trainer.strategy.root_device)
    return time.perf_counter()
