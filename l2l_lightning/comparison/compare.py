"""Paired comparison of optimizers: the same optimizees, the same minibatches, an interval on every mean."""

from __future__ import annotations

import csv
import functools
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from l2l_lightning.comparison.baselines import (
    FINAL_STEPS,
    Setting,
    TunedBaseline,
    final_losses,
    run_baseline,
    setting_text,
)
from l2l_lightning.files import write_atomically, write_json
from l2l_lightning.provenance import commit, device_name, versions
from l2l_lightning.rollout.optimizees import Optimizees

LEARNED = "learned"
"""The learned optimizer's name: what the others are compared with."""

Measure = Literal["final_loss", "sum_loss"]
Lead = Literal["clear", "paired", "none"]
VALUES: dict[Measure, str] = {"final_loss": "final_losses", "sum_loss": "sum_losses"}
"""Where a Result keeps a measure's value of every optimizee."""


@functools.cache
def student_t_quantile(degrees_of_freedom: int) -> float:
    """The t that a Student variable stays within, on either side of 0, with probability 0.95.

    Example:
        >>> [round(student_t_quantile(n), 3) for n in (1, 2, 19)]
        [12.706, 4.303, 2.093]
    """
    from scipy.special import stdtrit  # here: few need it, and it takes long to import

    return float(stdtrit(degrees_of_freedom, 0.975))


