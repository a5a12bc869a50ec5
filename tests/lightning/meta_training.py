"""A small rule and a short meta-training, for tests."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from l2l_lightning import CoordinatewiseLSTM, MetaData, MetaLearner, Quadratic
from l2l_lightning.training.callbacks import CollapseGuard, PhiAveraging
from l2l_lightning.training.latest_checkpoint import LatestCheckpoint


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


def make_small(task=None, rule=None, **arguments):
    """A learner of two optimizees in rollouts of two windows of two steps."""
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(
        **{"num_layers": 1, "hidden_size": 2, "preprocessing": "identity"} | (rule or {})
    )
    settings = {"horizon": 4, "unroll": 2, "num_tasks": 2, "num_validation_optimizees": 2}
    return MetaLearner(task or Quadratic(dim=2), rule, **settings | {"learning_rate": 0.01} | arguments)


def watchers(folder):
    stopping = EarlyStopping("meta_loss", patience=30, check_on_train_epoch_end=True)
    best = ModelCheckpoint(folder / "kept", monitor="meta_loss", every_n_train_steps=1)
    return [PhiAveraging(0.5), CollapseGuard(), stopping, best]


def cut_run(folder, task=None, meta_steps=3, num_rollouts=4, **arguments):
    """The checkpoint of a run that is cut after so many windows."""
    latest = LatestCheckpoint(1, dirpath=str(folder / "run/checkpoints"))
    settings = {"max_steps": meta_steps, "num_rollouts": num_rollouts, "limit_val_batches": 0}
    fit(make_small(task, **arguments), folder, *watchers(folder), latest, **settings)
    return latest.path.rename(latest.path.with_name("cut.ckpt"))
