"""Hand-designed optimizers, each at the learning rate and setting that a search finds best for the task.

With g the gradient and η the learning rate; the numbers are the default setting's:

    sgd       θ ← θ − η g
    momentum  m ← 0.9 m + g;            θ ← θ − η m
    nag       m ← 0.9 m + g;            θ ← θ − η (g + 0.9 m)
    rmsprop   v ← 0.99 v + 0.01 g²;     θ ← θ − η g / (√v + 1e-8)
    adam      m ← 0.9 m + 0.1 g;  v ← 0.999 v + 0.001 g²;
              θ ← θ − η m̂ / (√v̂ + 1e-8),  m̂ = m / (1 − 0.9ᵗ),  v̂ = v / (1 − 0.999ᵗ)
    adamw     adam, and θ ← (1 − 0.01 η) θ before it

A setting names what differs from that: {"momentum": 0.95}, {"alpha": 0.9}, {"beta1": 0.9, "beta2": 0.95}; the
default setting is {}.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2l_lightning.data.images import Images
from l2l_lightning.files import write_json
from l2l_lightning.provenance import commit, device_name, timestamp, versions
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.tasks.base import Task

FINAL_STEPS = 10
"""The final loss is a mean over this many last steps: one minibatch's loss alone is too noisy to rank by."""

MAX_EXTENSIONS = 12
"""How many learning rates, four decades, a search may add beyond those that it starts with."""

Setting = dict[str, float]
"""Hyperparameters besides the learning rate, those that are not an optimizer's default; {} is the default."""


def final_losses(losses: Tensor) -> Tensor:
    """Each optimizee's mean over its last min(10, horizon) losses: [horizon, K] to [K]."""
    return losses[-FINAL_STEPS:].mean(dim=0)


def preferred_number(position: int) -> float:
    """The 1–2–5 series, three values a decade, evenly spaced on a log scale as far as round numbers can be.

    Example:
        >>> [preferred_number(i) for i in range(-3, 4)]
        [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    """
    decade, digit = divmod(position, 3)
    return float(f"{(1, 2, 5)[digit]}e{decade}")


def decades(low: int, high: int) -> range:
    """The positions of 10^low … 10^high, both included, in the 1–2–5 series."""
    return range(3 * low, 3 * high + 1)


class Alternative(NamedTuple):
    """A setting to try besides the default one."""

    setting: Setting
    positions: int = 0
    """How far above the default setting's best learning rate its own is expected, in the 1–2–5 series."""


