"""Hand-designed optimizers, and how K optimizees are run with one.

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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2l_lightning.rollout.optimizees import Optimizees

Setting = dict[str, float]
"""The hyperparameters that are not an optimizer's default, besides the learning rate; {} is the default."""


def preferred_number(position: int) -> float:
    """Returns a member of the 1–2–5 series; 0 is 1.0, and three positions are a decade.

    The series is spaced as evenly on a log scale as round numbers can be.

    Example:
        >>> [preferred_number(i) for i in range(-3, 4)]
        [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    """
    decade, digit = divmod(position, 3)
    return float(f"{(1, 2, 5)[digit]}e{decade}")


def decades(low: int, high: int) -> range:
    """Returns the positions of 10^low … 10^high, both included, in the 1–2–5 series."""
    return range(3 * low, 3 * high + 1)


class Alternative(NamedTuple):
    """A setting that a search tries besides the default one."""

    setting: Setting
    positions: int = 0
    """How far above the default setting's best rate this setting's is expected, in the 1–2–5 series."""


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
    """Makes an optimizer of (parameters, learning rate, **setting); it must act on each coordinate alone."""
    grid: range
    """Positions in the 1–2–5 series where the search starts."""
    alternatives: tuple[Alternative, ...] = ()
    """The settings that are tried besides the default one."""

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


def _with_betas(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Gives β1 and β2 a name each, so that a setting can name them."""
    return lambda thetas, lr=1e-3, beta1=0.9, beta2=0.999: optimizer(thetas, lr, betas=(beta1, beta2))


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("sgd", torch.optim.SGD, decades(-3, 2)),
        Baseline("momentum", partial(torch.optim.SGD, momentum=0.9), decades(-4, 1), MOMENTA),
        Baseline("nag", partial(torch.optim.SGD, momentum=0.9, nesterov=True), decades(-4, 1), MOMENTA),
        Baseline("rmsprop", torch.optim.RMSprop, decades(-5, 0), ALPHAS),
        Baseline("adam", _with_betas(torch.optim.Adam), decades(-5, 0), BETAS),
        Baseline("adamw", _with_betas(torch.optim.AdamW), decades(-5, 0), BETAS),
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
        optimizees: The K optimizees at θ0 [K, N]; their generators advance by one minibatch a step.
        horizon: Number of steps.
        setting: Its other hyperparameters; None is the default setting, {}.
        stop_if_diverged: Whether to stop as soon as one loss is not finite; the losses left out are NaN.

    Returns:
        Losses [horizon, K]: row t is f_t(θ_t) on minibatch t, before update t.

    Example:
        >>> from l2l_lightning import Quadratic
        >>> optimizees = Optimizees(Quadratic(dim=2), None, seed=0, stream="test", indices=range(20))
        >>> run_baseline(BASELINES["adam"], 0.02, optimizees, 5, setting={"beta1": 0.95, "beta2": 0.95}).shape
        torch.Size([5, 20])
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
    """A setting and a learning rate that a search tried, and the loss that they gave."""

    setting: Setting
    learning_rate: float
    final_loss: float
    """The mean final loss of the tuning optimizees; inf where one diverged."""


@dataclass(frozen=True)
class TunedBaseline:
    """A baseline at the learning rate and setting that a search chose, and all that the search tried.

    Example:
        >>> adam = TunedBaseline(BASELINES["adam"], 0.02, {"beta1": 0.9, "beta2": 0.95})
        >>> TunedBaseline.from_json(adam.as_json()) == adam
        True
    """

    baseline: Baseline
    learning_rate: float
    setting: Setting = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    """What was tried, in the order of Baseline.settings and ascending in the rate; () without a search."""

    @property
    def scores(self) -> dict[float, float]:
        """The mean final loss by learning rate, ascending, at the chosen setting; inf where one diverged."""
        return {rate: loss for setting, rate, loss in self.trials if setting == self.setting}

    @property
    def at_edge(self) -> bool:
        """Whether the rate is the least or the greatest tried at its setting: the best may lie beyond."""
        rates = self.scores
        return bool(rates) and self.learning_rate in (min(rates), max(rates))

    def as_json(self) -> dict[str, Any]:
        """Returns "baseline", "learning_rate", "setting" and "scores"; a loss that is not finite is null."""
        return {
            "baseline": self.baseline.name,
            "learning_rate": self.learning_rate,
            "setting": self.setting,
            "scores": [
                trial._asdict()
                | {"final_loss": trial.final_loss if math.isfinite(trial.final_loss) else None}
                for trial in self.trials
            ],
        }

    @classmethod
    def from_json(
        cls, content: dict[str, Any], baselines: Mapping[str, Baseline] = BASELINES
    ) -> TunedBaseline:
        """Reads what `as_json` gave.

        Args:
            content: The plain values.
            baselines: The optimizers by name, of which the content names one.

        Raises:
            ValueError: A key, the baseline or a hyperparameter is unknown, a key is missing, a number is out
                of its range, or there are scores and another one is the best.
        """
        try:
            if content["baseline"] not in list(baselines):
                raise ValueError(
                    f"unknown baseline {content['baseline']!r}: choose from {', '.join(baselines)}"
                )
            baseline = baselines[content["baseline"]]
            trials = tuple(Trial(**row) for row in content["scores"])
            trials = tuple(t._replace(final_loss=math.inf) if t.final_loss is None else t for t in trials)
            tuned = cls(baseline, content["learning_rate"], content["setting"], trials)
            for setting, rate in ((tuned.setting, tuned.learning_rate), *(trial[:2] for trial in trials)):
                if rate <= 0 or not all(math.isfinite(value) for value in (rate, *setting.values())):
                    raise ValueError(f"{baseline.name} cannot run at {rate!r}, {setting!r}")
                # The optimizer itself knows its hyperparameters and their ranges.
                baseline.make([torch.zeros(1)], rate, **setting)
        except (AttributeError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"this is no tuned baseline: {error!r}") from error
        if tuned.as_json() != content:
            raise ValueError("it has keys or numbers that a tuned baseline has not")
        if trials and tuned.learning_rate not in tuned.scores:
            raise ValueError("its learning rate and setting are not among its scores")
        if trials and tuned.scores[tuned.learning_rate] > min(trial.final_loss for trial in trials):
            raise ValueError("its learning rate and setting are not the best of its scores")
        return tuned


def setting_text(setting: Mapping[str, float]) -> str:
    """Returns a setting in words, "" for the default one.

    Example:
        >>> setting_text({"beta1": 0.9, "beta2": 0.95})
        'beta1 0.9, beta2 0.95'
    """
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def default_baselines() -> dict[str, TunedBaseline]:
    """Returns the baselines at torch.optim's default learning rates, which need no search; momentum is 0.9.

    Example:
        >>> {name: default.learning_rate for name, default in default_baselines().items()}
        {'sgd': 0.001, 'momentum': 0.001, 'nag': 0.001, 'rmsprop': 0.01, 'adam': 0.001, 'adamw': 0.001}
    """
    rates = {name: baseline.make([torch.zeros(1)]).defaults["lr"] for name, baseline in BASELINES.items()}
    return {name: TunedBaseline(baseline, rates[name]) for name, baseline in BASELINES.items()}
