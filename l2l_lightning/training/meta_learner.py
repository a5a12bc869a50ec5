"""The LightningModule: it owns the update rule and turns windows of rollouts into training steps."""

from __future__ import annotations

import functools
import inspect
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map_only
from torchmetrics import MeanMetric

from l2l_lightning.checks import check_choice, check_positive, check_switches, check_whole_numbers
from l2l_lightning.class_paths import class_config, from_class_config
from l2l_lightning.comparison.statistics import final_losses
from l2l_lightning.errors import CheckpointError, CheckpointMismatchError
from l2l_lightning.pretrained import load
from l2l_lightning.rollout.buffers import Workspace
from l2l_lightning.rollout.history import HistoryDtype, check_history
from l2l_lightning.rollout.optimizees import Optimizees, check_evaluable
from l2l_lightning.rollout.perturbed import PerturbedRollout
from l2l_lightning.rollout.rollout import Rollout, Window, run_rule, with_derivatives
from l2l_lightning.rules.base import Rule
from l2l_lightning.rules.lstm import LSTMRule
from l2l_lightning.tasks.base import Task
from l2l_lightning.training import checkpoints, resume
from l2l_lightning.training.checkpoints import CheckpointFiles, check_state, refusing
from l2l_lightning.training.data_module import (
    MetaData,
    WindowIndex,
    listed,
    rollout_horizon,
)
from l2l_lightning.training.data_settings import check_stored_settings, given_from_python
from l2l_lightning.training.estimators import evolution_gradient, perturbation
from l2l_lightning.training.resharding import reshard
from l2l_lightning.training.run_settings import log_settings
from l2l_lightning.trust import refuse_foreign

SECTION, VERSION = "l2l_lightning", 3
"""Where in a checkpoint MetaLearner's own entries are, and their version (2 had a digest, 1 no masks)."""

