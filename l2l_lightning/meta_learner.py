"""The LightningModule: it owns the update rule and turns windows of rollouts into training steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from l2l_lightning.baselines import final_losses
from l2l_lightning.config import class_config, from_class_config
from l2l_lightning.data_module import MetaData, WindowIndex, rollout_horizon
from l2l_lightning.history import HistoryDtype, check_history
from l2l_lightning.optimizees import Optimizees
from l2l_lightning.pretrained import load
from l2l_lightning.rollout import Rollout, Window, run_rule
from l2l_lightning.rules.base import UpdateRule
from l2l_lightning.tasks.base import Task
from l2l_lightning.workspace import Workspace

CHECKPOINT_VERSION = 1
"""Of what MetaLearner adds to Lightning's checkpoints."""


class CheckpointMismatchError(ValueError):
    """A checkpoint's rule has another shape than the one configured; the message names the options."""


class MetaLearner(LightningModule):
    """Meta-trains an update rule on a task: min_φ E Σ_t w_t f_t(θ_t), by Adam on the windows' meta-gradients.

    A training step is one window of `num_tasks` rollouts; θ, the rule's state and the random streams are
    carried from window to window, and the meta-gradient is truncated in between.

    An optimizee that has diverged to NaN or infinity is masked until its rollout ends; the others train on
    (see Rollout). The meta-gradient stays divided by all optimizees, so that N processes of K tasks each go
    on giving what one of N·K gives. Logged are `masked`, the number of masked optimizees of all processes,
    and `meta_loss`, the mean over the others; where none is left it is NaN, as the meta-gradient is.

    Args:
        task: The distribution of optimizees.
        rule: m_φ, the rule to learn.
        horizon: Inner steps of a rollout. Of a list, rollouts have one or another, in equal shares;
            validations and comparisons run the first.
        unroll: T, the inner steps of a window (a rollout's last window may be shorter). A list divides the
            run evenly between its lengths: short windows give many meta-steps to begin with, long ones
            then credit an early update with all that comes of it.
        num_tasks: K, the optimizees per meta-step and process; the meta-gradient is their mean.
        learning_rate: The meta-optimizer's (Adam's) rate.
        warmup_steps: Meta-steps over which the rate grows linearly from 0.
        lr_schedule: "constant", or "cosine" from the full rate to 0 at the end of the run.
        loss_weights: w_t: "uniform" (the paper), or "final" (only the window's last loss counts).
        second_order: Differentiate through the optimizee's gradients as well (slow; see Rollout.window).
        cuda_graphs: Record windows, and the steps of validation rollouts, as CUDA graphs: the same numbers,
            faster for small optimizees. None: on a CUDA device, unless the task cannot be recorded (a warning
            then says why); True: or else an error; False: never.
        checkpoint_every: k: keep every k-th state of a window and compute the others again (see Rollout):
            large optimizees and long windows fit in memory, for about another forward's time. None keeps all.
        history_dtype: What kept states are stored in, "float32" or "bfloat16" (see Rollout).
        num_validation_optimizees: Fresh optimizees, from held-out data, that a validation or a test runs;
            the members of a mixture share them evenly, at least one each.
        seed: Seed of every rollout's random draws.
        start_from: A trained rule that φ starts from: the name of one of the package's, or the path of a
            .safetensors file. It must have the configured rule's shape. None draws φ.

    Raises:
        ValueError: A value is out of its range, or start_from does not fit the rule; the message names it.
        WeightsError: There is no such rule as start_from, or its file is damaged.

    Source: Andrychowicz et al. 2016, equation 3 and section 2.1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from l2l_lightning import CoordinatewiseLSTM, MetaData, MetaLearner, Quadratic
        >>> model = MetaLearner(Quadratic(), CoordinatewiseLSTM(preprocessing="identity", output_scale=1.0))
        >>> trainer = Trainer(max_epochs=1, inference_mode=False)
        >>> trainer.fit(model, datamodule=MetaData(num_rollouts=10))  # doctest: +SKIP
    """

    def __init__(
        self,
        task: Task,
        rule: UpdateRule,
        horizon: int | list[int] = 100,
        unroll: int | list[int] = 20,
        num_tasks: int = 8,
        learning_rate: float = 0.003,
        warmup_steps: int = 0,
        lr_schedule: Literal["constant", "cosine"] = "cosine",
        loss_weights: Literal["uniform", "final"] = "uniform",
        second_order: bool = False,
        cuda_graphs: bool | None = None,
        num_validation_optimizees: int = 32,
        seed: int = 0,
        start_from: str | None = None,
        checkpoint_every: int | None = None,
        history_dtype: HistoryDtype = "float32",
    ) -> None:
        super().__init__()
        self.horizons = [horizon] if isinstance(horizon, int) else list(horizon)
        at_least_one = {
            "horizon": min(self.horizons, default=0),
            "num_tasks": num_tasks,
            "num_validation_optimizees": num_validation_optimizees,
        }
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.unrolls = [unroll] if isinstance(unroll, int) else list(unroll)
        if not self.unrolls or min(self.unrolls) < 1:
            raise ValueError(f"unroll must be at least 1, got {unroll}")
        if max(self.unrolls) > min(self.horizons):
            raise ValueError(f"unroll ({unroll}) must not exceed horizon ({horizon})")
        if learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        if second_order and cuda_graphs:
            raise ValueError("second_order keeps the unrolled graph: cuda_graphs must not be true with it")
        check_history(checkpoint_every, history_dtype, second_order)
        self.task = task
        self.rule = rule
        self.horizon = self.horizons[0]
        self.num_tasks = num_tasks
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.lr_schedule = lr_schedule
        self.loss_weights = loss_weights
        self.second_order = second_order
        self.cuda_graphs = cuda_graphs
        self.checkpoint_every = checkpoint_every
        self.history_dtype: HistoryDtype = history_dtype
        self.num_validation_optimizees = num_validation_optimizees
        self.seed = seed
        self.start_from = start_from
        if start_from is not None:
            self._copy_phi(start_from)
        self.final_loss, self.sum_loss, self.initial_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self._rollout: Rollout | None = None
        self._workspace = Workspace()
        self._carried: dict[str, Any] | None = None

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> MetaLearner:
        """The learner that a checkpoint holds, its task, rule, settings and φ, on the CPU.

        Raises:
            KeyError: The file is not a checkpoint of a MetaLearner.
            RuntimeError: A weight is missing, left over, or of another shape.

        Example:
            >>> rule = MetaLearner.from_checkpoint("best-2800.ckpt").rule  # doctest: +SKIP
        """
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["l2l_lightning"]
        settings = dict(saved["model"])
        task: Task = from_class_config(settings.pop("task"), Task)
        rule: UpdateRule = from_class_config(settings.pop("rule"), UpdateRule)
        model = cls(task, rule, **settings, seed=saved["seed_everything"])
        model.load_state_dict(checkpoint["state_dict"])
        return model

    def _copy_phi(self, name: str) -> None:
        theirs = load(name)
        shapes = [{key: value.shape for key, value in r.state_dict().items()} for r in (theirs, self.rule)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"start_from={name} is a rule of another shape: {theirs.config()}")
        self.rule.load_state_dict(theirs.state_dict())

    @property
    def data(self) -> MetaData:
        """The run's data module."""
        module: MetaData = self.trainer.datamodule  # type: ignore[attr-defined]
        return module

    def weights(self, T: int) -> Tensor:
        """w_t of a window's loss terms, [T+1]."""
        weights = torch.ones(T + 1)
        if self.loss_weights == "final":
            weights[:-1] = 0
        return weights

    def horizon_of(self, rollout: int) -> int:
        """Inner steps of the run's rollout of this index."""
        return rollout_horizon(self.horizons, rollout)

    def start_rollout(self, index: int) -> Rollout:
        """The run's index-th rollout on this process; no other process draws from its streams."""
        process = index * self.trainer.world_size + self.trainer.global_rank
        indices = range(process * self.num_tasks, (process + 1) * self.num_tasks)
        images = self.data.images("train", self.device)
        task = self.task.member(index)
        optimizees = Optimizees(task, images, self.seed, "train", indices, self.device)
        return Rollout(
            self.rule,
            optimizees,
            self._workspace,
            self.cuda_graphs,
            self.checkpoint_every,
            self.history_dtype,
        )

    def abandon_rollout(self) -> None:
        """Forgets the rollout in progress; the next window starts a fresh one."""
        self._rollout = None

    def training_step(self, window: WindowIndex, batch_idx: int) -> Tensor:
        """One window of the current rollout; returns its meta-loss."""
        if window.start == 0 or self._rollout is None:
            self._rollout = self.start_rollout(window.rollout)
            if self._carried is not None:
                self._rollout.load_state_dict(self._carried)
        self._carried = None
        result = self._rollout.window(window.length, self.weights(window.length), self.second_order)
        if window.start + window.length >= self.horizon_of(window.rollout):
            self._rollout = None
        return self._counted(result)

    def _counted(self, window: Window) -> Tensor:
        """Logs what a window gave on all processes; returns the meta-loss that this one differentiates."""
        masked = int(window.masked.sum())
        meta_loss = window.meta_loss
        if masked == self.num_tasks:
            # As a share of all processes' mean it is zero, as long as another process has an optimizee left.
            meta_loss = torch.stack([0 * parameter.sum() for parameter in self.rule.parameters()]).sum()
        counts = meta_loss.new_tensor([1 - masked / self.num_tasks, masked])
        sums = torch.cat([meta_loss.detach()[None], counts])
        total, healthy, masked_of_all = self.trainer.strategy.reduce(sums, reduce_op="sum")
        # Where none is left anywhere: NaN, and the guard against collapse acts on the meta-gradient, NaN too.
        self.log("meta_loss", total / healthy, prog_bar=True, on_step=True, batch_size=1)
        self.log("masked", masked_of_all, on_step=True, batch_size=1)
        return window.meta_loss if masked == self.num_tasks and healthy == 0 else meta_loss

    def _evaluate(self, stream: Literal["validation", "test"]) -> None:
        # Every process runs its own share; the metrics' means are synchronised.
        rank, world = self.trainer.global_rank, self.trainer.world_size
        images, members = self.data.images(stream, self.device), self.task.members
        share = max(self.num_validation_optimizees // len(members), rank + 1)
        for task in members:
            optimizees = Optimizees(task, images, self.seed, stream, range(rank, share, world), self.device)
            losses = run_rule(self.rule, optimizees, self.horizon, self._workspace, self.cuda_graphs)
            self.initial_loss.update(losses[0])
            self.final_loss.update(final_losses(losses).nan_to_num(nan=torch.inf))
            self.sum_loss.update(losses.sum(0).nan_to_num(nan=torch.inf))
        prefix = "val" if stream == "validation" else "test"
        self.log(f"{prefix}/initial_loss", self.initial_loss)
        self.log(f"{prefix}/final_loss", self.final_loss, prog_bar=True)
        self.log(f"{prefix}/sum_loss", self.sum_loss, prog_bar=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Runs the rule on fresh optimizees from the validation images, always the same ones."""
        self._evaluate("validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Runs the rule on fresh optimizees from the test images."""
        self._evaluate("test")

    def configure_optimizers(self) -> Any:
        """Adam on φ, with linear warm-up and an optional cosine decay over the run's meta-steps."""
        optimizer = torch.optim.Adam(self.rule.parameters(), lr=self.learning_rate)
        total = self._meta_steps()

        def factor(step: int) -> float:
            warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
            if self.lr_schedule == "constant":
                return warmup
            return warmup * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _meta_steps(self) -> int:
        """The run's length in meta-steps.

        Not the trainer's own estimate: it would set up the loader before a checkpoint's position is restored,
        and a resumed run would then begin with the first rollout again.
        """
        trainer = self.trainer
        epochs = max(trainer.max_epochs or 1, 1)
        steps = math.ceil(len(self.data.windows(self)) / trainer.accumulate_grad_batches) * epochs
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, but for the seed and start_from, as plain values."""
        return {
            "task": class_config(self.task),
            "rule": class_config(self.rule),
            "horizon": self.horizons if len(self.horizons) > 1 else self.horizon,
            "unroll": self.unrolls,
            "num_tasks": self.num_tasks,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "lr_schedule": self.lr_schedule,
            "loss_weights": self.loss_weights,
            "second_order": self.second_order,
            "cuda_graphs": self.cuda_graphs,
            "checkpoint_every": self.checkpoint_every,
            "history_dtype": self.history_dtype,
            "num_validation_optimizees": self.num_validation_optimizees,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the settings (plain values: nothing is ever unpickled) and the rollouts in progress."""
        carried = None if self._rollout is None else self._rollout.state_dict()
        everyone = [carried]
        if self.trainer.world_size > 1:
            everyone = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everyone, carried)
        checkpoint["rollouts"] = everyone
        checkpoint["l2l_lightning"] = {
            "version": CHECKPOINT_VERSION,
            "seed_everything": self.seed,
            "model": self.settings(),
            "data": self.data.settings(),
            "data_source": self.data.source,
            # For the record alone: φ is in the checkpoint.
            "start_from": self.start_from,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that φ fits, and takes up this process's rollout in progress.

        Raises:
            CheckpointMismatchError: The checkpoint's rule has another shape.
        """
        self._check_shapes(checkpoint)
        rollouts = checkpoint.get("rollouts", [])
        rank = self.trainer.global_rank if self._trainer is not None else 0
        self._carried = rollouts[rank] if rank < len(rollouts) else None

    def _check_shapes(self, checkpoint: dict[str, Any]) -> None:
        saved = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if saved == {name: value.shape for name, value in self.state_dict().items()}:
            return
        theirs = checkpoint.get("l2l_lightning", {}).get("model", {}).get("rule", {}).get("init_args", {})
        ours = self.rule.config()
        different = [name for name in ours if name in theirs and theirs[name] != ours[name]]
        raise CheckpointMismatchError(
            "the checkpoint's rule does not fit the one configured: "
            + "; ".join(
                f"--model.rule.{name} is {ours[name]}, the checkpoint's {theirs[name]}" for name in different
            )
        )
