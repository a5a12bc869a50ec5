"""Paired comparison of optimizers: the same optimizees, the same minibatches, an interval on every mean."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from l2l_lightning.comparison.baselines import Setting, TunedBaseline, run_baseline
from l2l_lightning.comparison.statistics import (
    Interval,
    Lead,
    final_loss,
    final_losses,
    lead,
    paired_difference,
    sum_losses,
    summary,
)
from l2l_lightning.provenance import commit, device_name, versions
from l2l_lightning.rollout.optimizees import Optimizees

LEARNED = "learned"
"""The learned optimizer's name: what the others are compared with."""

Measure = Literal["final_loss", "sum_loss"]
MEASURES: dict[Measure, Callable[[Tensor], Tensor]] = {"final_loss": final_losses, "sum_loss": sum_losses}
"""What optimizers are compared by: losses [T, K] to a value of each optimizee, [K]."""


@dataclass(frozen=True)
class Contender:
    """An optimizer to compare.

    Example:
        >>> Contender("learned", lambda optimizees, horizon: run_rule(rule, optimizees, horizon)).name
        'learned'
    """

    name: str
    run: Callable[[Optimizees, int], Tensor]
    """(K optimizees, horizon) to the losses [horizon, K], f_t(θ_t) in row t.

    It takes one minibatch a step from the optimizees, so that all contenders see the same ones."""
    learning_rate: float | None = None
    setting: Setting = field(default_factory=dict)
    """The hyperparameters that are not the optimizer's default, besides the learning rate."""


def baseline_contender(tuned: TunedBaseline, name: str | None = None) -> Contender:
    """Returns a baseline at its tuned learning rate and setting, under its own name or another one.

    Example:
        >>> from l2l_lightning.comparison.baselines import default_baselines
        >>> baseline_contender(default_baselines()["adam"], "adam (default)").learning_rate
        0.001
    """
    run = functools.partial(run_baseline, tuned.baseline, tuned.learning_rate, setting=tuned.setting)
    return Contender(name or tuned.baseline.name, run, tuned.learning_rate, tuned.setting)


@dataclass(frozen=True)
class Result:
    """The losses of one optimizer on the K optimizees, and what it ran with."""

    losses: Tensor
    """f_t(θ_t), [horizon, K] float64 on the CPU."""
    seconds: float
    """Wall-clock of the whole rollout, all K optimizees side by side, losses and gradients included."""
    learning_rate: float | None
    setting: Setting = field(default_factory=dict)


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
        means = {name: final_loss(result.losses).mean for name, result in self.results.items()}
        return sorted(means, key=lambda name: means[name] if math.isfinite(means[name]) else math.inf)

    def difference(self, name: str, measure: Measure = "final_loss") -> Interval:
        """Returns the paired difference learned − other of a measure; negative where learned is ahead."""
        return paired_difference(*self._pair(name, measure))

    def lead(self, name: str, measure: Measure = "final_loss") -> Lead:
        """Says how clearly the learned optimizer is ahead of another one, as `statistics.lead`."""
        return lead(*self._pair(name, measure))

    def _pair(self, name: str, measure: Measure) -> tuple[Tensor, Tensor]:
        learned, other = (MEASURES[measure](self.results[n].losses) for n in (LEARNED, name))
        return learned, other

    def summary(self) -> dict[str, Any]:
        """Returns what summary.json holds."""
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
                    **summary(result.losses),
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
        make_optimizees: Returns fresh optimizees, with the same θ0 and minibatches to come at every call.
        horizon: Steps per rollout.
        seed: What the optimizees were derived from, for the record.

    Raises:
        ValueError: There are no contenders or two of one name, horizon < 1, a contender's losses are not
            [horizon, K], no optimizee has a finite loss and gradient at θ0, or the comparison is not
            paired: two contenders met another θ0 or another first minibatch.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM, Quadratic, run_rule
        >>> from l2l_lightning.comparison.baselines import default_baselines
        >>> make_optimizees = functools.partial(Optimizees, Quadratic(dim=2), None, 0, "test", range(5))
        >>> learned = Contender("learned", functools.partial(run_rule, CoordinatewiseLSTM()))
        >>> adam = baseline_contender(default_baselines()["adam"])
        >>> comparison = compare([learned, adam], make_optimizees, horizon=3, seed=0)
        >>> comparison.results["adam"].losses.shape
        torch.Size([3, 5])
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
        data_source=reference.data_source,
        seed=seed,
        device=device_name(reference.device),
        dtype=str(reference.dtype).removeprefix("torch."),
        results=results,
    )


def _timed(contender: Contender, optimizees: Optimizees, horizon: int) -> tuple[Tensor, float]:
    """Returns losses as float64 on the CPU, and the seconds until the device had finished."""
    on_accelerator = optimizees.device.type != "cpu"
    if on_accelerator:
        torch.accelerator.synchronize(optimizees.device)
    start = time.perf_counter()
    losses = contender.run(optimizees, horizon)
    if on_accelerator:
        torch.accelerator.synchronize(optimizees.device)
    return losses.detach().double().cpu(), time.perf_counter() - start
