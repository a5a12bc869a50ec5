"""Where a run is logged: metrics.csv, Weights & Biases, and the loggers that a user adds."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger, WandbLogger

from l2l_lightning.errors import CommandLineError
from l2l_lightning.training.metrics_log import MetricsLog

PROJECT = "l2l-lightning"
"""The W&B project of runs that name none."""

IN_A_SWEEP = "WANDB_SWEEP_ID"
"""The variable by which `wandb agent` tells a run that it belongs to a sweep."""


def add_wandb_options(parser: LightningArgumentParser) -> None:
    """Adds --wandb, and --wandb_project and its kin, which W&B's own variables stand in for."""
    parser.add_argument(
        "--wandb",
        type=Literal["offline", "online", "off"] | None,
        default=None,
        help="Weights & Biases: offline needs no network and no account; `wandb sync` uploads it later. "
        "Without it, as the variables WANDB_MODE and WANDB_DISABLED say, or else offline; online in a sweep.",
    )
    for name, what in {
        "project": f"W&B project; without, WANDB_PROJECT or {PROJECT}. A sweep has its own.",
        "entity": "W&B team or user; without, WANDB_ENTITY or your own.",
        "group": "W&B group; without, WANDB_RUN_GROUP or the run's name.",
        "name": "W&B name of the run; without, WANDB_NAME or the run's name and time.",
    }.items():
        parser.add_argument(f"--wandb_{name}", type=str | None, default=None, help=what)
    parser.add_argument(
        "--wandb_tags",
        type=list[str] | str | None,
        default=None,
        help="W&B tags, as a,b or [a,b]; without, WANDB_TAGS.",
    )


def run_loggers(folder: Path, name: str, options: Any, theirs: Iterable[Logger]) -> list[Logger]:
    """Returns a fit's loggers: metrics.csv, W&B, and the user's.

    Args:
        folder: The run's.
        name: The run's (`run_name`).
        options: The command line's.
        theirs: The user's own (--trainer.logger). A WandbLogger among them takes the place of ours.

    Raises:
        CommandLineError: W&B is asked for by name, and its package is not installed; or a tag is too long.
    """
    theirs = list(theirs)
    loggers: list[Logger] = [MetricsLog(folder)]
    mode = options.wandb or _wandb_mode_of_environment()
    if mode != "off" and not any(isinstance(logger, WandbLogger) for logger in theirs):
        loggers += _wandb_logger(folder, name, options, mode)
    return loggers + theirs


def _wandb_logger(folder: Path, name: str, options: Any, mode: str) -> list[Logger]:
    """Ours, or none, which is said, where the package is not installed and nobody asked for it by name."""
    try:
        import wandb
    except ImportError as error:
        if mode == "online":
            raise CommandLineError("--wandb online needs the package wandb: pip install wandb") from error
        print("The package wandb is not installed: nothing is logged to it (--wandb off asks for none)")
        return []

    def chosen(option: str, variable: str, default: str | None = None) -> str | None:
        given: str | None = options[f"wandb_{option}"]
        return given or (None if os.environ.get(variable) else default)  # which wandb reads itself

    tags = options.wandb_tags
    tags = [tag.strip() for tag in tags.split(",")] if isinstance(tags, str) else tags
    if wrong := [tag for tag in tags or () if not 1 <= len(tag) <= 64]:
        raise CommandLineError(f"--wandb_tags: a tag has 1 to 64 characters, got {wrong[0]!r}")
    kept = folder / "wandb-id.txt"  # a run that goes on is the same run there too
    in_a_sweep = bool(os.environ.get(IN_A_SWEEP))  # whose project, entity and run's id hold
    identity = None
    if kept.is_file() and not in_a_sweep:
        identity = kept.read_text(encoding="utf-8").strip()
    elif not os.environ.get("WANDB_RUN_ID") and not in_a_sweep:
        identity = uuid.uuid4().hex[:12]
    project = chosen("project", "WANDB_PROJECT", None if in_a_sweep else PROJECT)
    # Offline, its messages would bury the table that a run ends with.
    settings: dict[str, Any] = {"quiet": mode == "offline"}
    if "WANDB_CONSOLE" not in os.environ:
        settings["console"] = "off"  # a progress bar would fill it with control characters, a megabyte a run
    logger = WandbLogger(
        name=chosen("name", "WANDB_NAME", f"{name}/{folder.name}"),
        resume="allow",
        save_dir=folder,
        offline=mode == "offline",
        group=chosen("group", "WANDB_RUN_GROUP", name),
        job_type="meta-train",
        tags=tags,
        settings=wandb.Settings(**settings),
        project=project,
        entity=chosen("entity", "WANDB_ENTITY"),
        id=identity,
    )
    # Lightning hands over an argument that wandb has given up, and warns of, and a project of its own.
    handed_over = vars(logger).get("_wandb_init", {})
    handed_over.pop("anonymous", None)
    if project is None:
        handed_over.pop("project", None)
    return [logger]


def _wandb_mode_of_environment() -> str:
    """The mode that W&B's own variables ask for; if they are silent offline, or online in a sweep."""
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
    default = "online" if os.environ.get(IN_A_SWEEP) else "offline"
    mode = "disabled" if disabled else os.environ.get("WANDB_MODE", default).lower()
    return {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(mode, "online")


def given_loggers(value: Any) -> list[Logger]:
    """Returns what --trainer.logger names as a list: none for true, false or nothing."""
    if isinstance(value, bool) or value is None:
        return []
    return list(value) if isinstance(value, Iterable) else [value]


def set_logger_defaults(parser: LightningArgumentParser, kind: type[Logger]) -> None:
    """Gives a logger's save_dir a default, the run's folder, and a folder in it that its name says."""
    options = {action.dest: action.required for action in parser._actions}
    if options.get("save_dir"):  # it is required: TensorBoardLogger, CSVLogger
        folder = re.sub("logger$", "", kind.__name__.lower())
        parser.set_defaults({"save_dir": ".", "name": "", "version": folder})


def in_folder(folder: Path) -> Callable[..., Logger]:
    """Returns what makes loggers, of which a relative save_dir is in a folder."""

    def make(kind: type[Logger], *arguments: Any, **options: Any) -> Logger:
        if options.get("save_dir") is not None:
            options["save_dir"] = str(folder / options["save_dir"])
        return kind(*arguments, **options)

    return make