ELSEWHERE = {"seed", "start_from"}
"""Arguments of the constructor that a checkpoint holds beside the settings."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for settings that MetaLearner's constructor does not take; see there.

    The upper limits are far beyond any use: they keep a slip, or a file, from claiming the machine's memory.
    """

    def some(*names: str) -> dict[str, Any]:
        return {name: settings[name] for name in names}

    lengths = {name: listed(value) for name, value in some("horizon", "unroll").items()}
    for name, values in lengths.items():
        if not values:
            raise ValueError(f"{name} must be at least 1, got {values}")
        for value in values:
            check_whole_numbers(1, 10**7, **{name: value})
    check_whole_numbers(1, 10**6, **some("num_tasks", "num_validation_optimizees"))
    check_whole_numbers(0, 10**9, **some("warmup_steps"))
    check_whole_numbers(0, 2**32 - 1, **some("seed"))
    check_choice(["window", "evolution", "nres"], **some("estimator"))
    check_positive(**some("sigma"))
    estimator = settings["estimator"]
    of_windows = [settings[name] for name in ("second_order", "cuda_graphs", "checkpoint_every")]
    if estimator != "window" and (any(of_windows) or settings["history_dtype"] != "float32"):
        raise ValueError(
            f"estimator='{estimator}' keeps no states: second_order, cuda_graphs, checkpoint_every and "
            "history_dtype must not be set with it"
        )
    if max(lengths["unroll"]) > min(lengths["horizon"]) and estimator != "evolution":
        raise ValueError(f"unroll ({settings['unroll']}) must not exceed horizon ({settings['horizon']})")
    check_positive(**some("learning_rate"))
    check_choice(["constant", "cosine"], **some("lr_schedule"))
    check_choice(["uniform", "final", "held_out"], **some("loss_weights"))
    check_switches(**some("second_order"))
    if settings["cuda_graphs"] is not None:
        check_switches(**some("cuda_graphs"))
    if settings["second_order"] and settings["cuda_graphs"]:
        raise ValueError("second_order keeps the unrolled graph: cuda_graphs must not be true with it")
    if settings["second_order"] and settings["loss_weights"] == "held_out":
        raise ValueError(
            "second_order goes with the losses of minibatches: loss_weights must not be held_out"
        )
    check_history(**some("checkpoint_every", "history_dtype", "second_order"))


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
        loss_weights: w_t: "uniform" (the paper), or "final" (only the window's last loss counts); or
            "held_out": the logarithm of the loss on held-out examples after the last step, and half of the
            mean logarithm of all others, so that the losses' sizes do not count.
        second_order: Differentiate through the optimizee's gradients as well (slow; see Rollout.window).
        cuda_graphs: Record windows, and the steps of validation rollouts, as CUDA graphs: the same numbers,
            faster for small optimizees. None: on a CUDA device, unless the task cannot be recorded (a warning
            then says why); True: or else an error; False: never.
        checkpoint_every: k: keep every k-th state of a window and compute the others again (see Rollout):
            large optimizees and long windows fit in memory, for about another forward's time. None keeps all.
        history_dtype: What kept states are stored in, "float32" or "bfloat16" (see Rollout).
        estimator: What the meta-gradient comes from. "window": the exact first-order gradient of windows.
            "evolution": antithetic evolution strategies over whole rollouts (see `estimators`), for rules of
            few parameters that act over the whole horizon; a training step is then a whole rollout of
            `num_tasks` pairs, `unroll` is not read, and `loss_weights` says which losses of a pair are
            compared. "nres": the same over windows, with one ε for a pair's whole rollout.
        sigma: σ of "evolution" and "nres", in units of φ.
        num_validation_optimizees: Fresh optimizees, from held-out data, that a validation or a test runs;
            the members of a mixture share them evenly, at least one each.
        seed: Seed of every rollout's random draws.
        start_from: A trained rule that φ starts from: the name of one of the package's, or the path of a
            .safetensors file. It must have the configured rule's shape, or that of every group of a
            `Grouped`. None draws φ.

    Raises:
        ValueError: A value is out of its range, or start_from does not fit the rule; the message names it.
        TypeError: A value is of the wrong kind; the message names it.
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
        rule: Rule,
        horizon: int | list[int] = 100,
        unroll: int | list[int] = 20,
        num_tasks: int = 8,
        learning_rate: float = 0.003,
        warmup_steps: int = 0,
        lr_schedule: Literal["constant", "cosine"] = "cosine",
        loss_weights: Literal["uniform", "final", "held_out"] = "uniform",
        second_order: bool = False,
        cuda_graphs: bool | None = None,
        num_validation_optimizees: int = 32,
        seed: int = 0,
        start_from: str | None = None,
        checkpoint_every: int | None = None,
        history_dtype: HistoryDtype = "float32",
        estimator: Literal["window", "evolution", "nres"] = "window",
        sigma: float = 0.1,
    ) -> None:
        check_settings(locals())
        super().__init__()
        for name, argument, kind in (("task", task, Task), ("rule", rule, Rule)):
            if not isinstance(argument, kind):
                raise TypeError(f"{name} must be of the class {kind.__name__}, got {argument!r}")
        self.horizons = listed(horizon)
        # The windows of evolution strategies are whole rollouts.
        self.unrolls = [max(self.horizons)] if estimator == "evolution" else listed(unroll)
        self.estimator = estimator
        self.sigma = sigma
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
            trained = load(start_from)
            try:
                rule.start_from(trained)
            except ValueError as error:
                raise ValueError(f"start_from={start_from} {error}") from error
        self.final_loss, self.sum_loss, self.initial_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.log_held_out_loss = MeanMetric()
        self._rollout: Rollout | PerturbedRollout | None = None
        self._workspace = Workspace(num_tasks=len(task.members))
        self._carried: dict[str, Any] | None = None
        self._task_was_tried = False

    @classmethod
    def from_checkpoint(cls, path: str | Path, trust: Sequence[str] = ()) -> MetaLearner:
        """The learner that a checkpoint holds, its task, rule, settings and φ, on the CPU.

        Args:
            path: The checkpoint's.
            trust: Modules of yours, such as "my_problem", that may be imported for the task or the rule if
                the checkpoint names them. Nothing but this package and torch.nn is imported without.

        Raises:
            CheckpointError: The file is missing, damaged or no checkpoint of a MetaLearner, it names code
                that is not trusted, or the learner that it describes cannot be made.

        Example:
            >>> rule = MetaLearner.from_checkpoint("best-2800.ckpt").rule  # doctest: +SKIP
        """
        checkpoint = checkpoints.read(path)
        section = read_section(path, checkpoint)
        refuse_foreign(path, {name: section["model"][name] for name in ("task", "rule")}, trust)
        settings = dict(section["model"])
        with refusing(path, "model.task"):
            task: Task = from_class_config(settings.pop("task"), Task)
        rule = stored_rule(path, section)
        del settings["rule"]
        with refusing(path, "model"):
            model = cls(task, rule, **settings, seed=section["seed_everything"])
            model._check_phi(path, checkpoint, section)
        model.load_state_dict(checkpoint["state_dict"])
        if lost := given_from_python(section["data"]):
            warnings.warn(
                f"{path} was trained on data that was given from Python and is not in it, {lost}: to go on "
                "with it or compare on it, give it to MetaData(train=…, validation=…, test=…) again",
                stacklevel=2,
            )
        return model

    def load_phi(self, path: str | Path) -> None:
        """Takes φ from a checkpoint.

        Raises:
            CheckpointError: There is none that can be used, or (CheckpointMismatchError) its rule has another
                shape.
        """
        checkpoint = checkpoints.read(path)
        self._check_phi(path, checkpoint, read_section(path, checkpoint))
        self.load_state_dict(checkpoint["state_dict"])

    def try_task(self, data: MetaData) -> None:
        """Evaluates the task once, before a run.

        Raises:
            TaskError: It cannot be evaluated.
            GroupError: The rule has no member for one of its tensors.
        """
        if not self._task_was_tried:
            for tensor in (tensor for task in self.task.members for tensor in task.tensors):
                self.rule.member_for(tensor)
            data.load(self.task)
            check_evaluable(self.task, data.images("validation", "cpu"), self.seed)
            self._task_was_tried = True

    def setup(self, stage: str) -> None:
        """Tries the task; gives φ the trainer's precision, and the trainer `checkpoints` for its files."""
        check_precision(self.trainer.precision)
        # Before a checkpoint is restored, which Lightning would round to float32.
        self.trainer.precision_plugin.convert_module(self)
        device = self.trainer.strategy.root_device
        backends = [one.kernels_on(device) for one in self.rule.members if isinstance(one, LSTMRule)]
        if self._dtype_of_optimizees == torch.float64 and "triton" in backends:
            raise MisconfigurationException(
                f"--trainer.precision 64-true on {device} needs --model.rule.backend reference: the Triton "
                "kernels compute in float32"
            )
        of_windows = self.estimator == "window" and not self.second_order
        if stage == "fit" and of_windows and not all(one.has_window_gradient for one in self.rule.members):
            raise MisconfigurationException(
                "the rule's windows have no exact meta-gradient: train it with --model.estimator evolution, "
                "or --model.second_order true"
            )
        self.try_task(self.data)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_fit_start(self) -> None:
        """Hands the run's settings to its loggers."""
        log_settings(self.trainer.loggers, self, self.data, getattr(self.trainer, "options", {}))

    @property
    def data(self) -> MetaData:
        """The run's data module; TypeError if the trainer was given none, or another kind."""
        module = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(module, MetaData):
            raise TypeError(f"a MetaLearner runs with datamodule=MetaData(...), got {module!r}")
        return module

    @property
    def _ckpt_path(self) -> object:
        """What is being restored, for messages; Lightning names no file where it resumes a SLURM job."""
        return (self._trainer is not None and self.trainer.ckpt_path) or "the checkpoint"

    @property
    def _dtype_of_optimizees(self) -> torch.dtype:
        phi = next(self.rule.parameters())
        return torch.float64 if phi.dtype == torch.float64 else torch.float32

    def weights(self, T: int) -> Tensor:
        """w_t of a window's loss terms, [T+1]."""
        weights = torch.ones(T + 1)
        if self.loss_weights == "final":
            weights[:-1] = 0
        elif self.loss_weights == "held_out":
            weights[:-1] = 0.5 / T
        return weights

    def horizon_of(self, rollout: int) -> int:
        """Inner steps of the run's rollout of this index."""
        return rollout_horizon(self.horizons, rollout)

    def start_rollout(self, index: int) -> Rollout | PerturbedRollout:
        """The run's index-th rollout on this process; no other process draws from its streams."""
        task, numbers = self.task.member(index), self._numbers(index)
        if self.estimator != "window":
            pairs = [number for number in numbers for _ in range(2)]
            return PerturbedRollout(self.rule, self._optimizees(task, "train", pairs), self.horizon_of(index))
        return Rollout(
            self.rule,
            self._optimizees(task, "train", numbers),
            self._workspace,
            self.cuda_graphs,
            self.checkpoint_every,
            self.history_dtype,
            self.horizon_of(index),
            self.data.images("validation", self.device) if self.loss_weights == "held_out" else None,
        )

    def _numbers(self, index: int) -> range:
        """The indices of this process's optimizees, or pairs, in the run's index-th rollout."""
        process = index * self.trainer.world_size + self.trainer.global_rank
        return range(process * self.num_tasks, (process + 1) * self.num_tasks)

    def _optimizees(self, task: Task, stream: str, indices: Sequence[int]) -> Optimizees:
        images = self.data.images(stream, self.device)
        return Optimizees(
            task, images, self.seed, stream, indices, self.device, dtype=self._dtype_of_optimizees
        )

    def abandon_rollout(self) -> None:
        """Forgets the rollout in progress; the next window starts a fresh one."""
        self._rollout = None

    def training_step(self, window: WindowIndex, batch_idx: int) -> Tensor:
        if window.start == 0 or self._rollout is None:
            self._rollout = self.start_rollout(window.rollout)
            if self._carried is not None:
                ours = self._rollout.state_dict()
                if not self._carried["statistics"]:  # an older version's rules had none
                    del ours["statistics"]
                with refusing(self._ckpt_path, "rollouts"):
                    # A masked optimizee's numbers may be NaN.
                    check_state(self._carried, ours, "the rollout in progress", finite=False)
                    self._rollout.load_state_dict(self._carried)
        self._carried = None
        if isinstance(self._rollout, PerturbedRollout):
            result = self._evolve(self._rollout, window)
        else:
            weights, held_out = self.weights(window.length), self.loss_weights == "held_out"
            result = self._rollout.window(window.length, weights, self.second_order, held_out, held_out)
        if window.start + window.length >= self.horizon_of(window.rollout):
            self._rollout = None
        return self._counted(result)

    def _evolve(self, rollout: PerturbedRollout, window: WindowIndex) -> Window:
        """Returns a window's mean loss, with the derivatives that the pairs' differences estimate."""
        perturbations = [perturbation(self.rule, self.seed, pair) for pair in self._numbers(window.rollout)]
        images = self.data.images("validation", self.device)
        with torch.no_grad():
            value, gradients = evolution_gradient(
                rollout, window.length, perturbations, self.sigma, self.loss_weights, images
            )
        meta_loss = with_derivatives(value, list(self.rule.parameters()), gradients)
        return Window(meta_loss, value.new_empty(0), torch.zeros(self.num_tasks, dtype=torch.bool))

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
        # The optimizees are the same on any number of processes: each runs a share of them, maybe none, and
        # the metrics' means, which count optimizees, are synchronised.
        rank, world = self.trainer.global_rank, self.trainer.world_size
        members = self.task.members
        count = max(self.num_validation_optimizees // len(members), 1)
        for number, task in enumerate(members):
            # Of many members with few optimizees each, no process runs all the first ones.
            indices = range((rank - number) % world, count, world)
            losses, held_out = torch.empty(self.horizon, 0, device=self.device), torch.empty(0)
            if indices:
                optimizees = self._optimizees(task, stream, indices)
                losses = run_rule(self.rule, optimizees, self.horizon, self._workspace, self.cuda_graphs)
                held_out = optimizees.held_out_losses(optimizees.images).nan_to_num(nan=torch.inf)
            self.initial_loss.update(losses[0])
            self.final_loss.update(final_losses(losses).nan_to_num(nan=torch.inf))
            self.sum_loss.update(losses.sum(0).nan_to_num(nan=torch.inf))
            self.log_held_out_loss.update(held_out.clamp(min=1e-8).log())
        prefix = "val" if stream == "validation" else "test"
        self.log(f"{prefix}/initial_loss", self.initial_loss)
        self.log(f"{prefix}/final_loss", self.final_loss, prog_bar=True)
        self.log(f"{prefix}/sum_loss", self.sum_loss, prog_bar=True)
        self.log(f"{prefix}/log_held_out_loss", self.log_held_out_loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test")

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.meta_optimizer(self.rule.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def meta_optimizer(self, phi: Iterable[Tensor]) -> tuple[Adam, LambdaLR]:
        """Adam on some φ, with linear warm-up and an optional cosine decay over the run's meta-steps."""
        optimizer = Adam(phi, lr=self.learning_rate)
        return optimizer, LambdaLR(optimizer, functools.partial(self.rate_factor, total=self.meta_steps()))

    def rate_factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by at a meta-step of `total`."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.lr_schedule == "constant":
            return warmup
        return warmup * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))

    def meta_steps(self) -> int:
        """The run's length in meta-steps.

        Not the trainer's own estimate: it would set up the loader before a checkpoint's position is restored,
        and a resumed run would then begin with the first rollout again.
        """
        trainer = self.trainer
        epochs = max(trainer.max_epochs or 1, 1)
        steps = math.ceil(len(self.data.windows(self)) / trainer.accumulate_grad_batches) * epochs
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, but for the seed and start_from, as plain values.

        They are the attributes of the same names, but for lists of one and objects.
        """
        others = {
            "task": class_config(self.task),
            "rule": class_config(self.rule),
            "horizon": self.horizons if len(self.horizons) > 1 else self.horizon,
            "unroll": self.unrolls,
        }
        names = inspect.signature(MetaLearner).parameters.keys() - ELSEWHERE
        return {name: others[name] if name in others else getattr(self, name) for name in sorted(names)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the settings (plain values: nothing is ever unpickled) and the rollouts in progress.

        All processes must save at the same meta-step: each sends its rollout to the first one.
        """
        # From the CPU: a process must not take memory on another's device.
        carried = self._rollout and tree_map_only(Tensor, Tensor.cpu, self._rollout.state_dict())
        everyone = [carried] * self.trainer.world_size
        if self.trainer.world_size > 1:
            # Only the first process writes the file.
            torch.distributed.gather_object(carried, everyone if self.trainer.is_global_zero else None)
        checkpoint["rollouts"] = everyone
        checkpoint[SECTION] = {
            "version": VERSION,
            "seed_everything": self.seed,
            "model": self.settings(),
            "data": self.data.settings(),
            "data_source": self.data.source,
            "meta_steps": self.meta_steps(),
            # For the record alone: φ is in the checkpoint.
            "start_from": self.start_from,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that φ fits; a fit takes up this process's share of the rollouts in progress."""
        path = self._ckpt_path
        section = read_section(path, checkpoint)
        self._check_phi(path, checkpoint, section)
        lost = given_from_python(section["data"])
        if lost and self._trainer is not None and self.task.accepts_own_data and not self.data.has_own:
            raise CheckpointMismatchError(
                f"{path} is of a run on data that was given from Python, {lost}: give it again, "
                "MetaData(train=…, validation=…, test=…), or name the task's dataset"
            )
        # Whoever validates or compares needs φ only.
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        with refusing(path, "the course of its run"):
            resume.check_course(self, path, checkpoint)
            if different := resume.disagreements(self, checkpoint, section):
                raise CheckpointMismatchError(
                    f"the run cannot be resumed (--ckpt_path) with other options: {'; '.join(different)}. "
                    "Leave them out, or begin a new run; --model.start_from begins it with a trained rule"
                )
            resume.apply_options(self, checkpoint, section)
            rollouts, rank, world = checkpoint["rollouts"], self.trainer.global_rank, self.trainer.world_size
            self._carried = None if rollouts[0] is None else reshard(rollouts, rank, world)
        self.start_from = section.get("start_from")

    def _check_phi(self, path: object, checkpoint: dict[str, Any], section: dict[str, Any]) -> None:
        if self.start_from not in (None, section.get("start_from")):
            raise CheckpointMismatchError(
                f"φ comes from the checkpoint (--ckpt_path), not from --model.start_from {self.start_from}: "
                "give one of the two"
            )
        ours = self.state_dict()
        try:
            # An average of φ is kept beside the φ of the last meta-step.
            for name in ["state_dict", *({"current_model_state"} & checkpoint.keys())]:
                check_state(checkpoint.get(name), ours, name)
                if left_over := sorted(checkpoint[name].keys() - ours.keys()):
                    raise ValueError(f"{name} holds what the rule has not: {', '.join(left_over)}")
        except ValueError as error:
            options = resume.differing_options("rule", self.settings(), section["model"])
            if not options:
                raise CheckpointError(f"{path} (--ckpt_path) cannot be used: {error}") from error
            raise CheckpointMismatchError(
                f"the checkpoint's rule does not fit the one configured: {'; '.join(options)}"
            ) from error


def read_section(path: object, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a MetaLearner has added to a checkpoint: its settings, which the constructors' checks have passed.

    Raises:
        CheckpointError: A setting is missing, unknown or out of its range, or it is a newer version's file.
    """
    section: Any = checkpoint.get(SECTION)
    if not isinstance(section, dict):
        raise CheckpointError(
            f"{path} is not a checkpoint of this program (--ckpt_path): it has no settings of a MetaLearner"
        )
    with refusing(path, SECTION):
        version = section["version"]
        check_whole_numbers(1, 10**6, version=version)
        if version > VERSION:
            raise CheckpointError(
                f"{path} was written by a newer version of this program: it has version {version}, and "
                f"this one reads up to {VERSION}. Update l2l-lightning"
            )
        check_whole_numbers(0, 2**32 - 1, seed_everything=section["seed_everything"])
        check_whole_numbers(1, 2**62, meta_steps=section.get("meta_steps", 1))
    of_model, of_data = (MetaLearner, check_settings), (MetaData, check_stored_settings)
    for name, (cls, check) in (("model", of_model), ("data", of_data)):
        with refusing(path, name):
            settings = section[name]
            arguments = inspect.signature(cls).parameters
            if unknown := sorted(settings.keys() - (arguments.keys() - ELSEWHERE)):
                raise ValueError(f"this version does not know the settings {', '.join(unknown)}")
            # An older version's may lack an argument: it is at its default.
            defaults = {key: argument.default for key, argument in arguments.items()}
            check(defaults | settings)
            json.dumps(settings, allow_nan=False)
    for name in ("task", "rule"):
        with refusing(path, f"model.{name}"):
            config = section["model"][name]
            if not (config.keys() <= {"class_path", "init_args"} and isinstance(config["class_path"], str)):
                raise ValueError(f"it is no {name}")
            dict(**config.get("init_args", {}))
    return section


def stored_rule(path: object, section: dict[str, Any]) -> Rule:
    """A checkpoint's rule, without its weights. It imports what the checkpoint names."""
    with refusing(path, "model.rule"):
        rule: Rule = from_class_config(section["model"]["rule"], Rule)
    return rule


def check_precision(precision: str) -> None:
    """Refuses a trainer's precision that keeps φ itself in fewer bits than float32."""
    # As an option or as a plugin says it; "16" and "bf16" are mixed.
    if precision.endswith("16-true") or precision.startswith("transformer-engine"):
        raise MisconfigurationException(
            f"--trainer.precision must not be {precision}, which rounds φ, its average and Adam's moments: "
            "use 32-true, 64-true, or bf16-mixed or 16-mixed, which round in the optimizees' networks alone"
        )
