"""A run that goes on from a checkpoint with other options: which it can honour, and which it must refuse."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

from l2l_lightning.errors import CheckpointError
from l2l_lightning.training.checkpoints import check_state, refusing
from l2l_lightning.training.data_module import WindowLoader, listed

if TYPE_CHECKING:
    from l2l_lightning.training.meta_learner import MetaLearner


def check_course(model: MetaLearner, path: object, checkpoint: dict[str, Any]) -> None:
    """Raises if the checkpoint holds weights alone, or what Lightning would restore, and fail on later."""
    if "optimizer_states" not in checkpoint or "lr_schedulers" not in checkpoint:
        raise CheckpointError(
            "the checkpoint (--ckpt_path) holds weights only, from which no run can be resumed: take one "
            "that was written without --checkpoint.save_weights_only"
        )
    trainer: Any = model.trainer
    check_state(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict(), "loops.fit_loop")
    check_state([_position(checkpoint), checkpoint["epoch"], checkpoint["global_step"]], [0, 0, 0], "loops")
    check_state(checkpoint["rollouts"], [None] * len(checkpoint["rollouts"]), "rollouts")
    if len({rollout is None for rollout in checkpoint["rollouts"]}) != 1:
        raise ValueError("rollouts: some processes are in the middle of one, and others between two")
    with refusing(path, "optimizer_states or lr_schedulers"):
        _try_optimizer(model, checkpoint)
    for callback in trainer.callbacks:
        saved = checkpoint.get("callbacks", {}).get(callback.state_key)
        # A callback of the user's own knows what its state may be.
        if saved is None or not type(callback).__module__.startswith(("lightning.", "l2l_lightning.")):
            continue
        name = f"callbacks.{type(callback).__name__}"
        ours = callback.state_dict()
        if isinstance(callback, Timer):  # whose seconds are whole until it starts
            ours = {"time_elapsed": dict.fromkeys(ours["time_elapsed"], 0.0)}
        check_state(saved, ours, name)
        if isinstance(callback, ModelCheckpoint):
            best, worst = saved["best_k_models"], saved["kth_best_model_path"]
            check_state(best, dict.fromkeys(best, torch.tensor(torch.inf)), f"{name}.best_k_models")
            if worst and worst not in best:
                raise ValueError(f"{name}.kth_best_model_path is {worst}, none of best_k_models")


def _try_optimizer(model: MetaLearner, checkpoint: dict[str, Any]) -> None:
    """Has a fresh meta-optimizer take the checkpoint's state, and a meta-step from zeros along them."""
    phi = [torch.zeros_like(parameter) for parameter in model.rule.parameters()]
    optimizer, scheduler = model.meta_optimizer(phi)
    # Entries of the schedule become the scheduler's attributes.
    known = scheduler.state_dict().keys()
    checkpoint["lr_schedulers"] = [
        {key: value for key, value in saved.items() if key in known} for saved in checkpoint["lr_schedulers"]
    ]
    states, schedules = copy.deepcopy((checkpoint["optimizer_states"], checkpoint["lr_schedulers"]))
    (state,), (schedule,) = states, schedules
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(schedule)
    for _ in range(2):
        for parameter in phi:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        scheduler.step()
    if not all(parameter.isfinite().all() for parameter in phi):
        raise ValueError("a meta-step with it is not finite")


def disagreements(model: MetaLearner, checkpoint: dict[str, Any], section: dict[str, Any]) -> list[str]:
    """What keeps a learner from going on with a checkpoint's run: "--model.num_tasks is 4, …" each.

    Task, rule, horizon and seed say what was learned and validated so far: they are the run's. The windows
    that have been run, and the rollout in progress, must be those of the run as it is configured now.
    """
    theirs, ours = section["model"], model.settings()
    found = differing_options("task", ours, theirs) + differing_options("rule", ours, theirs, but="backend")
    if listed(ours["horizon"]) != listed(theirs.get("horizon", ours["horizon"])):
        found.append(_differs("--model.horizon", ours["horizon"], theirs["horizon"]))
    if model.estimator != theirs.get("estimator", "window"):
        found.append(_differs("--model.estimator", model.estimator, theirs.get("estimator", "window")))
    if model.seed != section["seed_everything"]:
        found.append(_differs("--seed_everything", model.seed, section["seed_everything"]))
    if found:
        return found
    processes, world = len(checkpoint["rollouts"]), model.trainer.world_size
    num_tasks = theirs.get("num_tasks", model.num_tasks)
    if processes * num_tasks != world * model.num_tasks:
        # It would draw from streams that the run has already used.
        found.append(
            f"--model.num_tasks is {model.num_tasks} on {world} processes, the checkpoint's {num_tasks} on "
            f"{processes} (choose --trainer.devices, --trainer.num_nodes and --model.num_tasks so that their "
            "product is the same)"
        )
    return found + _other_windows(model, checkpoint, section)


