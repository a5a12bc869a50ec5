"""LightningCLI with the project's loggers, callbacks and run folders: fit, validate, test, tune, compare."""

from __future__ import annotations

import math
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionFail
from l2l_kernels import choose
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from l2l_lightning.cli.arguments import QUICK_NOTE, QUICK_OPTIONS
from l2l_lightning.cli.help import ShowAllHelp, short_help
from l2l_lightning.cli.loggers import (
    add_wandb_options,
    given_loggers,
    in_folder,
    run_loggers,
    set_logger_defaults,
)
from l2l_lightning.cli.run_folder import RunLock, folder_of_run, last_checkpoint, missing, new_run_folder
from l2l_lightning.comparison.settings import plain
from l2l_lightning.console import is_drawn_on, make_console
from l2l_lightning.errors import CommandLineError, TaskError
from l2l_lightning.files import write_atomically
from l2l_lightning.program import program
from l2l_lightning.progress import LINE_EVERY
from l2l_lightning.rollout.cuda_graphs import check_available
from l2l_lightning.training.data_module import MetaData
from l2l_lightning.training.latest_checkpoint import LatestCheckpoint
from l2l_lightning.training.meta_learner import MetaLearner, check_precision
from l2l_lightning.training.metrics_log import MetricsLog
from l2l_lightning.training.presets import CALLBACK_DEFAULTS, CALLBACKS, TRAINER_DEFAULTS
from l2l_lightning.training.progress import MetaStepBar, ProgressLines
from l2l_lightning.training.trainer import ComparisonSettings, MetaTrainer

OFTEN_UNNAMED = ("accelerator", "devices", "strategy", "precision", "plugins", "max_time")
"""Options of --trainer that Lightning complains about by the name of a device, a package or a class."""


