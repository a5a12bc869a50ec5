"""Evolution strategies over whole rollouts: the estimate, its pairs, and a fit by it."""

import copy
import math

import pytest
import torch
from learned_momentum import LearnedMomentum
from lightning.pytorch.callbacks import ModelCheckpoint
from meta_training import fit
from mixed_features import MixedLSTM, TensorwiseMomentum
from problems import Rosenbrock

from l2l_lightning import (
    MNISTMLP,
    CoordinatewiseLSTM,
    MetaLearner,
    Optimizees,
    Quadratic,
    run_rule,
)
from l2l_lightning.data import load_images
from l2l_lightning.errors import CheckpointMismatchError
from l2l_lightning.rollout.perturbed import run_perturbed
from l2l_lightning.rules import Grouped, RNNprop
from l2l_lightning.training.estimators import evolution_gradient, perturbation, relative_differences

RULES = {
    "LSTM": lambda: CoordinatewiseLSTM(hidden_size=3, p=4.0),
    "RNNprop": lambda: RNNprop(hidden_size=3),
    "momentum": LearnedMomentum,
    "features": MixedLSTM,
    "time and tensors": TensorwiseMomentum,
    "grouped": lambda: Grouped({"weight": TensorwiseMomentum(), "bias": CoordinatewiseLSTM(1, 3)}),
}
HORIZON = 6


@pytest.fixture(params=RULES)
def rule(request):
    torch.manual_seed(0)
    return RULES[request.param]().double()


def optimizees(rule, indices):
    network = isinstance(rule, Grouped)
    task = MNISTMLP(hidden_sizes=[3], batch_size=4) if network else Rosenbrock()
    images = load_images("mnist").train if network else None
    return Optimizees(task, images, 0, "train", indices, dtype=torch.float64)


def moved(rule, epsilon, scale):
    """The rule at φ + scale · ε."""
    other = copy.deepcopy(rule)
    with torch.no_grad():
        for name, phi in other.named_parameters():
            phi.add_(scale * epsilon[name])
    return other


def test_every_optimizee_is_moved_by_its_own_rule(rule):
    epsilons = [perturbation(rule, 0, index) for index in range(3)]
    phis = {
        name: torch.stack([phi.detach() + 0.05 * epsilon[name] for epsilon in epsilons])
        for name, phi in rule.named_parameters()
    }
    together = optimizees(rule, [0, 1, 0])
    losses = run_perturbed(rule, phis, together, HORIZON)
    for k, index in enumerate((0, 1, 0)):
        alone = optimizees(rule, [index])
        expected = run_rule(moved(rule, epsilons[k], 0.05), alone, HORIZON)
        torch.testing.assert_close(losses[:, [k]], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.theta[[k]], alone.theta, rtol=1e-9, atol=1e-12)


def test_autocast_is_for_the_optimizees_alone():
    """Of a task without a matrix product it changes nothing: neither the rule nor the estimate is rounded."""
    torch.manual_seed(0)
    rule, results = CoordinatewiseLSTM(hidden_size=3, p=4.0), []
    epsilons = [perturbation(rule, 0, 0)]
    for enabled in (False, True):
        pair = Optimizees(Rosenbrock(), None, 0, "train", [0, 0])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append((*evolution_gradient(rule, pair, HORIZON, epsilons, 0.1, False)[1], pair.theta))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("final", [True, False])
def test_the_estimate_is_the_formula(rule, final):
    """Pair after pair by `run_rule`, and parameter after parameter."""
    sigma, pairs = 0.02, [5, 3]
    epsilons = [perturbation(rule, 7, pair) for pair in pairs]
    value, gradients = evolution_gradient(rule, optimizees(rule, pairs * 2), HORIZON, epsilons, sigma, final)
    expected = [torch.zeros_like(phi) for phi in rule.parameters()]
    all_losses = []
    for pair, epsilon in zip(pairs, epsilons, strict=True):
        plus, minus = (
            run_rule(moved(rule, epsilon, scale), optimizees(rule, [pair]), HORIZON).squeeze(1)
            for scale in (sigma, -sigma)
        )
        all_losses += [plus, minus]
        if final:
            plus, minus = plus.mean(), minus.mean()  # the horizon is shorter than ten steps
        d = (2 * (plus - minus) / (plus.abs() + minus.abs())).mean()
        for total, name in zip(expected, epsilon, strict=True):
            total += d * epsilon[name] / (2 * sigma) / len(pairs)
    torch.testing.assert_close(value, torch.stack(all_losses).mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-9)