@dataclass(frozen=True)
class Baseline:
    """A hand-designed optimizer, where to look for its learning rate, and which settings to try.

    Example:
        >>> adagrad = Baseline("adagrad", lambda thetas, lr: torch.optim.Adagrad(thetas, lr), decades(-4, 1))
        >>> adagrad.learning_rates[:3]
        (0.0001, 0.0002, 0.0005)
        >>> def make(thetas, lr, lr_decay=0.0):
        ...     return torch.optim.Adagrad(thetas, lr, lr_decay=lr_decay)
        >>> adagrad = Baseline("adagrad", make, decades(-4, 1), (Alternative({"lr_decay": 0.01}),))
        >>> adagrad.settings
        ({}, {'lr_decay': 0.01})
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    """(parameters, learning rate, **setting) to a fresh optimizer; it must act on each coordinate alone."""
    grid: range
    """Positions in the 1–2–5 series where the search starts."""
    alternatives: tuple[Alternative, ...] = ()
    """What is tried besides the default setting."""

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The grid as learning rates, ascending."""
        return tuple(preferred_number(position) for position in self.grid)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The settings that a search tries, the default one first."""
        return ({}, *(alternative.setting for alternative in self.alternatives))


# Each alternative had the least final loss of its baseline on quadratics, or on MNIST with sigmoids or ReLUs,
# after 100, 200 or 1000 steps. Left out, because one of those listed does as well to within 4%: momentum 0.5;
# alpha 0.5 and 0.95; betas of 0.9 and 0.99, 0.95 and 0.99 or 0.999, 0.8 and 0.999, 0.5 and 0.999, 0.98 and
# 0.999; and 0.98 and 0.99, which lead on quadratics alone, after 1000 steps, where the losses are 1e-4.
# With momentum β a gradient moves θ by η / (1 − β) in the end, which is what its positions keep the same.
MOMENTA = (
    Alternative({"momentum": 0.8}, positions=1),
    Alternative({"momentum": 0.95}, positions=-1),
    Alternative({"momentum": 0.98}, positions=-2),
    Alternative({"momentum": 0.99}, positions=-3),
)
ALPHAS = (Alternative({"alpha": 0.9}), Alternative({"alpha": 0.999}))
BETAS = (
    Alternative({"beta1": 0.9, "beta2": 0.95}),
    Alternative({"beta1": 0.95, "beta2": 0.95}),
    Alternative({"beta1": 0.8, "beta2": 0.99}),
    Alternative({"beta1": 0.5, "beta2": 0.99}),
)

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("sgd", lambda thetas, lr: torch.optim.SGD(thetas, lr), decades(-3, 2)),
        Baseline(
            "momentum",
            lambda thetas, lr, momentum=0.9: torch.optim.SGD(thetas, lr, momentum=momentum),
            decades(-4, 1),
            MOMENTA,
        ),
        Baseline(
            "nag",
            lambda thetas, lr, momentum=0.9: torch.optim.SGD(thetas, lr, momentum=momentum, nesterov=True),
            decades(-4, 1),
            MOMENTA,
        ),
        Baseline(
            "rmsprop",
            lambda thetas, lr, alpha=0.99: torch.optim.RMSprop(thetas, lr, alpha=alpha),
            decades(-5, 0),
            ALPHAS,
        ),
        Baseline(
            "adam",
            lambda thetas, lr, beta1=0.9, beta2=0.999: torch.optim.Adam(thetas, lr, betas=(beta1, beta2)),
            decades(-5, 0),
            BETAS,
        ),
        Baseline(
            "adamw",
            lambda thetas, lr, beta1=0.9, beta2=0.999: torch.optim.AdamW(thetas, lr, betas=(beta1, beta2)),
            decades(-5, 0),
            BETAS,
        ),
    )
}
"""The baselines by name, by default PyTorch's and at momentum 0.9; each grid has 16 learning rates."""


def run_baseline(
    baseline: Baseline,
    learning_rate: float,
    optimizees: Optimizees,
    horizon: int,
    *,
    setting: Mapping[str, float] | None = None,
    stop_if_diverged: bool = False,
) -> Tensor:
    """Optimises K optimizees for `horizon` steps with a fresh optimizer, and leaves them at θ_horizon.

    Args:
        baseline: The optimizer.
        learning_rate: Its η.
        optimizees: Where to start; their generators advance by one minibatch a step.
        horizon: Number of steps.
        setting: Its other hyperparameters; None is the default setting, {}.
        stop_if_diverged: Stop as soon as one loss is not finite; the losses not computed are NaN.

    Returns:
        Losses [horizon, K]: row t is f_t(θ_t) on minibatch t, before update t.

    Example:
        >>> optimizees = Optimizees(task, images, seed=0, stream="test", indices=range(20))  # doctest: +SKIP
        >>> losses = run_baseline(BASELINES["adam"], 0.02, optimizees, horizon=100)  # doctest: +SKIP
        >>> again = Optimizees(task, images, seed=0, stream="test", indices=range(20))  # doctest: +SKIP
        >>> slow = {"beta1": 0.95, "beta2": 0.95}  # doctest: +SKIP
        >>> losses = run_baseline(BASELINES["adam"], 0.02, again, 100, setting=slow)  # doctest: +SKIP
    """
    # Every update is elementwise, so one parameter [K, N] moves as K parameters [N] would, in one launch.
    theta = torch.nn.Parameter(optimizees.theta.detach().clone())
    optimizees.theta = theta.detach()  # the same storage: the optimizer moves both
    optimizer = baseline.make([theta], learning_rate, **(setting or {}))
    losses = torch.full((horizon, len(optimizees)), math.nan, dtype=theta.dtype, device=theta.device)
    for step in range(horizon):
        losses[step], theta.grad = optimizees.losses_and_grads()
        if stop_if_diverged and not losses[step].isfinite().all():
            break
        optimizer.step()
    return losses


