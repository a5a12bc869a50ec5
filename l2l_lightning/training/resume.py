"""A run that goes on from a checkpoint with other options: which it can honour, and which it must refuse."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from l2l_lightning.errors import CheckpointError
from l2l_lightning.training import checkpoints
from l2l_lightning.training.data_module import WindowLoader

if TYPE_CHECKING:
    from l2l_lightning.training.meta_learner import MetaLearner

SCHEDULE = ("learning_rate", "warmup_steps", "lr_schedule")


def disagreements(model: MetaLearner, checkpoint: dict[str, Any]) -> list[str]:
    """What keeps a learner from going on with a checkpoint's run: "--model.num_tasks is 4, …" each.

    Task, rule, horizon and seed say what was learned and validated so far: they are the run's. The windows
    that have been run, and the rollout in progress, must be those of the run as it is configured now.
    """
    section = checkpoint[checkpoints.SECTION]
    theirs, ours = section["model"], model.settings()
    found = differing_options("task", ours, theirs) + differing_options("rule", ours, theirs, but=["backend"])
    if _listed(ours["horizon"]) != _listed(theirs.get("horizon", ours["horizon"])):
        found.append(_differs("--model.horizon", ours["horizon"], theirs["horizon"]))
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
    return found + _other_windows(model, checkpoint)


def _other_windows(model: MetaLearner, checkpoint: dict[str, Any]) -> list[str]:
    section = checkpoint[checkpoints.SECTION]
    unroll, num_rollouts = (
        section["model"].get("unroll", model.unrolls),
        section["data"].get("num_rollouts", 100),
    )
    before = WindowLoader(num_rollouts, model.horizons, _listed(unroll))
    now = model.data.windows(model)
    done = checkpoints.position(checkpoint)
    carried = any(rollout is not None for rollout in checkpoint["rollouts"])
    known = done <= min(len(before), len(now)) and (not carried or done < len(now))
    if known and all(before[index] == now[index] for index in range(done)):
        return []
    found = []
    if model.unrolls != _listed(unroll):
        found.append(_differs("--model.unroll", model.unrolls, unroll))
    if model.data.num_rollouts != num_rollouts:
        found.append(_differs("--data.num_rollouts", model.data.num_rollouts, num_rollouts))
    return [f"{', '.join(found)}, and {done} windows have been run, which would have been others"]


def differing_options(
    name: str, ours: dict[str, Any], theirs: dict[str, Any], but: list[str] | None = None
) -> list[str]:
    """How a learner's task or rule differs from the checkpoint's, option by option.

    Args:
        name: "task" or "rule".
        ours: The learner's settings.
        theirs: The checkpoint's.
        but: Arguments that may differ.
    """
    ours, theirs = _without_addresses(ours[name]), _without_addresses(theirs[name])
    classes = [config["class_path"].rpartition(".")[2] for config in (ours, theirs)]
    if classes[0] != classes[1]:
        return [_differs(f"--model.{name}", *classes)]
    left, right = ours["init_args"], theirs.get("init_args", {})
    # An older version's rule or task may lack an argument: it is at its default.
    return [
        _differs(f"--model.{name}.{key}", left[key], right[key])
        for key in left
        if key in right and left[key] != right[key] and key not in (but or [])
    ]


def apply_options(model: MetaLearner, checkpoint: dict[str, Any]) -> None:
    """Puts what is configured over what a checkpoint would restore.

    That is the meta-learning rate with its schedule, the length of the run, and the patience of early
    stopping. A rate that a restart has halved stays the same fraction of the one configured.

    Raises:
        CheckpointError: The checkpoint holds weights alone, or counts that are none, and a run cannot be
            resumed from it.
    """
    if "optimizer_states" not in checkpoint or "lr_schedulers" not in checkpoint:
        raise CheckpointError(
            "the checkpoint (--ckpt_path) holds weights only, from which no run can be resumed: take one "
            "that was written without --checkpoint.save_weights_only"
        )
    _check_progress(model, checkpoint)
    section = checkpoint[checkpoints.SECTION]
    theirs, ours, total = section["model"], model.settings(), model.meta_steps()
    other_schedule = any(key in theirs and ours[key] != theirs[key] for key in SCHEDULE)
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
    if checkpoints.position(checkpoint) < len(model.data.windows(model)):
        _reopen_epoch(checkpoint["loops"]["fit_loop"])
    for callback in model.trainer.callbacks:  # type: ignore[attr-defined]
        saved = checkpoint.get("callbacks", {}).get(getattr(callback, "state_key", None))
        if isinstance(callback, EarlyStopping) and saved is not None:
            saved["patience"] = callback.patience


def _check_progress(model: MetaLearner, checkpoint: dict[str, Any]) -> None:
    """Refuses what Lightning would restore, and fail on later in the run."""
    wrong = []
    trainer: Any = model.trainer
    if not _fits(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict()):
        wrong.append("loops")
    for callback in trainer.callbacks:
        saved = checkpoint.get("callbacks", {}).get(callback.state_key)
        if saved is None:
            continue
        own = callback.state_dict()
        fits = _fits(saved, {key: value for key, value in own.items() if isinstance(value, int | Tensor)})
        if fits and isinstance(callback, ModelCheckpoint):
            best, worst = saved.get("best_k_models"), saved.get("kth_best_model_path")
            scores = best.values() if isinstance(best, dict) else [None]
            fits = all(isinstance(score, Tensor) and score.ndim == 0 for score in scores)
            fits = fits and isinstance(worst, str) and (not worst or worst in best)
        if not fits:
            wrong.append(callback.state_key)
    if wrong:
        raise CheckpointError(
            f"the checkpoint (--ckpt_path) does not hold the course of a run ({', '.join(wrong)})"
        )


def _fits(saved: Any, ours: Any) -> bool:
    """Whether saved counts and scores, in dicts of dicts, can take the place of our own."""
    if isinstance(ours, dict):
        return isinstance(saved, dict) and all(_fits(saved.get(key, own), own) for key, own in ours.items())
    if isinstance(ours, Tensor):
        return isinstance(saved, Tensor) and saved.shape == ours.shape
    return isinstance(saved, int)


def _reopen_epoch(fit_loop: dict[str, Any]) -> None:
    """Has the run's one epoch not be over, as it was if the run was shorter or its steps were limited."""
    for counts in fit_loop["epoch_progress"].values():
        counts["processed"] = counts["completed"] = counts["started"] - 1
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _differs(option: str, ours: Any, theirs: Any) -> str:
    return f"{option} is {ours}, the checkpoint's {theirs}"


def _without_addresses(config: Any) -> Any:
    """What has no dotted path is described by its repr, whose address differs from process to process."""
    if isinstance(config, dict):
        return {key: _without_addresses(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [_without_addresses(value) for value in config]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", config) if isinstance(config, str) else config
