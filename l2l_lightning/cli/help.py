"""The help of the commands that Lightning runs: what this project adds, and Lightning's behind --help-all."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from l2l_lightning.configs import presets

TEXTS = {
    "help": "this page",
    "help-all": "every option, Lightning's too, with types",
    "config": "a preset's name, or a YAML file's path",
    "quick": "a first look: short, and few optimizees",
    "print_config": "print a run's options as YAML, and exit",
    "seed_everything": "seed of every random draw",
    "ckpt_path": "checkpoint to go on from, or to judge",
    "run_folder": "the run's folder, new or interrupted",
    "trust": "modules that a checkpoint may name: a,b",
    "wandb": "Weights & Biases: offline, online or off",
    "wandb_project": "its project",
    "wandb_entity": "its team or user",
    "wandb_group": "its group; the run's name without",
    "wandb_name": "its name of the run",
    "wandb_tags": "its tags: a,b",
    "model.task": "what is optimised: a class or its path",
    "model.task.help": "options of a task, by its class",
    "model.rule": "what is learned: a class or its path",
    "model.rule.help": "options of a rule, by its class",
    "model.horizon": "inner steps of a rollout",
    "model.unroll": "inner steps of a window",
    "model.num_tasks": "optimizees of a meta-step",
    "model.learning_rate": "Adam's rate for φ",
    "model.warmup_steps": "meta-steps until the whole rate",
    "model.lr_schedule": "constant or cosine",
    "model.loss_weights": "uniform, final or held_out",
    "model.second_order": "differentiate gradients too",
    "model.cuda_graphs": "true, false; where they run without",
    "model.num_validation_optimizees": "of a validation or test",
    "model.start_from": "a trained rule that φ starts from",
    "model.checkpoint_every": "keep each k-th state: saves memory",
    "model.history_dtype": "of kept states, or bfloat16",
    "model.estimator": "window, evolution or nres",
    "model.sigma": "perturbation of evolution, nres",
    "data.root": "folder of the task's data set",
    "data.download": "download what is missing there",
    "data.num_rollouts": "length of the meta-training",
    "data.train": "data of yours: a folder or a path",
    "data.validation": "the same, to tune and choose on",
    "data.test": "the same, to report on",
    "data.text": "a text file of yours",
    "data.text_length": "symbols of an input",
    "data.text_symbols": "or bytes",
    "data.image_size": "[height,width] to resize images to",
    "data.memory_limit": "GiB of a split kept in memory",
    "data.num_workers": "processes that load data",
    "comparison.num_optimizees": "fresh ones, for all alike",
    "comparison.num_tuning_optimizees": "to tune baselines on",
    "comparison.horizon": "inner steps; the rule's own without",
    "comparison.baselines": "a list; six of them without",
    "latest.every_n_meta_steps": "what a kill can cost at most",
    "latest.dirpath": "folder of last.ckpt",
    "early_stopping.patience": "validations without a better loss",
    "averaging.decay": "of the mean of φ; 0 is none",
    "collapse.action": "or stop",
    "collapse.patience": "validations at chance",
    "collapse.start_patience": "the same, at the start",
    "collapse.chance": "of the first loss: no better",
    "collapse.max_restarts": "before it stops",
    "out": "folder for curves and summary",
    "tuning_dir": "folder of finished searches",
    "trainer.max_steps": "most meta-steps; -1 is no limit",
    "trainer.max_time": "longest time, as DD:HH:MM:SS",
    "trainer.val_check_interval": "meta-steps between validations",
    "trainer.accelerator": "cpu, gpu or auto",
    "trainer.devices": "how many, or which, as [0,1]",
    "trainer.strategy": "ddp: several devices together",
    "trainer.precision": "32-true, 64-true, bf16-mixed, 16-mixed",
    "trainer.gradient_clip_val": "largest norm of a meta-gradient",
    "trainer.logger": "beside the run's own; false is none",
    "trainer.default_root_dir": "folder of runs; runs without",
    "trainer.enable_progress_bar": "false is no bar and no lines",
}
"""What --help says of an option, in a line; an option that is not here is in --help-all."""

TITLES = {
    "model": "Rule and task (model)",
    "data": "Data",
    "comparison": "Comparison with baselines at the end",
    "latest": "Checkpoint to go on from",
    "early_stopping": "Early stopping",
    "averaging": "Averaging of φ",
    "collapse": "Guard against collapse",
    "trainer": "Lightning's Trainer",
}


class ShowAllHelp(argparse.Action):
    """--help-all: every option, as the parser describes it."""

    def __init__(self, option_strings: Any, **_: Any) -> None:
        text = "Show every option, Lightning's among them, and exit."
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=text)

    def __call__(self, parser: Any, *_: Any) -> None:
        """Prints and exits."""
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def short_help(parser: argparse.ArgumentParser) -> str:
    """Returns the help of a command's parser in lines of TEXTS, the project's own options first."""
    command = parser.prog.replace(" [options]", "")
    page = argparse.ArgumentParser(
        command,
        usage=f"{command} [options]",
        description=f"presets: {', '.join(presets())}",
        epilog="In brackets the default, if the preset says nothing; --print_config shows a run's options.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=80),
        add_help=False,
    )
    sections: dict[str, Any] = {"": page}
    for key, action in sorted(_actions(parser), key=lambda named: _order(named[0])):
        group = key.rpartition(".")[0].partition(".")[0]
        if group not in sections:
            sections[group] = page.add_argument_group(TITLES[group])
        # What it takes is no matter here: nothing is parsed by this page.
        text = (TEXTS[key] + _default(action)).replace("%", "%%")
        sections[group].add_argument(*_names(action), action="store_true", help=text)
    return page.format_help()


def _names(action: argparse.Action) -> list[str]:
    return [name for name in action.option_strings if not name.endswith("+")]


def _actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """The options that TEXTS has, by name."""
    for action in parser._actions:
        key = "".join(_names(action)[-1:]).lstrip("-")
        if key in TEXTS:
            yield key, action


def _order(key: str) -> int:
    return [*TEXTS].index(key)


def _default(action: argparse.Action) -> str:
    """An option's default, in brackets, if it is a short one."""
    default = action.default
    if isinstance(default, bool):
        return f" [{str(default).lower()}]"
    is_short = isinstance(default, int | float | str) and default not in (argparse.SUPPRESS, "auto")
    return f" [{default}]" if is_short else ""