class Trial(NamedTuple):
    """What a setting and a learning rate gave on the tuning optimizees."""

    setting: Setting
    learning_rate: float
    final_loss: float
    """The mean over the optimizees; inf where one diverged."""


@dataclass(frozen=True)
class TunedBaseline:
    """A baseline at the learning rate and setting that a search chose, and all that it tried.

    Example:
        >>> adam = TunedBaseline(BASELINES["adam"], 0.02, {"beta1": 0.9, "beta2": 0.95})
        >>> TunedBaseline.from_json(adam.as_json()) == adam
        True
    """

    baseline: Baseline
    learning_rate: float
    setting: Setting = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    """In the order of Baseline.settings, and ascending in the rate; () if there was no search."""

    @property
    def scores(self) -> dict[float, float]:
        """Mean final loss by learning rate, ascending, at the chosen setting; inf where one diverged."""
        return {rate: loss for setting, rate, loss in self.trials if setting == self.setting}

    @property
    def at_edge(self) -> bool:
        """Whether the rate is the least or the greatest tried at its setting: the best may lie beyond."""
        rates = self.scores
        return bool(rates) and self.learning_rate in (min(rates), max(rates))

    def as_json(self) -> dict[str, Any]:
        """{"baseline", "learning_rate", "setting", "scores"}; a final loss that is not finite is null."""
        scores = [
            trial._asdict() | {"final_loss": trial.final_loss if math.isfinite(trial.final_loss) else None}
            for trial in self.trials
        ]
        return {
            "baseline": self.baseline.name,
            "learning_rate": self.learning_rate,
            "setting": self.setting,
            "scores": scores,
        }

    @classmethod
    def from_json(
        cls, content: dict[str, Any], baselines: Mapping[str, Baseline] = BASELINES
    ) -> TunedBaseline:
        """What `as_json` gave.

        Args:
            content: The plain values.
            baselines: Where its name is looked up.

        Raises:
            ValueError: A key is missing or unknown, the baseline or a hyperparameter is unknown, a number is
                out of its range, or there are scores and another one is the best.
        """
        _check_keys(content, ("baseline", "learning_rate", "setting", "scores"))
        if content["baseline"] not in list(baselines):
            raise ValueError(f"unknown baseline {content['baseline']!r}: choose from {', '.join(baselines)}")
        baseline = baselines[content["baseline"]]
        if not isinstance(content["scores"], list):
            raise ValueError(f"the scores are not a list: {content['scores']!r}")
        trials = []
        for row in content["scores"]:
            _check_keys(row, Trial._fields)
            loss = math.inf if row["final_loss"] is None else _finite(row["final_loss"])
            trials.append(Trial(*_checked(baseline, row["setting"], row["learning_rate"]), loss))
        setting, learning_rate = _checked(baseline, content["setting"], content["learning_rate"])
        if trials:
            best = min(trial.final_loss for trial in trials)
            if Trial(setting, learning_rate, best) not in trials:
                raise ValueError("its learning rate and setting are not the best of its scores")
        return cls(baseline, learning_rate, setting, tuple(trials))


def _check_keys(content: Any, expected: Sequence[str]) -> None:
    if not isinstance(content, dict) or set(content) != set(expected):
        raise ValueError(f"expected the keys {', '.join(expected)}, got {content!r}")


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _checked(baseline: Baseline, setting: Any, learning_rate: Any) -> tuple[Setting, float]:
    """The two as floats, if the baseline takes them."""
    try:
        hyperparameters = {name: _finite(value) for name, value in setting.items()}
        rate = _finite(learning_rate)
        if rate <= 0:
            raise ValueError("a learning rate is positive")
        # The optimizer itself knows its hyperparameters and their ranges.
        baseline.make([torch.zeros(1)], rate, **hyperparameters)
    except (AttributeError, TypeError, ValueError) as error:
        what = f"{baseline.name} at learning rate {learning_rate!r} and setting {setting!r}"
        raise ValueError(f"{what} is not possible: {error}") from error
    return hyperparameters, rate


