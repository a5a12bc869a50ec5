"""Chooses an optimizer's learning rate and weight decay, as carefully for one optimizer as for another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from l2l_lightning.errors import CommandLineError
from l2l_lightning.examples.module import ADAMW, OptimizerSetting
from l2l_lightning.examples.problem import Problem

RATES = tuple(float(f"{digit}e{exponent}") for exponent in range(-6, 3) for digit in (1, 3))
"""Two a decade."""

MAX_EXTENSIONS = 3
"""Rates tried beyond the first ones."""


@dataclass(frozen=True)
class Grid:
    """Where a search begins."""

    rates: tuple[float, ...]
    """Neighbours in RATES."""
    weight_decays: tuple[float, ...]
    """The first at every rate, the others at the best one."""


ADAMW_GRID = Grid((1e-3, 3e-3, 1e-2), (0.01, 0.1))
RULE_GRID = Grid((0.03, 0.1, 0.3), (0.0, 1e-3))
"""A rule's decay is multiplied by an lr that is a hundred times AdamW's."""


@dataclass(frozen=True)
class Trial:
    """A setting that was tried."""

    setting: OptimizerSetting
    loss: float
    """The last validation loss, averaged over seeds; inf if one is not finite."""


@dataclass(frozen=True)
class Tuned:
    """What a search found, and what it cost."""

    setting: OptimizerSetting
    trials: list[Trial]
    seconds: float


def tune(
    problem: Problem,
    optimizer: str,
    num_seeds: int,
    *,
    state_dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda _: None,
    quick: bool = False,
) -> Tuned:
    """Finds the setting of the least final validation loss.

    The grid's rates are tried; while the best is the least or the greatest tried, one more on that side, up
    to MAX_EXTENSIONS; then other weight decays at the best rate. Every search begins with as many settings.

    Args:
        problem: What is trained, from the stream "tuning".
        optimizer: ADAMW or a rule.
        num_seeds: Runs of each setting.
        state_dtype: Of a rule's state.
        progress: Called before every setting.
        quick: Two settings and no more.

    Raises:
        CommandLineError: Every setting diverged.
    """
    grid, started = ADAMW_GRID if optimizer == ADAMW else RULE_GRID, time.perf_counter()
    trials: dict[OptimizerSetting, Trial] = {}

    def attempt(setting: OptimizerSetting) -> None:
        progress(f"tuning {optimizer}, lr {setting.lr:g}, weight decay {setting.weight_decay:g}")
        runs = (problem.run(setting, "tuning", index) for index in range(num_seeds))
        losses = [run.held_out[-1].loss for run in runs]
        mean = sum(losses) / num_seeds
        trials[setting] = Trial(setting, mean if math.isfinite(mean) else math.inf)

    def best() -> OptimizerSetting:
        return min(trials.values(), key=lambda trial: trial.loss).setting

    first = OptimizerSetting(optimizer, grid.rates[0], grid.weight_decays[0], state_dtype)
    for rate in grid.rates[:2] if quick else grid.rates:
        attempt(replace(first, lr=rate))
    for _ in range(0 if quick else MAX_EXTENSIONS):
        rates, position = sorted(setting.lr for setting in trials), RATES.index(best().lr)
        if best().lr == rates[0] and position > 0:
            attempt(replace(first, lr=RATES[position - 1]))
        elif best().lr == rates[-1] and position + 1 < len(RATES):
            attempt(replace(first, lr=RATES[position + 1]))
        else:
            break
    at_best = best()
    for weight_decay in () if quick else grid.weight_decays[1:]:
        attempt(replace(at_best, weight_decay=weight_decay))
    if not math.isfinite(trials[best()].loss):
        raise CommandLineError(f"{optimizer} diverged at every setting: leave it out, or take fewer --steps")
    return Tuned(best(), list(trials.values()), time.perf_counter() - started)