def test_processes_share_the_pairs(rule):
    """Two processes of one pair each give, in the mean, what one of two pairs gives."""

    def gradient(pairs):
        epsilons = [perturbation(rule, 0, pair) for pair in pairs]
        return evolution_gradient(rule, optimizees(rule, pairs * 2), HORIZON, epsilons, 0.02, False)[1]

    both, first, second = gradient([0, 1]), gradient([0]), gradient([1])
    for whole, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(whole, (a + b) / 2, rtol=1e-6, atol=1e-9)


def test_differences_are_free_of_scale_and_bounded():
    losses = torch.rand(30, 8, generator=torch.Generator().manual_seed(0)).double() + 0.1
    for final in (True, False):
        d = relative_differences(losses, final)
        torch.testing.assert_close(relative_differences(1e-6 * losses, final), d)
        torch.testing.assert_close(relative_differences(losses.roll(4, 1), final), -d)
        near = torch.cat([losses[:, :4], losses[:, :4] * 1.001], 1)
        expected = torch.full((4,), -math.log(1.001), dtype=torch.float64)
        torch.testing.assert_close(relative_differences(near, final), expected, rtol=1e-6, atol=0)
    bad = torch.tensor([[torch.nan, torch.inf, 1.0, torch.nan, 1.0, -1.0, 1.0, torch.inf]])
    assert relative_differences(bad, final=True).tolist() == [2.0, 2.0, 0.0, 0.0]
    assert relative_differences(torch.zeros(3, 4), final=False).tolist() == [0.0, 0.0]


def learner(**arguments):
    torch.manual_seed(0)
    settings = {"horizon": 8, "num_tasks": 4, "num_validation_optimizees": 4, "learning_rate": 0.1}
    return MetaLearner(
        Quadratic(dim=4), LearnedMomentum(), **settings | {"estimator": "evolution"} | arguments
    )


def run(folder, num_rollouts, ckpt_path=None, **arguments):
    model = learner(**arguments)
    kept = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    return fit(model, folder, kept, num_rollouts=num_rollouts, ckpt_path=ckpt_path), model


def test_a_fit_learns_by_it_one_rollout_a_step(tmp_path):
    trainer, model = run(tmp_path, 80)
    assert trainer.global_step == 80
    # What is compared is each loss with its pair's, so that it is their logarithm that falls.
    losses = [
        run_rule(rule, Optimizees(Quadratic(dim=4), None, 0, "test", range(50)), 8).log().mean()
        for rule in (learner().rule, model.rule)
    ]
    assert losses[1] < losses[0] - 0.2


def test_a_fit_goes_on_bit_for_bit(tmp_path):
    _, whole = run(tmp_path, 6)
    half = tmp_path / "step=3.ckpt"
    _, resumed = run(tmp_path / "again", 6, ckpt_path=half)
    for ours, theirs in zip(resumed.rule.parameters(), whole.rule.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(CheckpointMismatchError, match=r"--model\.estimator is window, the checkpoint's evol"):
        run(tmp_path / "other", 6, half, estimator="window", unroll=8)
    again = MetaLearner.from_checkpoint(half, trust=["learned_momentum"])
    assert (again.estimator, again.sigma, again.unrolls) == ("evolution", 0.1, [8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "pes"}, "estimator must be one of window, evolution"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"second_order": True}, "second_order, cuda_graphs, checkpoint_every and history_dtype must not"),
        ({"checkpoint_every": 2}, "second_order, cuda_graphs, checkpoint_every and history_dtype must not"),
        ({"history_dtype": "bfloat16"}, "checkpoint_every and history_dtype must not be set"),
    ],
)
def test_what_cannot_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        learner(**arguments)


def test_every_rollout_needs_its_phi():
    rule = LearnedMomentum()
    with pytest.raises(ValueError, match="phis must hold"):
        run_perturbed(rule, {"decay": torch.zeros(2)}, optimizees(rule, [0, 1]), 3)
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        run_perturbed(rule, {}, optimizees(rule, [0, 1]), 0)
