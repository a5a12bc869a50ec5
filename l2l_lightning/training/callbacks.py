"""What watches a meta-training: averaging of φ, and a guard against collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from l2l_lightning import pretrained
from l2l_lightning.checks import check_choice, check_whole_numbers
from l2l_lightning.errors import MetaTrainingError
from l2l_lightning.rollout.optimizees import derive_generator
from l2l_lightning.rules.base import Rule
from l2l_lightning.training.data_module import WindowIndex


class PhiAveraging(EMAWeightAveraging):
    """Exponential moving average of φ; validation, checkpoints and the final comparison use the average.

    φ̄ ← decay · φ̄ + (1 - decay) · φ after every meta-step.

    Args:
        decay: In [0, 1); 0 is no averaging. The meta-gradient is noisy and φ wanders: 0.99 averages over
            about a hundred meta-steps.

    Raises:
        ValueError: decay is out of its range.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"averaging.decay must be in [0, 1), got {decay}")
        super().__init__(use_buffers=False, decay=decay)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # φ̄ in a coarser precision than the trainer's would round φ in every validation.
        trainer.precision_plugin.convert_module(pl_module)
        super().setup(trainer, pl_module, stage)

    @property
    def rule(self) -> Rule:
        """The rule with the averaged φ̄."""
        assert self._average_model is not None
        return self._average_model.module.rule  # type: ignore[return-value]

    def restart(self) -> None:
        """Forgets the average: the next meta-step's φ starts a new one."""
        assert self._average_model is not None
        self._average_model.n_averaged.zero_()


class RuleSnapshots(Callback):
    """Writes the averaged rule as it is after given numbers of rollouts: after-ROLLOUTS.safetensors.

    Args:
        averaging: Whose φ̄ to write; it comes before this in the trainer's callbacks.
        rollouts: After how many.
        folder: Where to.
    """

    def __init__(self, averaging: PhiAveraging, rollouts: Sequence[int], folder: Path) -> None:
        self.averaging = averaging
        self.rollouts = rollouts
        self.folder = folder

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: WindowIndex, batch_idx: int
    ) -> None:
        ended = batch.start + batch.length >= pl_module.horizon_of(batch.rollout)  # type: ignore[operator]
        if ended and batch.rollout + 1 in self.rollouts and trainer.is_global_zero:
            pretrained.save(self.averaging.rule, self.folder / f"after-{batch.rollout + 1}.safetensors")


class CollapseGuard(Callback):
    """Restarts or stops a meta-training that has collapsed to chance or to NaN.

    A validation is at chance when its final loss is no better than `chance` times the loss before the first
    step. A run has collapsed when a meta-gradient is not finite, when it has fallen back to chance for
    `patience` validations in a row, or when it has not left chance in its first `start_patience`. A restart
    takes φ from the best checkpoint (or draws it anew if none was better than chance), empties Adam's
    moments, abandons the rollouts in progress and halves the meta-learning rate.

    Args:
        action: "restart" or "stop".
        patience: Validations in a row at chance, after better ones, that are a collapse.
        start_patience: Validations at chance that a run may begin with: some take long to get going.
        chance: Fraction of the initial loss that counts as chance.
        max_restarts: Restarts before the run stops with an error.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    def __init__(
        self,
        action: Literal["restart", "stop"] = "restart",
        patience: int = 3,
        start_patience: int = 10,
        chance: float = 0.97,
        max_restarts: int = 3,
    ) -> None:
        check_choice(["restart", "stop"], **{"collapse.action": action})
        check_whole_numbers(
            1, 10**9, **{"collapse.patience": patience, "collapse.start_patience": start_patience}
        )
        check_whole_numbers(0, 10**9, **{"collapse.max_restarts": max_restarts})
        if not 0 < chance <= 1:
            raise ValueError(f"collapse.chance must be in (0, 1], got {chance}")
        self.action = action
        self.patience = patience
        self.start_patience = start_patience
        self.chance = chance
        self.max_restarts = max_restarts
        self.restarts = 0
        self._at_chance = 0
        self._ever_better = False
        self._not_finite = False

    def state_dict(self) -> dict[str, Any]:
        return {"restarts": self.restarts, "at_chance": self._at_chance, "ever_better": self._ever_better}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restarts, self._at_chance = state_dict["restarts"], state_dict["at_chance"]
        self._ever_better = state_dict["ever_better"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.barebones:
            raise MisconfigurationException(
                "a CollapseGuard reads what validations log, which is nothing with Trainer(barebones=True): "
                "leave one of the two out"
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        pl_module.log("meta_gradient_norm", norm, batch_size=1)
        self._not_finite = not math.isfinite(norm.item())
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._not_finite and scaler is not None and scaler.get_scale() > 1:
            # 16-mixed's factor was too large: the scaler leaves this step out, and takes half of it.
            self._not_finite = False
        if self._not_finite:  # it must reach neither φ nor Adam's moments
            for gradient in gradients:
                gradient.zero_()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._not_finite:
            self._not_finite = False
            self._collapsed(trainer, pl_module, "the meta-gradient is NaN or infinite")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        final, initial = float(metrics["val/final_loss"]), float(metrics["val/initial_loss"])
        at_chance = not final < initial - (1 - self.chance) * abs(initial)
        self._at_chance = self._at_chance + 1 if at_chance else 0
        self._ever_better |= not at_chance
        if self._at_chance >= (self.patience if self._ever_better else self.start_patience):
            self._collapsed(
                trainer,
                pl_module,
                f"the final loss of {self._at_chance} validations in a row ({final:.4g}) is no better than "
                f"chance ({initial:.4g} before the first step)",
            )

    def _collapsed(self, trainer: Trainer, pl_module: LightningModule, what: str) -> None:
        where = f"meta-step {trainer.global_step}: {what}"
        if self.action == "stop" or self.restarts >= self.max_restarts:
            raise MetaTrainingError(
                f"meta-training collapsed after {self.restarts} restarts; at {where}. "
                "Lower --model.learning_rate or --trainer.gradient_clip_val, raise --model.num_tasks, "
                "or allow more --collapse.max_restarts"
            )
        self.restarts += 1
        self._at_chance = 0
        model: Any = pl_module
        checkpointing = trainer.checkpoint_callback
        best = checkpointing.best_model_path if isinstance(checkpointing, ModelCheckpoint) else ""
        if best and self._ever_better:
            origin = "the best checkpoint"
            model.load_phi(best)
        else:  # the best of a run that was always at chance is at chance
            origin = "a fresh draw"
            model.rule.reset_parameters(derive_generator(model.seed, "phi", self.restarts))
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        for scheduler in trainer.lr_scheduler_configs:
            scheduler.scheduler.base_lrs = [0.5 * lr for lr in scheduler.scheduler.base_lrs]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PhiAveraging):
                callback.restart()
        model.abandon_rollout()
        rank_zero_info(
            f"Collapse at {where}. Restart {self.restarts} of {self.max_restarts}: φ from {origin}, "
            "meta-learning rate halved."
        )