class RunConfig(SaveConfigCallback):
    """Writes a run's options into its folder once they have been accepted: when training begins."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass  # not yet: a checkpoint may still refuse to go on with them

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / self.config_filename
        write_atomically(path, self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and logger.version:
                write_atomically(path.with_name("wandb-id.txt"), str(logger.version))


class _Parser(LightningArgumentParser):
    """Lightning's parser, which never reads an object from a file that an option of its type happens to name.

    A checkpoint's task could name one. Files of options are given with --config. Its help is the short one,
    unless all of it is asked for.
    """

    shows_all = False

    def format_help(self, *arguments: Any) -> str:
        is_command = "--help-all" in self._option_string_actions
        short = is_command and not self.shows_all
        return short_help(self) if short else super().format_help(*arguments)

    def add_class_arguments(self, theclass: type, *arguments: Any, **options: Any) -> Any:
        added = super().add_class_arguments(theclass, *arguments, **{**options, "sub_configs": False})
        if isinstance(theclass, type) and issubclass(theclass, Logger):
            set_logger_defaults(self, theclass)
        return added


class MetaLearningCLI(LightningCLI):
    """LightningCLI with the project's loggers, callbacks and run folders."""

    run_name = "run"
    lock: RunLock | None = None
    """What the first process holds of the fit that is running."""

    @classmethod
    def build(cls, arguments: list[str], *, run: bool = True) -> MetaLearningCLI:
        """Parses the arguments and instantiates what they describe; runs the subcommand among them.

        Args:
            arguments: With `run` a subcommand and its options, else the options of a fit; presets as paths.
            run: False leaves it to the caller to use the trainer, the model and the data module.
        """
        return cls(
            MetaLearner,
            MetaData,
            trainer_class=MetaTrainer,
            parser_class=_Parser,
            trainer_defaults={**TRAINER_DEFAULTS},
            save_config_callback=RunConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "prog": program()},
            args=arguments,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        loaders = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        ours = {*loaders, "comparison", "task"}
        return {"fit": loaders, "validate": loaders, "test": loaders, "tune": ours, "compare": ours}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--help-all", action=ShowAllHelp)
        # `prepare` puts the values in its place.
        parser.add_argument("--quick", action=ActionFail(message="--quick takes no value"))
        add_wandb_options(parser)
        parser.add_argument(
            "--run_folder",
            type=str | None,
            help="fit: the run's folder, instead of a new one; a run that was interrupted in it goes on from "
            "its checkpoints/last.ckpt.",
        )
        parser.add_argument(
            "--trust",
            type=str | None,
            default=None,
            help="Modules of yours, separated by commas, that may be imported if a checkpoint names them.",
        )
        parser.add_argument("--comparison", type=ComparisonSettings, default=ComparisonSettings())
        for name, kind in CALLBACKS.items():
            parser.add_lightning_class_args(kind, name)
            defaults = CALLBACK_DEFAULTS.get(name, {})
            parser.set_defaults({f"{name}.{option}": value for option, value in defaults.items()})
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # Lightning would warn that they are not sys.argv's

    def _parse_ckpt_path(self) -> None:
        pass  # `prepare` puts a checkpoint's options before the user's own, not over them

    def before_instantiate_classes(self) -> None:
        config = self._options
        _check_trainer_options(config)
        self.root = Path(config.trainer.default_root_dir or "runs")
        self.run_folder = self.root
        if config.run_folder and self.subcommand != "fit":
            raise CommandLineError(f"--run_folder is where a fit goes on; {self.subcommand} has none")
        if config.run_folder and config.latest.dirpath:
            raise CommandLineError(
                "--latest.dirpath must not be set with --run_folder, where the run goes on from its "
                "checkpoints/last.ckpt"
            )
        self._choose_run_folder(config)
        self.parser.add_instantiator(in_folder(self.run_folder), Logger)

    def _choose_run_folder(self, config: Any) -> None:
        if self.subcommand == "fit":
            named = Path(config.run_folder) if config.run_folder else folder_of_run(config.ckpt_path)
            if getattr(rank_zero_only, "rank", 0) == 0:
                made = missing(named or self.root / self.run_name)
                self.run_folder = named or new_run_folder(self.root / self.run_name)
                MetaLearningCLI.lock = RunLock(self.run_folder, made if named else [self.run_folder, *made])
            else:  # the first process's is the run's, and it tells the others where that is
                self.run_folder = named or self.root / self.run_name
            # The saved options describe the run; whoever repeats it wants another folder.
            config.run_folder = None
            if (self.run_folder / "config.yaml").exists():  # which says how the run began, and stays
                self.save_config_kwargs["config_filename"] = f"config-{datetime.now():%Y%m%d-%H%M%S-%f}.yaml"
        else:
            # What runs on a checkpoint reports; it leaves no run behind.
            self.save_config_callback = None

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise CommandLineError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the loggers, unless the user wants none: a run's own before the user's."""
        config = self._options
        kwargs["default_root_dir"] = str(self.run_folder)
        if config.trainer.logger is not False:
            loggers = given_loggers(self._get(self.config_init, "trainer").logger)
            if self.subcommand == "fit":
                loggers = run_loggers(self.run_folder, self.run_name, config, loggers)
            elif self.subcommand is None:
                loggers = [MetricsLog(self.run_folder), *loggers]
            kwargs["logger"] = loggers or False
        self.trainer_defaults["callbacks"] = []
        shows_progress = config.trainer.enable_progress_bar is not False
        if shows_progress:
            drawn = is_drawn_on(make_console())
            kwargs["enable_progress_bar"] = drawn  # where it is not, Lightning would draw one of its own
            progress: list[Callback] = [ProgressLines(math.inf if drawn else LINE_EVERY)]
            self.trainer_defaults["callbacks"] += [*progress, *([MetaStepBar(leave=True)] if drawn else [])]
        if kwargs.get("logger"):
            self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ImportError, RuntimeError, TypeError, ValueError, MisconfigurationException) as error:
            words = set(re.findall(r"\w+", str(error)))
            named = [key for key in vars(config.trainer) if key in words]
            named = named or [key for key in OFTEN_UNNAMED if config.trainer[key] not in (None, "auto")]
            raise CommandLineError(f"{error} ({', '.join(f'--trainer.{key}' for key in named)})") from error
        trainer.shows_progress = shows_progress  # type: ignore[attr-defined]
        self._dump_config()
        trainer.options = plain(self.config_dump)  # type: ignore[attr-defined]
        return trainer

    @property
    def _options(self) -> Any:
        """The options as given: the subcommand's, where there is one."""
        return self.config[self.subcommand] if self.subcommand else self.config

    @property
    def _comparison(self) -> ComparisonSettings:
        settings: ComparisonSettings = self.config_init[self.subcommand].comparison
        return settings

    def before_fit(self) -> None:
        self._try_task()
        device = self.trainer.strategy.root_device
        choose(device, getattr(self.model.rule, "backend", None))
        check_available(self.model.cuda_graphs, device)
        self.limit_validation()
        checkpoint = last_checkpoint(self.run_folder)
        if checkpoint:
            self.config_init["fit"]["ckpt_path"] = str(checkpoint)
        if not self.trainer.is_global_zero:
            return
        print(f"Task: {self.model.task.describe()}\nData: {self.datamodule.source}\nRun:  {self.run_folder}")
        if checkpoint:
            print(f"The run goes on from {checkpoint}")

    def _try_task(self) -> None:
        """Evaluates the task: what is wrong with one of the user's shows at once."""
        try:
            self.model.try_task(self.datamodule)
        except TaskError as error:
            raise CommandLineError(f"--model.task {error}") from error

    before_validate = before_test = before_tune = before_compare = _try_task

    def limit_validation(self) -> None:
        """Validates at least once: Lightning refuses an interval that is longer than the run."""
        windows = self.datamodule.num_windows(self.model, self.trainer)
        if not windows:
            limit = self.trainer.limit_train_batches
            raise CommandLineError(
                f"--trainer.limit_train_batches {limit:g} leaves none of the run's "
                f"{len(self.datamodule.windows(self.model))} meta-steps"
            )
        interval = getattr(self.trainer, "val_check_interval", None)  # there is none if it is a time
        if isinstance(interval, int) and interval > windows:
            print(f"The run has {windows} meta-steps only: it is validated once, at its end.")
            self.trainer.val_check_interval = windows

    def after_fit(self) -> None:
        trainer: Any = self.trainer
        if not trainer.is_global_zero or trainer.interrupted:
            return
        best = trainer.checkpoint_callback.best_model_path if trainer.checkpoint_callback else ""
        if best:
            print(f"Best checkpoint: {best}")
        try:
            self.compare(
                self.model,
                self.datamodule,
                ckpt_path=best or None,
                out=str(self.run_folder),
                tuning_dir=str(self.root / "tuning"),
            )
        except (KeyboardInterrupt, SystemExit):
            latest = next(call for call in trainer.callbacks if isinstance(call, LatestCheckpoint))
            print(
                f"stopped in the final comparison; go on with: {latest.command(self.model)}", file=sys.stderr
            )
            raise

    def tune(self, model: MetaLearner, datamodule: MetaData, **arguments: Any) -> None:
        """Runs MetaTrainer.tune with the command line's settings, on every member of a mixture."""
        trainer: Any = self.trainer
        for task in model.task.members:
            trainer.tune(model, datamodule, self._comparison, task=task, **arguments)

    def compare(self, model: MetaLearner, datamodule: MetaData, out: str, **arguments: Any) -> None:
        """Runs MetaTrainer.compare with the command line's settings, on every member of a mixture."""
        trainer: Any = self.trainer
        for number, task in enumerate(model.task.members, start=1):
            folder = out if len(model.task.members) == 1 else f"{out}/member-{number}"
            trainer.compare(model, datamodule, self._comparison, out=folder, task=task, **arguments)