def setting_text(setting: Mapping[str, float]) -> str:
    """A setting in words, "" for the default one.

    Example:
        >>> setting_text({"beta1": 0.9, "beta2": 0.95})
        'beta1 0.9, beta2 0.95'
    """
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def default_baselines() -> dict[str, TunedBaseline]:
    """The baselines as PyTorch has them, for every task: torch.optim's default learning rates, no search.

    They are 0.001, and 0.01 for RMSProp; momentum stays 0.9. The other notion of one rate for every task, and
    the fair counterpart of a rule that was meta-trained on one task, is what `tune` finds on that task.

    Example:
        >>> {name: default.learning_rate for name, default in default_baselines().items()}
        {'sgd': 0.001, 'momentum': 0.001, 'nag': 0.001, 'rmsprop': 0.01, 'adam': 0.001, 'adamw': 0.001}
    """

    def rate(baseline: Baseline) -> float:
        optimizer = baseline.make([torch.zeros(1)], 1.0)
        return float(inspect.signature(type(optimizer)).parameters["lr"].default)

    return {name: TunedBaseline(baseline, rate(baseline)) for name, baseline in BASELINES.items()}


def tune(
    task: Task,
    images: Images | None,
    horizon: int,
    seed: int,
    *,
    num_optimizees: int = 20,
    baselines: Sequence[Baseline] = tuple(BASELINES.values()),
    cache_dir: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str, float, float], None] | None = None,
) -> dict[str, TunedBaseline]:
    """Finds each baseline's learning rate and setting: the least final loss, averaged over tuning optimizees.

    The final loss is the mean of the last 10 (or `horizon`, if fewer); one diverged optimizee makes the score
    infinite. The default setting is tried at every rate of the baseline's grid; each alternative at three
    rates around where its best is expected (`Alternative.positions` from the default's best). While a
    setting's best rate is the least or greatest tried, one more is tried on that side, 12 at most. The
    optimizees come from the stream "tuning", which no reported result draws from.

    With `cache_dir`, each baseline's search is kept in a JSON file, named by a hash of all that determines
    it, and read instead of repeated. A file that cannot be read, or whose task no longer gives the same loss
    and gradient at θ0, is warned of and replaced.

    Args:
        task: What is optimised.
        images: The validation split, on `device`, if the task needs data.
        horizon: Steps per rollout: tune for the one that will be reported.
        seed: The run's seed.
        num_optimizees: Number of tuning optimizees.
        baselines: The optimizers.
        cache_dir: Where searches are kept; None keeps none.
        device: Where to compute.
        dtype: θ's dtype.
        progress: Called after every run with (baseline's name, and its setting if that is not the default;
            learning rate; score).

    Returns:
        The tuned baselines, by name.

    Raises:
        ValueError: The horizon is less than 1.
        RuntimeError: A baseline diverged at every learning rate of its default setting.

    Example:
        >>> tuned = tune(task, validation_images, horizon=100, seed=0)  # doctest: +SKIP
        >>> tuned["adam"].learning_rate, tuned["adam"].setting  # doctest: +SKIP
        (0.02, {'beta1': 0.9, 'beta2': 0.95})
    """
    return tune_horizons(
        task,
        images,
        [horizon],
        seed,
        num_optimizees=num_optimizees,
        baselines=baselines,
        cache_dir=cache_dir,
        device=device,
        dtype=dtype,
        progress=progress,
    )[horizon]