def mean_and_half_width(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the last axis and its 95% interval's half width t·s/√K: [..., K] to two of [...].

    Nothing is dropped: where a value is not finite neither are the mean and the half width. One value has
    no interval: its half width is NaN.
    """
    number = values.shape[-1]
    mean = values.mean(dim=-1)
    if number == 1:
        return mean, torch.full_like(mean, math.nan)
    return mean, values.std(dim=-1) * (student_t_quantile(number - 1) / math.sqrt(number))


class Interval(NamedTuple):
    """A mean over optimizees with its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """The mean of K values [K], and where it lies with 95% confidence."""
        mean, half = (float(x) for x in mean_and_half_width(values))
        return cls(mean, mean - half, mean + half)

    def as_json(self) -> dict[str, Any]:
        """{"mean", "ci95": [low, high]}; null for what is not finite."""
        mean, low, high = (x if math.isfinite(x) else None for x in self)
        return {"mean": mean, "ci95": [low, high]}

    def __str__(self) -> str:
        """To the half width's second digit, as what follows it is noise: "0.358 ± 0.012"."""
        half = self.high - self.mean
        if not math.isfinite(self.mean):
            return "not finite"
        if not math.isfinite(half):
            return f"{self.mean:.4g}"
        if not 1e-6 < half < 1e6:
            return f"{self.mean:.3g} ± {half:.2g}"
        decimals = max(0, 1 - math.floor(math.log10(half)))
        return f"{self.mean:.{decimals}f} ± {half:.{decimals}f}"


@dataclass(frozen=True)
class Contender:
    """An optimizer to compare: `run(optimizees, horizon)` gives the losses [horizon, K], f_t(θ_t) in row t.

    `run` takes one minibatch a step from the optimizees, so that all contenders see the same ones.

    Example:
        >>> Contender("learned", lambda optimizees, horizon: run_rule(rule, optimizees, horizon)).name
        'learned'
    """

    name: str
    run: Callable[[Optimizees, int], Tensor]
    learning_rate: float | None = None
    setting: Setting = field(default_factory=dict)
    """Its other hyperparameters, where they are not its default."""


def baseline_contender(tuned: TunedBaseline, name: str | None = None) -> Contender:
    """A baseline at its tuned learning rate and setting, under its own name or another one.

    Example:
        >>> from l2l_lightning.comparison.baselines import default_baselines
        >>> baseline_contender(default_baselines()["adam"], "adam (default)").learning_rate
        0.001
    """
    run = functools.partial(run_baseline, tuned.baseline, tuned.learning_rate, setting=tuned.setting)
    return Contender(name or tuned.baseline.name, run, tuned.learning_rate, tuned.setting)


@dataclass(frozen=True)
class Result:
    """What one optimizer did to the K optimizees."""

    losses: Tensor
    """[horizon, K] float64 on the CPU."""
    seconds: float
    """Wall-clock of the whole rollout, all K optimizees side by side, losses and gradients included."""
    learning_rate: float | None
    setting: Setting = field(default_factory=dict)

    @property
    def final_losses(self) -> Tensor:
        """Mean of each optimizee's last min(10, horizon) losses, [K]."""
        return final_losses(self.losses)

    @property
    def sum_losses(self) -> Tensor:
        """Sum of each optimizee's losses, [K]."""
        return self.losses.sum(dim=0)

    @property
    def final_loss(self) -> Interval:
        """The final loss over optimizees."""
        return Interval.of(self.final_losses)

    @property
    def sum_loss(self) -> Interval:
        """The sum of a rollout's losses, over optimizees."""
        return Interval.of(self.sum_losses)

    @property
    def diverged(self) -> int:
        """How many optimizees met a loss that is not finite, or end higher than they began.

        They are counted and never dropped: one loss that is not finite leaves the means undefined.
        """
        finite = self.losses.isfinite().all(dim=0)
        return int((~finite | (self.final_losses > self.losses[0])).sum())


@dataclass(frozen=True)
class Comparison:
    """Optimizers on the same optimizees, in the order in which they ran, and where the numbers come from."""

    task: str
    horizon: int
    num_optimizees: int
    data_source: str
    seed: int
    device: str
    dtype: str
    results: dict[str, Result]

    @property
    def ranking(self) -> list[str]:
        """The optimizers' names by mean final loss, the best first; those without one last."""

        def key(name: str) -> float:
            mean = self.results[name].final_loss.mean
            return mean if math.isfinite(mean) else math.inf

        return sorted(self.results, key=key)

    def difference(self, name: str, measure: Measure = "final_loss") -> Interval:
        """The learned optimizer's final or summed loss minus another's, optimizee by optimizee.

        Negative is ahead. Pairing removes what the optimizees share, so this interval is narrower than the
        two of the losses.
        """
        learned, other = (getattr(self.results[n], VALUES[measure]) for n in (LEARNED, name))
        return Interval.of(learned - other)

    def lead(self, name: str, measure: Measure = "final_loss") -> Lead:
        """How clearly the learned optimizer is ahead of another.

        "clear": its interval lies wholly below the other's; "paired": the two overlap, but the paired
        difference's interval lies below 0; "none": neither.
        """
        learned, other = (getattr(self.results[n], measure) for n in (LEARNED, name))
        if learned.high < other.low:
            return "clear"
        return "paired" if self.difference(name, measure).high < 0 else "none"

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return {
            "task": self.task,
            "horizon": self.horizon,
            "num_optimizees": self.num_optimizees,
            "data_source": self.data_source,
            "commit": commit(),
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
            "versions": versions(),
            "optimizers": {
                name: {
                    "final_loss": result.final_loss.as_json(),
                    "sum_loss": result.sum_loss.as_json(),
                    "diverged": result.diverged,
                    "learning_rate": result.learning_rate,
                    "setting": result.setting,
                    "seconds": result.seconds,
                }
                for name, result in self.results.items()
            },
        }


def compare(
    contenders: Sequence[Contender],
    make_optimizees: Callable[[], Optimizees],
    horizon: int,
    *,
    seed: int,
) -> Comparison:
    """Runs every contender on the same optimizees.

    Args:
        contenders: The optimizers; the learned one is named "learned".
        make_optimizees: Fresh optimizees, the same at every call: same θ0, same minibatches to come.
        horizon: Steps per rollout.
        seed: What the optimizees were derived from, for the record.

    Raises:
        ValueError: There are no contenders or two of one name, horizon < 1, a contender's losses are not
            [horizon, K], no optimizee has a finite loss and gradient at θ0, or the comparison is not
            paired: two contenders met another θ0 or another first minibatch.

    Example:
        >>> make = functools.partial(Optimizees, task, images, 0, "test", range(20))  # doctest: +SKIP
        >>> learned = Contender("learned", functools.partial(run_rule, rule))  # doctest: +SKIP
        >>> baselines = [baseline_contender(t) for t in tuned.values()]  # doctest: +SKIP
        >>> comparison = compare([learned, *baselines], make, horizon=100, seed=0)  # doctest: +SKIP
        >>> write_comparison(comparison, Path("runs/mnist"))  # doctest: +SKIP
    """
    names = [contender.name for contender in contenders]
    if not names:
        raise ValueError("contenders must hold at least one optimizer")
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    if len(set(names)) < len(names):
        raise ValueError(f"two contenders have one name: {names}")
    reference = make_optimizees()
    losses, grads = reference.losses_and_grads()
    if not (losses.isfinite() & grads.isfinite().all(-1)).any():
        raise ValueError(f"no optimizee of {reference.task.describe()} has a finite loss and gradient at θ0")
    first_losses: Tensor | None = None
    results = {}
    for contender in contenders:
        contender.run(make_optimizees(), 1)  # kernels compile and caches fill before the clock starts
        optimizees = make_optimizees()
        if not torch.equal(optimizees.theta, reference.theta):
            raise ValueError("make_optimizees gives another θ0 at every call: the comparison is not paired")
        losses, seconds = _timed(contender, optimizees, horizon)
        if losses.shape != (horizon, len(reference)):
            expected = (horizon, len(reference))
            raise ValueError(f"{contender.name} gave losses {tuple(losses.shape)}, not {expected}")
        first_losses = losses[0] if first_losses is None else first_losses
        if not torch.allclose(losses[0], first_losses, rtol=1e-4, equal_nan=True):
            raise ValueError(
                f"{contender.name} and {names[0]} differ in their first losses: the comparison is not paired"
            )
        results[contender.name] = Result(losses, seconds, contender.learning_rate, contender.setting)
    return Comparison(
        task=reference.task.describe(),
        horizon=horizon,
        num_optimizees=len(reference),
        data_source="none" if reference.images is None else reference.images.source,
        seed=seed,
        device=device_name(reference.device),
        dtype=str(reference.dtype).removeprefix("torch."),
        results=results,
    )


def _timed(contender: Contender, optimizees: Optimizees, horizon: int) -> tuple[Tensor, float]:
    """Losses as float64 on the CPU, and the seconds until the device had finished."""
    on_accelerator = optimizees.device.type != "cpu"
    if on_accelerator:
        torch.accelerator.synchronize(optimizees.device)
    start = time.perf_counter()
    losses = contender.run(optimizees, horizon)
    if on_accelerator:
        torch.accelerator.synchronize(optimizees.device)
    return losses.detach().double().cpu(), time.perf_counter() - start


def write_comparison(comparison: Comparison, folder: Path | str) -> None:
    """Writes curves.csv, curves.png and summary.json into a folder, each atomically.

    curves.csv has the columns task, optimizer, seed, step, loss; seed is the optimizee's index, and a loss
    that is not finite reads nan or inf. In summary.json such numbers are null.
    """
    folder = Path(folder)
    write_atomically(folder / "curves.csv", _csv(comparison))
    write_atomically(folder / "curves.png", _picture(comparison))
    write_json(folder / "summary.json", comparison.summary())


def _csv(comparison: Comparison) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["task", "optimizer", "seed", "step", "loss"])
    for name, result in comparison.results.items():
        for index, losses in enumerate(result.losses.T.tolist()):
            # Nine digits tell every float32 from its neighbours.
            writer.writerows(
                [comparison.task, name, index, t, f"{loss:.9g}"] for t, loss in enumerate(losses)
            )
    return buffer.getvalue()


