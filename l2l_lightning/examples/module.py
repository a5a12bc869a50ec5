"""A LightningModule that is trained with LearnedOptimizer, or with AdamW: `configure_optimizers` decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_lightning.optim.learned_optimizer import LearnedOptimizer

ADAMW = "adamw"
"""What the learned rules are compared with."""


@dataclass(frozen=True)
class OptimizerSetting:
    """An optimizer and its settings."""

    optimizer: str
    """ADAMW, or what LearnedOptimizer takes as `rule`: a name, or a path that ends in .safetensors."""
    lr: float
    weight_decay: float
    state_dtype: torch.dtype | None = None
    """A learned rule's; AdamW's state has the parameters' dtype."""


class Predictor(LightningModule):
    """Trains a network to predict labels, by cross-entropy.

    Args:
        network: Gives logits [B, C] for labels [B], or [B, C, T] for labels [B, T].
        setting: What it is trained with.

    Example:
        >>> setting = OptimizerSetting("lstm-mnist-mixture", lr=0.1, weight_decay=0.0)
        >>> type(Predictor(nn.Linear(4, 2), setting).configure_optimizers()).__name__
        'LearnedOptimizer'
    """

    def __init__(self, network: nn.Module, setting: OptimizerSetting) -> None:
        super().__init__()
        self.network = network
        self.setting = setting

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The minibatch's loss."""
        inputs, labels = batch
        return F.cross_entropy(self.network(inputs), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and accuracy, as means over the held-out data."""
        inputs, labels = batch
        logits = self.network(inputs)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("held_out_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log("held_out_accuracy", accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer: nothing else in this module knows which it is."""
        setting = self.setting
        if setting.optimizer == ADAMW:
            return torch.optim.AdamW(self.parameters(), lr=setting.lr, weight_decay=setting.weight_decay)
        return LearnedOptimizer(
            self.parameters(),
            rule=setting.optimizer,
            lr=setting.lr,
            weight_decay=setting.weight_decay,
            state_dtype=setting.state_dtype,
        )