def _check_trainer_options(config: Any) -> None:
    """Refuses what Lightning takes and fails on later, or takes in silence."""
    trainer = config.trainer
    interval = trainer.val_check_interval
    kept = "a run is compared with the best φ that it has kept, and goes on from its newest"
    one_batch = "a validation is one batch, whose size is --model.num_validation_optimizees"
    refused = [
        ("gradient_clip_val", (trainer.gradient_clip_val or 0) < 0, "be at least 0", ""),
        ("log_every_n_steps", (trainer.log_every_n_steps or 0) < 0, "be at least 0", ""),
        ("accumulate_grad_batches", trainer.accumulate_grad_batches < 1, "be at least 1", ""),
        ("max_epochs", trainer.max_epochs == 0, "be at least 1", "-1 is no limit"),
        ("max_steps", trainer.max_steps == 0, "be at least 1", "-1 is no limit"),
        ("val_check_interval", isinstance(interval, int | float) and interval <= 0, "be positive", ""),
        (
            "check_val_every_n_epoch",
            trainer.check_val_every_n_epoch not in (None, 1),
            "be 1",
            "a run is one epoch; --trainer.val_check_interval says how often it is validated",
        ),
        *(
            (name, isinstance(trainer[name], float) and trainer[name] % 1 > 0, "be a whole number", one_batch)
            for name in ("overfit_batches", "limit_val_batches", "limit_test_batches")
        ),
        ("enable_checkpointing", trainer.enable_checkpointing is False, "not be false", kept),
        ("barebones", trainer.barebones is True, "not be true", kept),
        (
            "strategy",
            re.search("spawn|forkserver", str(trainer.strategy)),
            "not start its processes by pickling the run (spawn)",
            "ddp runs on any number of devices",
        ),
    ]
    for name, is_wrong, what, why in refused:
        if is_wrong:
            reason = f": {why}" if why else ""
            raise CommandLineError(f"--trainer.{name} must {what}, got {trainer[name]}{reason}")
    if config.early_stopping.patience < 0:
        raise CommandLineError(
            f"--early_stopping.patience must be at least 0, got {config.early_stopping.patience}"
        )
    check_precision(str(trainer.precision))


def run(arguments: list[str], name: str) -> None:
    """Runs one of LIGHTNING_COMMANDS, with the arguments and the run's name that `prepare` gave."""
    MetaLearningCLI.run_name = name
    if QUICK_OPTIONS in arguments:
        rank_zero_only(print)(QUICK_NOTE)
    try:
        MetaLearningCLI.build(arguments)
    finally:
        if MetaLearningCLI.lock is not None:
            MetaLearningCLI.lock.release()
            MetaLearningCLI.lock = None
    if torch.distributed.is_initialized():
        # Lightning leaves gloo's threads, which may abort the exiting process: torchrun would start again.
        torch.distributed.destroy_process_group()


def _seed(value: bool | int) -> int:
    """`seed_everything` as the seed of the rollouts."""
    if isinstance(value, bool):
        raise ValueError("--seed_everything must be a whole number: every random draw is derived from it")
    if not 0 <= value < 2**32:
        raise ValueError(f"--seed_everything must be in [0, 2^32), got {value}")
    return value
