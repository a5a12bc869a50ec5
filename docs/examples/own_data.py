"""An optimizer that is meta-trained on data of your own, and compared on a part of it that it never saw.

python docs/examples/own_data.py
"""

import torch
from torch import nn

from l2l_lightning import ComparisonSettings, CoordinatewiseLSTM, MetaData, MetaLearner, MetaTrainer
from l2l_lightning.tasks import ModuleTask


def spirals(count, seed):
    """Returns points [count, 2] on two noisy spirals, and which of the two each is on, [count]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    angle = 1 + 5 * torch.rand(count, generator=generator)
    turned = angle + torch.pi * labels
    points = angle[:, None] / 3 * torch.stack([turned.cos(), turned.sin()], -1)
    return points + 0.05 * torch.randn(count, 2, generator=generator), labels


def main(num_rollouts=100, baselines=("sgd", "adam")):
    """Returns the comparison of the learned optimizer with tuned baselines."""
    parts = {"train": spirals(600, 0), "validation": spirals(200, 1), "test": spirals(200, 2)}
    data = MetaData(**parts, num_rollouts=num_rollouts)
    task = ModuleTask(lambda: nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)), batch_size=32)
    model = MetaLearner(task, CoordinatewiseLSTM(), horizon=20, unroll=20, num_tasks=4, learning_rate=0.01)
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
    trainer = MetaTrainer(max_epochs=1, inference_mode=False, accelerator="cpu", **dict.fromkeys(off, False))
    trainer.fit(model, datamodule=data)
    settings = ComparisonSettings(num_optimizees=16, num_tuning_optimizees=4, baselines=[*baselines])
    return trainer.compare(model, data, settings)


if __name__ == "__main__":
    main()