def tune_horizons(
    task: Task,
    images: Images | None,
    horizons: Sequence[int],
    seed: int,
    *,
    num_optimizees: int = 20,
    baselines: Sequence[Baseline] = tuple(BASELINES.values()),
    cache_dir: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str, float, float], None] | None = None,
) -> dict[int, dict[str, TunedBaseline]]:
    """`tune` for several horizons at the cost of little more than the longest one.

    A setting and rate is run once, for the longest horizon, and scored at each: one that diverges in between
    still counts for the shorter ones. Each horizon has a search, edges and a cache file of its own, the same
    as `tune`'s; where some are found in the cache, only the others are run. Only a run that diverges ends
    early: on quadratics the momentum that is best after 1000 steps is at more than three times the least loss
    after 125, so that no threshold on a loss is a safe sign of a hopeless run.

    Args:
        task: What is optimised.
        images: The validation split, on `device`, if the task needs data.
        horizons: Steps per rollout.
        seed: The run's seed.
        num_optimizees: Number of tuning optimizees.
        baselines: The optimizers.
        cache_dir: As for `tune`.
        device: Where to compute.
        dtype: θ's dtype.
        progress: As for `tune`; the score is the one at the longest horizon that is searched.

    Returns:
        The tuned baselines, by horizon and name.

    Raises:
        ValueError: A horizon is less than 1.
        RuntimeError: A baseline diverged at every learning rate of its default setting.

    Example:
        >>> tuned = tune_horizons(task, validation_images, [100, 1000], seed=0)  # doctest: +SKIP
        >>> tuned[1000]["adam"].learning_rate  # doctest: +SKIP
        0.01
    """
    if min(horizons, default=1) < 1:
        raise ValueError(f"horizons must be at least 1, got {min(horizons)}")

    def make_optimizees() -> Optimizees:
        return Optimizees(task, images, seed, "tuning", range(num_optimizees), device, dtype)

    result: dict[int, dict[str, TunedBaseline]] = {horizon: {} for horizon in horizons}
    fingerprint = _fingerprint(make_optimizees()) if cache_dir is not None else {}
    for baseline in baselines:
        identities = {
            horizon: _identity(baseline, task, images, horizon, seed, num_optimizees, dtype)
            for horizon in result
        }
        kept: dict[int, TunedBaseline | None] = {}
        if cache_dir is not None:
            paths = {
                horizon: _cache_path(cache_dir, task, baseline, identities[horizon]) for horizon in result
            }
            kept = {h: _load(paths[h], baseline, identities[h], fingerprint) for h in result}
        missing = [horizon for horizon in result if kept.get(horizon) is None]
        score = _scorer(baseline, make_optimizees, missing, progress)
        for horizon in result:
            tuned = kept.get(horizon)
            if tuned is None:
                tuned = _search(baseline, functools.partial(score, horizon))
                if cache_dir is not None:
                    origin = {
                        "task": task.describe(),
                        "commit": commit(),
                        "versions": versions(),
                        "device": device_name(device),
                        "date": timestamp(),
                    }
                    provenance = {"search": identities[horizon], "fingerprint": fingerprint, "origin": origin}
                    write_json(paths[horizon], tuned.as_json() | provenance)
            result[horizon][baseline.name] = tuned
    return result


def _scorer(
    baseline: Baseline,
    make_optimizees: Callable[[], Optimizees],
    horizons: Sequence[int],
    progress: Callable[[str, float, float], None] | None,
) -> Callable[[int, Setting, int], float]:
    """The mean final loss by (horizon, setting, position of the rate); one run serves all the horizons."""
    longest = max(horizons, default=0)
    known: dict[Any, dict[int, float]] = {}

    def score(horizon: int, setting: Setting, position: int) -> float:
        key = (*setting.items(), position)
        if key not in known:
            rate = preferred_number(position)
            losses = run_baseline(
                baseline, rate, make_optimizees(), longest, setting=setting, stop_if_diverged=True
            )
            means = {h: float(final_losses(losses[:h]).mean()) for h in horizons}
            known[key] = {h: mean if math.isfinite(mean) else math.inf for h, mean in means.items()}
            if progress is not None:
                label = f"{baseline.name} ({setting_text(setting)})" if setting else baseline.name
                progress(label, rate, known[key][longest])
        return known[key][horizon]

    return score


