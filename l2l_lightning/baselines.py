"""Hand-designed optimizers, each at the best learning rate that a search finds for the task at hand.

With g the gradient and η the learning rate:

    sgd       θ ← θ − η g
    momentum  m ← 0.9 m + g;            θ ← θ − η m
    nag       m ← 0.9 m + g;            θ ← θ − η (g + 0.9 m)
    rmsprop   v ← 0.99 v + 0.01 g²;     θ ← θ − η g / (√v + 1e-8)
    adam      m ← 0.9 m + 0.1 g;  v ← 0.999 v + 0.001 g²;
              θ ← θ − η m̂ / (√v̂ + 1e-8),  m̂ = m / (1 − 0.9ᵗ),  v̂ = v / (1 − 0.999ᵗ)
    adamw     adam, and θ ← (1 − 0.01 η) θ before it
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l_lightning.data.images import Images
from l2l_lightning.optimizees import Optimizees
from l2l_lightning.provenance import commit, device_name, timestamp, versions, write_json
from l2l_lightning.tasks.base import Task

FINAL_STEPS = 10
"""The final loss is a mean over this many last steps: one minibatch's loss alone is too noisy to rank by."""

MAX_EXTENSIONS = 12
"""How many learning rates, four decades, a search may add beyond its grid."""


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


@dataclass(frozen=True)
class Baseline:
    """A hand-designed optimizer and where to look for its learning rate.

    Example:
        >>> adagrad = Baseline("adagrad", lambda thetas, lr: torch.optim.Adagrad(thetas, lr), decades(-4, 1))
        >>> adagrad.learning_rates[:3]
        (0.0001, 0.0002, 0.0005)
    """

    name: str
    make: Callable[[list[Tensor], float], torch.optim.Optimizer]
    """(parameters, learning rate) to a fresh optimizer; it must act on each coordinate alone."""
    grid: range
    """Positions in the 1–2–5 series where the search starts."""

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The grid as learning rates, ascending."""
        return tuple(preferred_number(position) for position in self.grid)


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("sgd", lambda thetas, lr: torch.optim.SGD(thetas, lr), decades(-3, 2)),
        Baseline("momentum", lambda thetas, lr: torch.optim.SGD(thetas, lr, momentum=0.9), decades(-4, 1)),
        Baseline(
            "nag", lambda thetas, lr: torch.optim.SGD(thetas, lr, momentum=0.9, nesterov=True), decades(-4, 1)
        ),
        Baseline("rmsprop", lambda thetas, lr: torch.optim.RMSprop(thetas, lr), decades(-5, 0)),
        Baseline("adam", lambda thetas, lr: torch.optim.Adam(thetas, lr), decades(-5, 0)),
        Baseline("adamw", lambda thetas, lr: torch.optim.AdamW(thetas, lr), decades(-5, 0)),
    )
}
"""The baselines by name, at PyTorch's other defaults and momentum 0.9; each grid has 16 learning rates."""


def run_baseline(
    baseline: Baseline,
    learning_rate: float,
    optimizees: Optimizees,
    horizon: int,
    *,
    stop_if_diverged: bool = False,
) -> Tensor:
    """Optimises K optimizees for `horizon` steps with a fresh optimizer, and leaves them at θ_horizon.

    Args:
        baseline: The optimizer.
        learning_rate: Its η.
        optimizees: Where to start; their generators advance by one minibatch a step.
        horizon: Number of steps.
        stop_if_diverged: Stop as soon as one loss is not finite; the losses not computed are NaN.

    Returns:
        Losses [horizon, K]: row t is f_t(θ_t) on minibatch t, before update t.

    Example:
        >>> optimizees = Optimizees(task, images, seed=0, stream="test", indices=range(20))  # doctest: +SKIP
        >>> losses = run_baseline(BASELINES["adam"], 0.02, optimizees, horizon=100)  # doctest: +SKIP
    """
    # Every update is elementwise, so one parameter [K, N] moves as K parameters [N] would, in one launch.
    theta = torch.nn.Parameter(optimizees.theta.detach().clone())
    optimizees.theta = theta.detach()  # the same storage: the optimizer moves both
    optimizer = baseline.make([theta], learning_rate)
    losses = torch.full((horizon, len(optimizees)), math.nan, dtype=theta.dtype, device=theta.device)
    for step in range(horizon):
        losses[step], theta.grad = optimizees.losses_and_grads()
        if stop_if_diverged and not losses[step].isfinite().all():
            break
        optimizer.step()
    return losses


