"""What every baseline does: a line in FORMULAS has it tested."""

import itertools
import json

import numpy as np
import pytest
import torch
from bowls import Bowl, QuickBowl
from torch import optim

from l2l_lightning.comparison.baselines import (
    BASELINES,
    TunedBaseline,
    default_baselines,
    preferred_number,
    run_baseline,
)
from l2l_lightning.comparison.statistics import final_losses
from l2l_lightning.comparison.tuning import tune
from l2l_lightning.rollout.optimizees import Optimizees


def adam(g, m, v, t, beta1=0.9, beta2=0.999):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    return (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8), m, v


def momentum(g, m, v, t, momentum=0.9):
    m = momentum * m + g
    return m, m, v


def nesterov(g, m, v, t, momentum=0.9):
    m = momentum * m + g
    return g + momentum * m, m, v


def rmsprop(g, m, v, t, alpha=0.99):
    v = alpha * v + (1 - alpha) * g**2
    return g / (np.sqrt(v) + 1e-8), m, v


FORMULAS = {
    # (g, m, v, t, **setting) to (update, m, v), as the textbooks write it; decay of θ; PyTorch's optimizer.
    "sgd": (lambda g, m, v, t: (g, m, v), 0.0, optim.SGD, {}),
    "momentum": (momentum, 0.0, optim.SGD, {"momentum": 0.9}),
    "nag": (nesterov, 0.0, optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (rmsprop, 0.0, optim.RMSprop, {}),
    "adam": (adam, 0.0, optim.Adam, {}),
    "adamw": (adam, 0.01, optim.AdamW, {}),
}


@pytest.fixture(params=FORMULAS)
def name(request):
    return request.param


def optimizees(task, indices=range(3), dtype=torch.float32):
    return Optimizees(task, None, 0, "test", indices, dtype=dtype)


def test_every_baseline_is_tested():
    assert BASELINES.keys() == FORMULAS.keys()


def test_it_follows_its_formula_at_every_setting(name):
    """θ in float64 NumPy, to the last digits."""
    formula, decay, *_ = FORMULAS[name]
    curvature, rate, horizon = np.array([0.5, 2.0, 7.0]), 0.05, 8
    for setting in BASELINES[name].settings:
        ours = optimizees(Bowl(curvature), range(4), torch.float64)
        theta = ours.theta.numpy().copy()
        losses = run_baseline(BASELINES[name], rate, ours, horizon, setting=setting)
        m, v = np.zeros_like(theta), np.zeros_like(theta)
        for t in range(horizon):
            expected = (curvature / 2 * theta**2).sum(-1)
            np.testing.assert_allclose(losses[t].numpy(), expected, rtol=1e-12, err_msg=str(setting))
            update, m, v = formula(curvature * theta, m, v, t + 1, **setting)
            theta = (1 - decay * rate) * theta - rate * update
        np.testing.assert_allclose(ours.theta.numpy(), theta, rtol=1e-12, err_msg=str(setting))


def test_it_is_pytorchs_optimizer_in_a_plain_loop(name):
    """Bit for bit, one fresh optimizer for each optimizee and run, one minibatch a step."""
    *_, make, arguments = FORMULAS[name]
    task = Bowl((0.5, 2.0), noise=1.0)
    ours, by_hand = optimizees(task), optimizees(task)
    theta0 = ours.theta
    losses = run_baseline(BASELINES[name], 0.1, ours, 12)
    assert torch.equal(theta0, by_hand.theta)
    thetas = [torch.nn.Parameter(theta.clone()) for theta in by_hand.theta]
    optimizers = [make([theta], lr=0.1, **arguments) for theta in thetas]
    for row in losses:
        batches = by_hand.next_batches()
        for theta, optimizer, batch, expected in zip(thetas, optimizers, batches, row, strict=True):
            optimizer.zero_grad()
            loss = task.loss(theta, batch)
            loss.backward()
            optimizer.step()
            assert torch.equal(expected, loss.detach())
    assert torch.equal(ours.theta, torch.stack([theta.detach() for theta in thetas]))
    for generator, expected in zip(ours.generators, by_hand.generators, strict=True):
        assert torch.equal(generator.get_state(), expected.get_state())


def test_grids_are_wide_and_log_spaced():
    assert preferred_number(-4) == 0.05
    for baseline in BASELINES.values():
        rates = np.array(baseline.learning_rates)
        assert len(rates) >= 15
        assert (rates[1:] / rates[:-1]).max() <= 2.5 + 1e-9
        assert rates[-1] / rates[0] == pytest.approx(1e5)


def test_a_search_scores_what_it_says_takes_the_best_and_survives_json(name):
    baseline, task, horizon = BASELINES[name], QuickBowl((0.3, 2.0, 90.0), noise=0.1), 12
    tuned = tune(task, None, [horizon], 0, num_optimizees=2, baselines=[baseline])[horizon][name]
    for setting, rate, loss in tuned.trials:
        tuning = Optimizees(task, None, 0, "tuning", range(2))
        expected = float(final_losses(run_baseline(baseline, rate, tuning, horizon, setting=setting)).mean())
        assert loss == (expected if np.isfinite(expected) else np.inf)
    assert (tuned.setting, tuned.learning_rate) == min(tuned.trials, key=lambda trial: trial.final_loss)[:2]
    assert TunedBaseline.from_json(json.loads(json.dumps(tuned.as_json(), allow_nan=False))) == tuned
    assert tuned.scores == {t.learning_rate: t.final_loss for t in tuned.trials if t.setting == tuned.setting}
    by_setting = [[t for t in tuned.trials if t.setting == setting] for setting in baseline.settings]
    assert [*itertools.chain(*by_setting)] == list(tuned.trials)
    assert [trial.learning_rate for trial in by_setting[0]] == list(baseline.learning_rates)
    default = min(by_setting[0], key=lambda trial: trial.final_loss).learning_rate
    for alternative, trials in zip(baseline.alternatives, by_setting[1:], strict=True):
        rates = [trial.learning_rate for trial in trials]
        assert rates == [
            preferred_number(p) for p in range(-30, 30) if rates[0] <= preferred_number(p) <= rates[-1]
        ]
        expected = default * 10 ** (alternative.positions / 3)
        assert rates[0] < expected < rates[-1]
        assert min(trials, key=lambda trial: trial.final_loss) not in (trials[0], trials[-1])


def test_its_defaults_are_pytorchs(name):
    default = default_baselines()[name]
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert default.baseline is BASELINES[name]
    assert default.learning_rate == FORMULAS[name][2]([parameter]).defaults["lr"]
    assert (default.setting, default.trials, default.at_edge) == ({}, (), False)