def _search(baseline: Baseline, score: Callable[[Setting, int], float]) -> TunedBaseline:
    """Tries the default setting's whole grid, then a few rates of each alternative; takes the best of all."""
    default = _search_rates(baseline.grid, functools.partial(score, {}))
    best = _best(default)
    if math.isinf(default[best]):
        low, high = (preferred_number(edge(default)) for edge in (min, max))
        raise RuntimeError(
            f"{baseline.name} diverged at every learning rate from {low:g} to {high:g}; "
            "are the task's loss and gradient finite at θ0?"
        )
    searches = [default]
    for setting, positions in baseline.alternatives:
        expected = best + positions
        around = range(expected - 1, expected + 2)
        searches.append(_search_rates(around, functools.partial(score, setting)))
    trials = tuple(
        Trial(setting, preferred_number(position), scores[position])
        for setting, scores in zip(baseline.settings, searches, strict=True)
        for position in sorted(scores)
    )
    # Of equals the first: the default setting, the least rate.
    chosen = min(trials, key=lambda trial: trial.final_loss)
    return TunedBaseline(baseline, chosen.learning_rate, chosen.setting, trials)


def _search_rates(start: range, score: Callable[[int], float]) -> dict[int, float]:
    """Scores `start`, then one more position beyond an edge for as long as the best is on that edge."""
    scores = {position: score(position) for position in start}
    for _ in range(MAX_EXTENSIONS):
        best = _best(scores)
        if best == min(scores):
            position = best - 1
        elif best == max(scores):
            position = best + 1
        else:
            break
        scores[position] = score(position)
    return scores


def _best(scores: dict[int, float]) -> int:
    """The position of the least score; of equals the least position."""
    return min(scores, key=lambda position: (scores[position], position))


def _identity(
    baseline: Baseline,
    task: Task,
    images: Images | None,
    horizon: int,
    seed: int,
    num_optimizees: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All that determines a search's result, as plain JSON values."""

    def hyperparameters(setting: Setting) -> dict[str, Any]:
        defaults = baseline.make([torch.zeros(1)], 1.0, **setting).defaults
        return {name: value for name, value in defaults.items() if name != "lr"}

    identity = {
        "task": f"{type(task).__module__}.{type(task).__qualname__}",
        "config": task.config(),
        "data_source": None if images is None else images.source,
        "num_images": None if images is None else len(images),
        "horizon": horizon,
        "seed": seed,
        "num_optimizees": num_optimizees,
        "dtype": str(dtype),
        "optimizer": type(baseline.make([torch.zeros(1)], 1.0)).__name__,
        "hyperparameters": hyperparameters({}),
        "grid": baseline.learning_rates,
        "alternatives": [
            alternative._asdict() | {"hyperparameters": hyperparameters(alternative.setting)}
            for alternative in baseline.alternatives
        ],
        "package": versions()["l2l-lightning"],
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def _cache_path(cache_dir: Path | str, task: Task, baseline: Baseline, identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache_dir) / f"{type(task).__name__.lower()}-{baseline.name}-{digest}.json"


def _fingerprint(optimizees: Optimizees) -> dict[str, float]:
    """The mean loss and gradient norm at θ0.

    A search's identity names a task but doesn't hold its code: a function of the user's can change under its
    name. The loss alone would not do, as every classifier starts near the logarithm of its number of classes.
    """
    losses, grads = optimizees.losses_and_grads()
    return {"loss": float(losses.mean()), "grad_norm": float(grads.norm(dim=1).mean())}


def _load(
    path: Path, baseline: Baseline, identity: dict[str, Any], fingerprint: dict[str, float]
) -> TunedBaseline | None:
    """The search kept in a file; None, with a warning unless there is no file, if it cannot be used."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("search") != identity:
            raise ValueError("it is about another search")
        kept.pop("origin")
        before = kept.pop("fingerprint")
        for name, value in fingerprint.items():
            # Devices and thread counts round differently; another task differs by far more.
            if not math.isclose(before[name], value, rel_tol=1e-3):
                raise ValueError(f"the {name} at θ0 was {before[name]:g} and is {value:g}")
        return TunedBaseline.from_json(kept, {baseline.name: baseline})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"Tuning {baseline.name} again, as {path} cannot be used: {error!r}", stacklevel=3)
        return None