@dataclass(frozen=True)
class TunedBaseline:
    """A baseline with the learning rate that the search chose, and all that it tried."""

    baseline: Baseline
    learning_rate: float
    scores: dict[float, float]
    """Mean final loss by learning rate, ascending in the rate; inf where an optimizee diverged."""

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the least or the greatest tried: it may lie beyond."""
        return self.learning_rate in (min(self.scores), max(self.scores))


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
    """Finds each baseline's learning rate: the least final loss, averaged over the tuning optimizees.

    The final loss is the mean of the last 10 (or `horizon`, if fewer); one diverged optimizee makes the score
    infinite. While the best rate is the least or greatest tried, the grid grows on that side, by 12 rates at
    most. The optimizees come from the stream "tuning", which no reported result draws from.

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
        progress: Called with (baseline's name, learning rate, score) after every rate.

    Returns:
        The tuned baselines, by name.

    Raises:
        RuntimeError: A baseline diverged at every learning rate.

    Example:
        >>> tuned = tune(task, validation_images, horizon=100, seed=0)  # doctest: +SKIP
        >>> tuned["adam"].learning_rate  # doctest: +SKIP
        0.02
    """

    def make_optimizees() -> Optimizees:
        return Optimizees(task, images, seed, "tuning", range(num_optimizees), device, dtype)

    def search(baseline: Baseline) -> TunedBaseline:
        def score(position: int) -> float:
            rate = preferred_number(position)
            losses = run_baseline(baseline, rate, make_optimizees(), horizon, stop_if_diverged=True)
            final = float(final_losses(losses).mean())
            result = final if math.isfinite(final) else math.inf
            if progress is not None:
                progress(baseline.name, rate, result)
            return result

        return _search(baseline, score)

    fingerprint = _fingerprint(make_optimizees()) if cache_dir is not None else {}
    result = {}
    for baseline in baselines:
        if cache_dir is None:
            result[baseline.name] = search(baseline)
            continue
        settings = _settings(baseline, task, images, horizon, seed, num_optimizees, dtype)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        path = Path(cache_dir) / f"{type(task).__name__.lower()}-{baseline.name}-{digest}.json"
        tuned = _load(path, baseline, settings, fingerprint)
        if tuned is None:
            tuned = search(baseline)
            origin = {
                "task": task.describe(),
                "commit": commit(),
                "versions": versions(),
                "device": device_name(device),
                "date": timestamp(),
            }
            _save(path, tuned, {"settings": settings, "fingerprint": fingerprint, "origin": origin})
        result[baseline.name] = tuned
    return result


def _search(baseline: Baseline, score: Callable[[int], float]) -> TunedBaseline:
    """Scores the grid, then one more position beyond an edge for as long as the best is on that edge."""
    scores = {position: score(position) for position in baseline.grid}

    def best() -> int:
        return min(scores, key=lambda position: (scores[position], position))

    for _ in range(MAX_EXTENSIONS):
        if best() == min(scores):
            position = min(scores) - 1
        elif best() == max(scores):
            position = max(scores) + 1
        else:
            break
        scores[position] = score(position)

    by_rate = {preferred_number(position): scores[position] for position in sorted(scores)}
    learning_rate = preferred_number(best())
    if math.isinf(by_rate[learning_rate]):
        raise RuntimeError(
            f"{baseline.name} diverged at every learning rate from {min(by_rate):g} to {max(by_rate):g}; "
            "are the task's loss and gradient finite at θ0?"
        )
    return TunedBaseline(baseline, learning_rate, by_rate)


def _settings(
    baseline: Baseline,
    task: Task,
    images: Images | None,
    horizon: int,
    seed: int,
    num_optimizees: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All that determines a search's result, as plain JSON values."""
    optimizer = baseline.make([torch.zeros(1, requires_grad=True)], 1.0)
    hyperparameters = {name: value for name, value in optimizer.defaults.items() if name != "lr"}
    settings = {
        "task": f"{type(task).__module__}.{type(task).__qualname__}",
        "config": task.config(),
        "data_source": None if images is None else images.source,
        "num_images": None if images is None else len(images),
        "horizon": horizon,
        "seed": seed,
        "num_optimizees": num_optimizees,
        "dtype": str(dtype),
        "optimizer": type(optimizer).__name__,
        "hyperparameters": hyperparameters,
        "grid": baseline.learning_rates,
        "package": versions()["l2l-lightning"],
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _fingerprint(optimizees: Optimizees) -> dict[str, float]:
    """The mean loss and gradient norm at θ0.

    The settings name a task but don't hold its code: a function of the user's can change under its name.
    The loss alone would not do, as every classifier starts near the logarithm of its number of classes.
    """
    losses, grads = optimizees.losses_and_grads()
    return {"loss": float(losses.mean()), "grad_norm": float(grads.norm(dim=1).mean())}


def _save(path: Path, tuned: TunedBaseline, provenance: dict[str, Any]) -> None:
    scores = [
        {"learning_rate": rate, "final_loss": score if math.isfinite(score) else None}
        for rate, score in tuned.scores.items()
    ]
    result = {"baseline": tuned.baseline.name, "learning_rate": tuned.learning_rate, "scores": scores}
    write_json(path, result | provenance)


def _load(
    path: Path, baseline: Baseline, settings: dict[str, Any], fingerprint: dict[str, float]
) -> TunedBaseline | None:
    """The search kept in a file; None, with a warning unless there is no file, if it cannot be used."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] != settings:
            raise ValueError("it is about other settings")
        for name, value in fingerprint.items():
            # Devices and thread counts round differently; another task differs by far more.
            if not math.isclose(kept["fingerprint"][name], value, rel_tol=1e-3):
                raise ValueError(f"the {name} at θ0 was {kept['fingerprint'][name]:g} and is {value:g}")
        scores = {
            float(row["learning_rate"]): math.inf if row["final_loss"] is None else float(row["final_loss"])
            for row in kept["scores"]
        }
        learning_rate = float(kept["learning_rate"])
        if scores[learning_rate] != min(scores.values()):
            raise ValueError("its learning rate is not the best of its scores")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"Tuning {baseline.name} again, as {path} cannot be used: {error!r}", stacklevel=3)
        return None
    return TunedBaseline(baseline, learning_rate, scores)
