"""A Trainer that also tunes the baselines and compares a trained rule with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning.pytorch import Trainer

from l2l_lightning.checks import check_choice, check_whole_numbers
from l2l_lightning.comparison.baselines import BASELINES, Baseline, TunedBaseline, setting_text
from l2l_lightning.comparison.compare import Contender, baseline_contender, compare
from l2l_lightning.comparison.loggers import log_comparison
from l2l_lightning.comparison.report import write_comparison
from l2l_lightning.comparison.result import LEARNED, Comparison
from l2l_lightning.comparison.tuning import tune
from l2l_lightning.console import make_console
from l2l_lightning.progress import WorkProgress
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import run_rule
from l2l_lightning.tables import Column, FittingTable
from l2l_lightning.tasks.base import Task
from l2l_lightning.training.data_module import MetaData
from l2l_lightning.training.meta_learner import MetaLearner
from l2l_lightning.training.progress import FIRST_AFTER
from l2l_lightning.training.run_settings import run_settings


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

    shows_progress = True
    """Whether `tune` and `compare` say how far they are, once they take more than some seconds."""

    options: Mapping[str, Any] = MappingProxyType({})
    """The options that a command line was given, as in config.yaml: for its loggers and summary.json."""

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
        baselines = [BASELINES[name] for name in comparison.baselines]
        horizon = comparison.horizon or model.horizon
        with self._progress(len(baselines), "runs") as progress:
            tuned = tune(
                task,
                datamodule.images("validation", self.strategy.root_device),
                [horizon],
                model.seed,
                num_optimizees=comparison.num_tuning_optimizees,
                baselines=baselines,
                cache_dir=tuning_dir or Path(self.default_root_dir) / "tuning",
                device=self.strategy.root_device,
                progress=_searches(baselines, progress),
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
        horizon = comparison.horizon or model.horizon
        settings = run_settings(model, datamodule, {"comparison": asdict(comparison), **self.options})
        with self._progress(len(contenders), "optimizers") as progress:
            result = compare(
                contenders,
                make_optimizees,
                horizon,
                seed=model.seed,
                settings=settings,
                progress=_rollouts(comparison.num_optimizees, progress),
            )
        write_comparison(result, Path(out))
        console = make_console()
        console.print(result.table())
        console.print(f"Data: {datamodule.source}. Curves and summary: {out}", soft_wrap=True)
        is_member = len(model.task.members) > 1 and task in model.task.members
        part = f"/member-{model.task.members.index(task) + 1}" if is_member else ""
        log_comparison(self.loggers, result, self.global_step, f"comparison{part}")
        return result

    def _progress(self, total: int, unit: str) -> WorkProgress:
        quiet = not (self.shows_progress and self.is_global_zero)
        return WorkProgress(total, unit, FIRST_AFTER, quiet)


def _searches(baselines: Sequence[Baseline], progress: WorkProgress) -> Callable[[str, float, float], None]:
    """Returns what is told of every run of the baselines' searches: it counts them, and those to come."""
    planned = {baseline.name: len(baseline.grid) + 3 * len(baseline.alternatives) for baseline in baselines}
    names, runs = [*planned], dict.fromkeys(planned, 0)

    def report(label: str, rate: float, score: float) -> None:
        name = label.partition(" ")[0]
        runs[name] += 1
        # A search goes beyond its plan where the best rate is on an edge.
        rest = max(planned[name] - runs[name], 0)
        rest += sum(planned[later] for later in names[names.index(name) + 1 :])
        progress.count()
        progress.expect(rest)
        progress.report(f"tuning {label}, learning rate {rate:g} gives {score:.4g}")

    return report


def _rollouts(num_optimizees: int, progress: WorkProgress) -> Callable[[str], None]:
    """Returns what is told of every optimizer before it runs: it counts those before."""
    begun: list[str] = []

    def report(name: str) -> None:
        if begun:
            progress.count()
        begun.append(name)
        progress.report(f"comparing, {name} runs on {num_optimizees} optimizees")

    return report


def tuning_table(tuned: Iterable[TunedBaseline], task: str) -> FittingTable:
    """One row per baseline: its best learning rate, its setting if any is not the default, and its score."""
    tuned = list(tuned)
    rates = [f"{t.learning_rate:g}" + (" (edge of the search)" if t.at_edge else "") for t in tuned]
    columns = [
        (Column("baseline"), [t.baseline.name for t in tuned]),
        (Column("learning rate", is_number=True), rates),
        (Column("setting"), [setting_text(t.setting) for t in tuned]),
        (Column("final loss", is_number=True), [f"{t.scores[t.learning_rate]:.4g}" for t in tuned]),
        (Column("runs", is_number=True, spare=1), [str(len(t.trials)) for t in tuned]),
    ]
    shown = [(column, cells) for column, cells in columns if column.name != "setting" or any(cells)]
    rows = zip(*(cells for _, cells in shown), strict=True)
    return FittingTable(f"Tuned on {task}", [column for column, _ in shown], list(rows))


def _one_kind(task: Task) -> Task:
    """The task, unless it is a mixture."""
    if len(task.members) > 1:
        raise ValueError(
            f"{task.describe()} is compared one member at a time: pass one of task.members as task"
        )
    return task