def _other_windows(model: MetaLearner, checkpoint: dict[str, Any], section: dict[str, Any]) -> list[str]:
    unroll = section["model"].get("unroll", model.unrolls)
    num_rollouts = section["data"].get("num_rollouts", 100)
    before = WindowLoader(num_rollouts, model.horizons, listed(unroll))
    now = model.data.windows(model)
    done, wanted = _position(checkpoint), model.data.num_windows(model, model.trainer)
    fit_loop, epochs = checkpoint["loops"]["fit_loop"], model.trainer.max_epochs
    ended = fit_loop["epoch_progress"]["current"]["processed"]
    ended += not ended and fit_loop["epoch_loop.batch_progress"]["is_last_batch"]
    # Then Lightning would go on with nothing.
    if epochs is not None and 0 < epochs <= ended and done < wanted:
        return [f"the run is over after {done} windows, and is to have {wanted} (--data.num_rollouts)"]
    carried = checkpoint["rollouts"][0] is not None
    known = done <= min(len(before), len(now)) and (not carried or done < len(now))
    if known and all(before[index] == now[index] for index in range(done)):
        return []
    found = []
    if model.unrolls != listed(unroll):
        found.append(_differs("--model.unroll", model.unrolls, unroll))
    if model.data.num_rollouts != num_rollouts:
        found.append(_differs("--data.num_rollouts", model.data.num_rollouts, num_rollouts))
    return [f"{', '.join(found)}, and {done} windows have been run, which would have been others"]


def _position(checkpoint: dict[str, Any]) -> Any:
    """Windows of the run's current epoch that had begun when the checkpoint was written."""
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    return loaders[0]["next"] if loaders else 0


def differing_options(name: str, ours: dict[str, Any], theirs: dict[str, Any], but: str = "") -> list[str]:
    """How a learner's task or rule differs from the checkpoint's, option by option, but for one."""
    ours, theirs = _without_addresses(ours[name]), _without_addresses(theirs[name])
    classes = [config["class_path"].rpartition(".")[2] for config in (ours, theirs)]
    if classes[0] != classes[1]:
        return [_differs(f"--model.{name}", *classes)]
    left, right = ours["init_args"], theirs.get("init_args", {})
    # An older version's rule or task may lack an argument: it is at its default.
    return [
        _differs(f"--model.{name}.{key}", left[key], right[key])
        for key in left
        if key in right and left[key] != right[key] and key != but
    ]


def apply_options(model: MetaLearner, checkpoint: dict[str, Any], section: dict[str, Any]) -> None:
    """Puts what is configured over what a checkpoint would restore.

    That is the meta-learning rate with its schedule, and the patience of early stopping. A rate that a
    restart has halved stays the same fraction of the one configured.
    """
    theirs, ours, total = section["model"], model.settings(), model.meta_steps()
    schedule = ("learning_rate", "warmup_steps", "lr_schedule")
    other_schedule = any(key in theirs and ours[key] != theirs[key] for key in schedule)
    if other_schedule or section.get("meta_steps", total) != total:
        (state,) = checkpoint["lr_schedulers"]
        (group,) = checkpoint["optimizer_states"][0]["param_groups"]
        if ours["learning_rate"] != theirs.get("learning_rate", ours["learning_rate"]):
            scale = ours["learning_rate"] / theirs["learning_rate"]
            state["base_lrs"] = [scale * rate for rate in state["base_lrs"]]
            group["initial_lr"] = ours["learning_rate"]
        factor = model.rate_factor(state["last_epoch"], total)
        state["_last_lr"] = [rate * factor for rate in state["base_lrs"]]
        (group["lr"],) = state["_last_lr"]
    for callback in model.trainer.callbacks:  # type: ignore[attr-defined]
        saved = checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(callback, EarlyStopping) and saved is not None:
            saved["patience"] = callback.patience


def _differs(option: str, ours: Any, theirs: Any) -> str:
    return f"{option} is {ours}, the checkpoint's {theirs}"


def _without_addresses(config: Any) -> Any:
    """What has no dotted path is described by its repr, whose address differs from process to process."""
    if isinstance(config, dict):
        return {key: _without_addresses(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [_without_addresses(value) for value in config]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", config) if isinstance(config, str) else config
