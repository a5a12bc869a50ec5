"""A small rule and a short meta-training, for tests."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from l2l_lightning import CoordinatewiseLSTM, MetaData


def make_rule(**arguments):
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=6, preprocessing="identity", **arguments)


def fit(model, folder, *callbacks, num_rollouts=2, ckpt_path=None, **arguments):
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "inference_mode": False,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **arguments,
        }
    )
    trainer.fit(model, datamodule=MetaData(num_rollouts=num_rollouts), ckpt_path=ckpt_path)
    return trainer
