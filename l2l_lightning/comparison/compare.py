"""Paired comparison of optimizers: the same optimizees, the same minibatches, an interval on every mean."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from l2l_lightning.comparison.baselines import Setting, TunedBaseline, run_baseline
from l2l_lightning.comparison.result import LEARNED as LEARNED
from l2l_lightning.comparison.result import Comparison as Comparison
from l2l_lightning.comparison.result import Result as Result
from l2l_lightning.provenance import device_name
from l2l_lightning.rollout.optimizees import Optimizees


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


def compare(
    contenders: Sequence[Contender],
    make_optimizees: Callable[[], Optimizees],
    horizon: int,
    *,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Runs every contender on the same optimizees.

    Args:
        contenders: The optimizers; the learned one is named "learned".
        make_optimizees: Returns fresh optimizees, with the same θ0 and minibatches to come at every call.
        horizon: Steps per rollout.
        seed: What the optimizees were derived from, for the record.
        settings: What the contenders came from, as plain values, for the record.
        progress: Called with every contender's name before it runs.

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
        if progress is not None:
            progress(contender.name)
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
        settings=settings or {},
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
