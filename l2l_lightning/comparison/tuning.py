"""The search for a baseline's learning rate and setting on a task."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from l2l_lightning.comparison.baselines import (
    BASELINES,
    Baseline,
    Setting,
    Trial,
    TunedBaseline,
    preferred_number,
    run_baseline,
    setting_text,
)
from l2l_lightning.comparison.statistics import final_losses
from l2l_lightning.comparison.tuning_cache import TuningCache
from l2l_lightning.data.examples import Examples
from l2l_lightning.errors import TaskError
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.tasks.base import Task

MAX_EXTENSIONS = 12
"""How many learning rates, four decades, `tune` may add beyond those that it starts with."""

Progress = Callable[[str, float, float], None]
"""Called after a run with the baseline's name (and its setting if not the default), rate and score."""


def search_rates(
    start: range, score: Callable[[int], float], max_extensions: int = MAX_EXTENSIONS
) -> dict[int, float]:
    """Scores a grid of learning rates, then one more beyond an edge for as long as the best is on that edge.

    Args:
        start: Positions of the grid in a series of rates, such as `preferred_number`.
        score: The loss at a position, to be made least; inf where training diverged.
        max_extensions: How many positions may be added in all.

    Returns:
        The scores by position, in the order in which they were computed.

    Example:
        >>> search_rates(range(0, 3), lambda position: abs(position - 3.0))
        {0: 3.0, 1: 2.0, 2: 1.0, 3: 0.0, 4: 1.0}
    """
    scores = {position: score(position) for position in start}
    for _ in range(max_extensions):
        best = best_position(scores)
        if best == min(scores):
            position = best - 1
        elif best == max(scores):
            position = best + 1
        else:
            break
        scores[position] = score(position)
    return scores


def best_position(scores: dict[int, float]) -> int:
    """Returns the position of the least score; of equals the least position."""
    return min(scores, key=lambda position: (scores[position], position))


def tune(
    task: Task,
    images: Examples | None,
    horizons: Sequence[int],
    seed: int,
    *,
    num_optimizees: int = 20,
    baselines: Sequence[Baseline] = tuple(BASELINES.values()),
    cache_dir: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[int, dict[str, TunedBaseline]]:
    """Finds the learning rate and setting of each baseline that give the least mean final loss.

    The final loss is the mean of the last 10 (or `horizon`, if fewer); one diverged optimizee makes the score
    infinite. The default setting is tried at every rate of the baseline's grid; each alternative at three
    rates around where its best is expected (`Alternative.positions` from the default's best). While a
    setting's best rate is the least or greatest tried, one more is tried on that side, 12 at most. The
    optimizees come from the stream "tuning", which no reported result draws from.

    Several horizons cost little more than the longest one: a setting and rate is run once, for the longest,
    and scored at each. Every horizon has the search, edges and cache file that it would have alone. Only a
    run that diverges ends early: on quadratics the momentum that is best after 1000 steps is at more than
    three times the least loss after 125, so that no threshold on a loss is a safe sign of a hopeless run.

    Args:
        task: The distribution of optimizees.
        images: The validation split, on `device`, if the task needs data.
        horizons: Steps per rollout, of each rollout that will be reported.
        seed: The run's seed.
        num_optimizees: Number of tuning optimizees.
        baselines: The optimizers.
        cache_dir: Where finished searches are kept (see `TuningCache`); None keeps none.
        device: Where to compute.
        dtype: The dtype of θ.
        progress: Called after every run; the score is the one at the longest horizon that is searched.

    Returns:
        The tuned baselines, by horizon and name.

    Raises:
        ValueError: A horizon is less than 1.
        TaskError: A baseline diverged at every learning rate of its default setting.

    Example:
        >>> from l2l_lightning import Quadratic
        >>> sgd = [BASELINES["sgd"]]
        >>> tuned = tune(Quadratic(dim=2), None, [5, 20], seed=0, num_optimizees=4, baselines=sgd)
        >>> tuned[20]["sgd"].learning_rate
        0.05
    """
    if min(horizons, default=1) < 1:
        raise ValueError(f"horizons must be at least 1, got {min(horizons)}")

    def make_optimizees() -> Optimizees:
        return Optimizees(task, images, seed, "tuning", range(num_optimizees), device, dtype)

    cache = None if cache_dir is None else TuningCache(cache_dir, make_optimizees(), seed)
    result: dict[int, dict[str, TunedBaseline]] = {horizon: {} for horizon in horizons}
    for baseline in baselines:
        kept = {} if cache is None else {horizon: cache.read(baseline, horizon) for horizon in result}
        missing = [horizon for horizon in result if kept.get(horizon) is None]
        score = _scorer(baseline, make_optimizees, missing, progress)
        for horizon in result:
            tuned = kept.get(horizon)
            if tuned is None:
                tuned = _search(baseline, functools.partial(score, horizon))
                if cache is not None:
                    cache.write(tuned, horizon)
            result[horizon][baseline.name] = tuned
    return result


def _scorer(
    baseline: Baseline,
    make_optimizees: Callable[[], Optimizees],
    horizons: Sequence[int],
    progress: Progress | None,
) -> Callable[[int, Setting, int], float]:
    """Returns a function of (horizon, setting, position of the rate) to the mean final loss.

    One run serves all the horizons: what it gave is kept until another asks for it.
    """
    longest = max(horizons, default=0)

    @functools.cache
    def run(position: int, **setting: float) -> dict[int, float]:
        rate, optimizees = preferred_number(position), make_optimizees()
        losses = run_baseline(baseline, rate, optimizees, longest, setting=setting, stop_if_diverged=True)
        means = {horizon: float(final_losses(losses[:horizon]).mean()) for horizon in horizons}
        scores = {horizon: mean if math.isfinite(mean) else math.inf for horizon, mean in means.items()}
        if progress is not None:
            label = f"{baseline.name} ({setting_text(setting)})" if setting else baseline.name
            progress(label, rate, scores[longest])
        return scores

    return lambda horizon, setting, position: run(position, **setting)[horizon]


def _search(baseline: Baseline, score: Callable[[Setting, int], float]) -> TunedBaseline:
    """Tries the default setting's whole grid, then a few rates of each alternative; takes the best of all."""
    default = search_rates(baseline.grid, functools.partial(score, {}))
    best = best_position(default)
    if math.isinf(default[best]):
        low, high = (preferred_number(edge(default)) for edge in (min, max))
        raise TaskError(
            f"{baseline.name} diverged at every learning rate from {low:g} to {high:g}; "
            "are the task's loss and gradient finite at θ0?"
        )
    searches = [default]
    for setting, positions in baseline.alternatives:
        around = range(best + positions - 1, best + positions + 2)
        searches.append(search_rates(around, functools.partial(score, setting)))
    trials = tuple(
        Trial(setting, preferred_number(position), scores[position])
        for setting, scores in zip(baseline.settings, searches, strict=True)
        for position in sorted(scores)
    )
    # Of equals the first: the default setting, the least rate.
    chosen = min(trials, key=lambda trial: trial.final_loss)
    return TunedBaseline(baseline, chosen.learning_rate, chosen.setting, trials)
