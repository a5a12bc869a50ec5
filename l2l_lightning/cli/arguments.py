"""What was typed, made ready for Lightning's command line: presets, a checkpoint's options, a name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from l2l_lightning.cli.run_folder import last_checkpoint, newest_config
from l2l_lightning.cli.run_name import run_name
from l2l_lightning.configs import DEFAULT_PRESET, presets
from l2l_lightning.data.own import NAMES
from l2l_lightning.errors import CommandLineError
from l2l_lightning.trust import foreign_references, refuse_foreign

LIGHTNING_COMMANDS = {
    "fit": "meta-train a rule, then compare it with tuned baselines",
    "validate": "run a checkpoint's rule on held-out optimizees",
    "test": "run a checkpoint's rule on test optimizees",
    "tune": "find the baselines' learning rates for a task",
    "compare": "a checkpoint's rule beside tuned baselines, or runs: RUN RUN",
}
COMMANDS = LIGHTNING_COMMANDS | {
    "plot": "draw the curves of a finished run, as PNG, PDF or SVG",
    "reproduce": "the study's and the paper's experiments, and REPORT.md",
    "export": "write a checkpoint's rule, and a card, as files to share",
    "info": "versions, devices, kernel backends, presets and caches",
}
"""Every command, with what it does."""

QUICK = {
    "data": {"num_rollouts": 10},
    "model": {"num_validation_optimizees": 4},
    "trainer": {"val_check_interval": 5},
    "comparison": {"num_optimizees": 8, "num_tuning_optimizees": 4, "baselines": ["sgd", "adam"]},
}
"""The options that --quick stands for. Others that are typed hold beside it, as beside a preset."""

QUICK_OPTIONS = json.dumps(QUICK)

QUICK_NOTE = (
    "A first look (--quick): 10 rollouts, validations of 4 optimizees, and a comparison on 8\n"
    "with sgd and adam, tuned on 4. Its numbers mean little."
)

NEEDS_CHECKPOINT = ("validate", "test", "compare")


def names_runs(arguments: Sequence[str]) -> bool:
    """Tells whether a command line compares finished runs, and not a checkpoint's rule.

    Example:
        >>> names_runs(["compare", "runs/a", "runs/b"]), names_runs(["compare", "--ckpt_path", "last.ckpt"])
        (True, False)
    """
    return len(arguments) > 1 and arguments[0] == "compare" and not arguments[1].startswith("-")


def prepare(arguments: list[str]) -> tuple[list[str], str]:
    """Expands presets' short names, puts a checkpoint's configuration first, and names the run."""
    if not arguments or not (arguments[0].startswith("-") or arguments[0] in COMMANDS):
        given = f"there is no command {arguments[0]}" if arguments else "no command was given"
        raise CommandLineError(f"{given}: choose from {', '.join(COMMANDS)}")
    if arguments[0] not in LIGHTNING_COMMANDS:
        return arguments, "run"
    subcommand, *rest = arguments
    expanded, configs = _expand_configs(rest)
    options = dict(_given_options(rest))
    checkpoint, folder = options.get("--ckpt_path"), options.get("--run_folder")
    interrupted = last_checkpoint(Path(folder)) if folder and subcommand == "fit" else None
    if interrupted:
        checkpoint, configs = str(interrupted), configs or [DEFAULT_PRESET]
    base: list[str] = []
    if checkpoint is not None:
        trust = [*filter(None, options.get("--trust", "").split(",")), *_named_code(expanded)]
        base = ["--config", json.dumps(_checkpoint_config(checkpoint, subcommand, trust))]
    elif subcommand in NEEDS_CHECKPOINT and not {"-h", "--help", "--help-all"} & {*rest}:
        runs = ", or begin with the folders of finished runs" if subcommand == "compare" else ""
        raise CommandLineError(f"{subcommand} needs a trained rule: give a checkpoint with --ckpt_path{runs}")
    elif not configs:
        base, _ = _expand_configs(["--config", DEFAULT_PRESET])
    return [subcommand, *base, *expanded], run_name(configs[-1] if configs else checkpoint, options)


def _expand_configs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments with presets, files of options and --quick replaced by their contents; the files' names.

    The files come first: an option that is typed holds wherever it stands, as a sweep puts it anywhere.
    """
    shipped, files, options, configs = presets(), [], [], []
    quick: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, given, value = argument.partition("=")
        if argument == "--quick":
            quick = ["--config", QUICK_OPTIONS]
            continue
        if flag not in ("--config", "-c"):
            options.append(argument)
            continue
        config = value if given else next(rest, None)
        if config is None:
            raise CommandLineError("--config needs the name of a preset or a path")
        path = shipped.get(config, Path(config))
        if not path.is_file():
            raise CommandLineError(
                f"--config {config}: no such file or preset; the presets are {', '.join(shipped)}"
            )
        configs.append(config)
        # Read here, as UTF-8: jsonargparse would read it in whatever encoding the locale has.
        files += ["--config", json.dumps(_read_yaml(path, f"--config {config}"), default=str)]
    return [*files, *quick, *options], configs


def _given_options(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Options with their values, in either spelling, in their order."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        name, given, value = argument.partition("=")
        if name.startswith("-") and (given or following is not None):
            yield name, value if given else following


def _named_code(arguments: list[str]) -> list[str]:
    """Code that the command itself names, in its options or in the files of options.

    It would be imported without a checkpoint, and a checkpoint that says the same says nothing new.
    """
    found: list[str] = []
    for name, value in _given_options(arguments):
        keys = name.removeprefix("--").split(".")
        if name == "--config":
            config = json.loads(value)
            named: Any = {key: config.get(key) for key in ("model", "trainer")}
            if isinstance(config.get("data"), dict):
                named |= {key: config["data"].get(key) for key in NAMES}
        elif keys[0] in ("model", "trainer") or (keys[0] == "data" and keys[-1] in NAMES):
            named = {keys[-1]: value}
        else:
            continue
        found += foreign_references(named)
    return found


def _checkpoint_config(path: str, subcommand: str, trust: Sequence[str]) -> dict[str, Any]:
    """The configuration that a checkpoint was trained with; the user's own options override it."""
    # Here, for they import Lightning, which takes seconds that a mistyped command need not wait for.
    from l2l_lightning.cli.stored_options import resumed_options
    from l2l_lightning.training import checkpoints
    from l2l_lightning.training.data_settings import named_code
    from l2l_lightning.training.meta_learner import read_section, stored_rule

    section = read_section(path, checkpoints.read(path))
    code = {name: section["model"][name] for name in ("task", "rule")} | named_code(section["data"])
    refuse_foreign(path, code, trust)
    stored_rule(path, section)
    config = {key: section[key] for key in ("seed_everything", "model", "data")}
    saved = newest_config(Path(path).resolve().parent.parent)
    if subcommand == "fit" and saved:
        # Resuming: the run's own trainer settings as well.
        options = _read_yaml(saved, f"{saved}, which a resumed run reads,")
        return {**resumed_options(saved, options, trust), **config}
    return config


def _read_yaml(path: Path, name: str) -> dict[str, Any]:
    """A file of options; a CommandLineError that begins with the name says what else it is."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CommandLineError(f"{name} is not YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise CommandLineError(f"{name} is not a configuration of this program: it holds no options")
    return config


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())
