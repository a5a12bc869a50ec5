"""A Trainer that also tunes the baselines and compares a trained rule with them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from l2l_lightning.checks import check_choice, check_whole_numbers
from l2l_lightning.comparison.baselines import BASELINES, TunedBaseline, setting_text
from l2l_lightning.comparison.compare import LEARNED, Comparison, Contender, baseline_contender, compare
from l2l_lightning.comparison.report import comparison_table, write_comparison
from l2l_lightning.comparison.tuning import tune
from l2l_lightning.console import make_console
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import run_rule
from l2l_lightning.tasks.base import Task
from l2l_lightning.training.data_module import MetaData
from l2l_lightning.training.meta_learner import MetaLearner


@dataclass(frozen=True)
class ComparisonSettings:
    """How the learned optimizer is compared with the baselines.

    Args:
        num_optimizees: Fresh optimizees from the test data, the same for every optimizer.
        num_tuning_optimizees: Optimizees from the validation data that each learning rate is scored on.
        horizon: Steps per rollout; None is the one that the rule was trained for.
        baselines: Which hand-designed optimizers.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    num_optimizees: int = 32
    num_tuning_optimizees: int = 20
    horizon: int | None = None
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))

    def __post_init__(self) -> None:
        for name in ("num_optimizees", "num_tuning_optimizees", "horizon"):
            if (value := getattr(self, name)) is not None:
                check_whole_numbers(1, 10**7, **{f"comparison.{name}": value})
        if not self.baselines:
            raise ValueError(f"comparison.baselines must name at least one of {', '.join(BASELINES)}")
        for name in self.baselines:
            check_choice(list(BASELINES), **{"comparison.baselines": name})


class MetaTrainer(Trainer):
    """Lightning's Trainer, with `tune` and `compare` beside fit, validate and test."""

    def tune(
        self,
        model: MetaLearner,
        datamodule: MetaData,
        comparison: ComparisonSettings | None = None,
        tuning_dir: str | None = None,
        task: Task | None = None,
    ) -> dict[str, TunedBaseline]:
        """Finds the best learning rate of every baseline on a task, and prints them.

        Args:
            model: Names the task, the horizon and the seed.
            datamodule: Its validation images are what the baselines are tuned on.
            comparison: Which baselines, and on how many optimizees.
            tuning_dir: Where finished searches are kept and found again; None is "tuning" under the
                default_root_dir.
            task: What to tune on; None is the model's.

        Raises:
            ValueError: The task is a mixture: it has no optimizees of its own.
        """
        comparison = comparison or ComparisonSettings()
        task = _one_kind(task or model.task)
        datamodule.load(task)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, transient=True) as progress:
            bar = progress.add_task("Tuning the baselines", total=None)

            def report(name: str, rate: float, score: float) -> None:
                progress.update(bar, description=f"Tuning {name}: learning rate {rate:g} gives {score:.4g}")

            horizon = comparison.horizon or model.horizon
            tuned = tune(
                task,
                datamodule.images("validation", self.strategy.root_device),
                [horizon],
                model.seed,
                num_optimizees=comparison.num_tuning_optimizees,
                baselines=[BASELINES[name] for name in comparison.baselines],
                cache_dir=tuning_dir or Path(self.default_root_dir) / "tuning",
                device=self.strategy.root_device,
                progress=report,
            )[horizon]
        make_console().print(tuning_table(tuned.values(), task.describe()))
        return tuned

    def compare(
        self,
        model: MetaLearner,
        datamodule: MetaData,
        comparison: ComparisonSettings | None = None,
        ckpt_path: str | None = None,
        out: str = "comparison",
        tuning_dir: str | None = None,
        task: Task | None = None,
    ) -> Comparison:
        """Compares a trained rule with tuned baselines on fresh optimizees, and writes curves and a summary.

        Args:
            model: Holds the rule, the task, the horizon and the seed.
            datamodule: Baselines are tuned on its validation images; all are compared on its test images.
            comparison: On how many optimizees, over how many steps, with which baselines.
            ckpt_path: Checkpoint to take φ from; None compares the rule as it is.
            out: Folder for curves.csv, curves.png and summary.json.
            tuning_dir: As for `tune`.
            task: What to compare on; None is the model's.

        Raises:
            CheckpointError: ckpt_path is no checkpoint of a MetaLearner, or its rule has another shape.
            ValueError: The task is a mixture: compare on its members, one at a time.
        """
        comparison = comparison or ComparisonSettings()
        task = _one_kind(task or model.task)
        if ckpt_path:
            model.load_phi(ckpt_path)
        tuned = self.tune(model, datamodule, comparison, tuning_dir, task)
        device = self.strategy.root_device
        model.to(device).eval()
        make_optimizees = functools.partial(
            Optimizees,
            task,
            datamodule.images("test", device),
            model.seed,
            "test",
            range(comparison.num_optimizees),
            device,
        )
        learned = Contender(LEARNED, functools.partial(run_rule, model.rule))
        contenders = [learned, *(baseline_contender(t) for t in tuned.values())]
        result = compare(contenders, make_optimizees, comparison.horizon or model.horizon, seed=model.seed)
        write_comparison(result, Path(out))
        for logger in self.loggers:
            if isinstance(logger, WandbLogger):
                # wandb is needed by those who log to it only.
                from l2l_lightning.comparison.wandb_curves import log_comparison

                log_comparison(logger, result)
        console = make_console()
        console.print(comparison_table(result))
        console.print(f"Data: {datamodule.source}. Curves and summary: {out}", soft_wrap=True)
        return result


def tuning_table(tuned: Iterable[TunedBaseline], task: str) -> Table:
    """One row per baseline: its best learning rate, its setting if any is not the default, and its score."""
    tuned = list(tuned)
    with_settings = any(baseline.setting for baseline in tuned)
    table = Table(title=f"Tuned on {task}")
    table.add_column("baseline")
    table.add_column("learning rate", justify="right")
    if with_settings:
        table.add_column("setting")
    for column in ("final loss", "runs"):
        table.add_column(column, justify="right")
    for baseline in tuned:
        table.add_row(
            baseline.baseline.name,
            f"{baseline.learning_rate:g}" + (" (edge of the search)" if baseline.at_edge else ""),
            *([setting_text(baseline.setting)] if with_settings else []),
            f"{baseline.scores[baseline.learning_rate]:.4g}",
            str(len(baseline.trials)),
        )
    return table


def _one_kind(task: Task) -> Task:
    """The task, unless it is a mixture."""
    if len(task.members) > 1:
        raise ValueError(
            f"{task.describe()} is compared one member at a time: pass one of task.members as task"
        )
    return task