def _picture(comparison: Comparison) -> bytes:
    # Imported where it is needed: matplotlib takes long to load, and a comparison does without it.
    from l2l_lightning.comparison.plots import Curve, curves_figure, png

    curves = []
    for name, result in comparison.results.items():
        mean, half = mean_and_half_width(result.losses)
        label = f"{name}  {result.final_loss}"
        if result.diverged:
            label += f"  ({result.diverged}/{comparison.num_optimizees} diverged)"
        curves.append(
            Curve(
                label=label,
                mean=mean.numpy(),
                low=(mean - half).numpy(),
                high=(mean + half).numpy(),
                final=result.final_loss.mean,
                highlight=name == LEARNED,
            )
        )
    title = f"{comparison.task}\nmean of {comparison.num_optimizees} optimizees, with its 95% interval"
    legend_title = f"final loss (mean of last {min(FINAL_STEPS, comparison.horizon)})"
    return png(curves_figure(curves, title, legend_title))


def comparison_table(comparison: Comparison) -> Table:
    """One row per optimizer, by final loss.

    "learned − it" is the paired difference of the final losses; "lead" says how clearly the learned optimizer
    is ahead (see Comparison.lead) in the final loss, then in the sum. "setting" says which other
    hyperparameters are not the default; without any there is no such column.
    """
    with_learned = LEARNED in comparison.results
    with_settings = any(result.setting for result in comparison.results.values())
    title = f"{comparison.task}, {comparison.horizon} steps, {comparison.num_optimizees} optimizees"
    table = Table(title=escape(title))
    table.add_column("optimizer")
    for column in ("final loss", "sum of losses", "diverged", "learning rate"):
        table.add_column(column, justify="right")
    if with_settings:
        table.add_column("setting")
    table.add_column("seconds", justify="right")
    if with_learned:
        table.add_column("learned − it", justify="right")
        table.add_column("lead")
    for name in comparison.ranking:
        result = comparison.results[name]
        row = [
            escape(name),
            str(result.final_loss),
            str(result.sum_loss),
            str(result.diverged),
            "" if result.learning_rate is None else f"{result.learning_rate:g}",
            *([setting_text(result.setting)] if with_settings else []),
            f"{result.seconds:.2f}",
        ]
        if with_learned and name != LEARNED:
            leads = (comparison.lead(name, measure) for measure in VALUES)
            row += [str(comparison.difference(name)), " / ".join(leads)]
        table.add_row(*row, style="bold" if name == LEARNED else None)
    return table
