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
from l2l_lightning.rollout.perturbed import PerturbedRollout
from l2l_lightning.rules import Grouped, RNNprop, ZeroShot
from l2l_lightning.training.estimators import evolution_gradient, perturbation, relative_differences

RULES = {
    "LSTM": lambda: CoordinatewiseLSTM(hidden_size=3, p=4.0),
    "RNNprop": lambda: RNNprop(hidden_size=3),
    "momentum": LearnedMomentum,
    "features": MixedLSTM,
    "time and tensors": TensorwiseMomentum,
    "zero-shot": lambda: zero_shot(),
    "zero-shot with all facts": lambda: zero_shot(decay_facts=4),
    "zero-shot without a horizon": lambda: zero_shot(orthogonal=False, horizon_free=True),
    "grouped": lambda: Grouped({"weight": TensorwiseMomentum(), "bias": CoordinatewiseLSTM(1, 3)}),
}
HORIZON = 6


def zero_shot(**arguments):
    """Off its start, so that every number of φ has a part."""
    rule = ZeroShot(**arguments)
    with torch.no_grad():
        for phi in rule.parameters():
            phi.add_(0.2 * torch.randn_like(phi))
    return rule


@pytest.fixture(params=RULES)
def rule(request):
    torch.manual_seed(0)
    return RULES[request.param]().double()


def optimizees(rule, indices):
    network = isinstance(rule, Grouped | ZeroShot)
    task = MNISTMLP(hidden_sizes=[5], batch_size=4) if network else Rosenbrock()
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
    losses = PerturbedRollout(rule, together, HORIZON).window(phis, HORIZON)
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
            found = evolution_gradient(PerturbedRollout(rule, pair, HORIZON), HORIZON, epsilons, 0.1)[1]
            results.append((*found, pair.theta))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def estimated(rule, pairs, sigma=0.02, compared="uniform", seed=0):
    """The estimate of whole rollouts of these pairs."""
    epsilons = [perturbation(rule, seed, pair) for pair in pairs]
    rollout = PerturbedRollout(rule, optimizees(rule, [pair for pair in pairs for _ in range(2)]), HORIZON)
    return evolution_gradient(rollout, HORIZON, epsilons, sigma, compared, rollout.optimizees.images)


@pytest.mark.parametrize("final", [True, False])
def test_the_estimate_is_the_formula(rule, final):
    """Pair after pair by `run_rule`, and parameter after parameter."""
    sigma, pairs = 0.02, [5, 3]
    epsilons = [perturbation(rule, 0, pair) for pair in pairs]
    value, gradients = estimated(rule, pairs, sigma, "final" if final else "uniform")
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

    both, first, second = (estimated(rule, pairs)[1] for pairs in ([0, 1], [0], [1]))
    for whole, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(whole, (a + b) / 2, rtol=1e-6, atol=1e-9)


def test_differences_are_free_of_scale_and_bounded():
    losses = torch.rand(30, 8, generator=torch.Generator().manual_seed(0)).double() + 0.1
    for final in (True, False):
        d = relative_differences(losses, final)
        torch.testing.assert_close(relative_differences(1e-6 * losses, final), d)
        torch.testing.assert_close(
            relative_differences(losses.unflatten(1, (4, 2)).flip(2).flatten(1), final), -d
        )
        near = torch.stack([losses[:, :4], losses[:, :4] * 1.001], 2).flatten(1)
        expected = torch.full((4,), -math.log(1.001), dtype=torch.float64)
        torch.testing.assert_close(relative_differences(near, final), expected, rtol=1e-6, atol=0)
    bad = torch.tensor([[torch.nan, 1.0, torch.inf, -1.0, 1.0, 1.0, torch.nan, torch.inf]])
    assert relative_differences(bad, final=True).tolist() == [2.0, 2.0, 0.0, 0.0]
    assert relative_differences(torch.zeros(3, 4), final=False).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("network", [True, False])
def test_held_out_losses_are_compared_after_the_last_step(network):
    """And half of all others, both within half a unit."""
    torch.manual_seed(0)
    rule = RULES["grouped" if network else "time and tensors"]().double()
    pairs, sigma, expected = [4, 1, 2], 0.3, []
    for pair in pairs:
        losses, held_out = [], []
        for sign in (1, -1):
            one = optimizees(rule, [pair])
            losses.append(run_rule(moved(rule, perturbation(rule, 0, pair), sign * sigma), one, HORIZON))
            batch = one.task.batch(one._instances[0], one.images, one.generators[0])
            if network:
                pixels, labels = one.images.gather(batch)
                batch = pixels.double(), labels
            held_out.append(one.task.loss(one.theta[0], batch))
        d = [2 * (a - b) / (a.abs() + b.abs()) for a, b in (losses, held_out)]
        d = d[1].clamp(-0.5, 0.5) + 0.5 * d[0].mean().clamp(-0.5, 0.5)
        expected.append({n: d * e / (2 * sigma) for n, e in perturbation(rule, 0, pair).items()})
    gradients = estimated(rule, pairs, sigma, "held_out")[1]
    for ours, (name, _) in zip(gradients, rule.named_parameters(), strict=True):
        torch.testing.assert_close(ours, sum(e[name] for e in expected) / 3, rtol=1e-6, atol=1e-9)


def test_windows_of_noise_reuse_go_on_with_their_noise(rule):
    """With φ as it is, two windows are one of both; θ, states and statistics are saved and taken up."""
    epsilons, sigma, total = [perturbation(rule, 0, 3)], 0.05, 2 * HORIZON

    def start():
        return PerturbedRollout(rule, optimizees(rule, [3, 3]), total)

    whole, halves = start(), start()
    _, expected = evolution_gradient(whole, total, epsilons, sigma)
    first = evolution_gradient(halves, HORIZON, epsilons, sigma)[1]
    saved = copy.deepcopy(halves.state_dict())
    second = evolution_gradient(halves, HORIZON, epsilons, sigma)[1]
    again = start()
    again.load_state_dict(saved)
    assert all(map(torch.equal, evolution_gradient(again, HORIZON, epsilons, sigma)[1], second))
    assert torch.equal(again.optimizees.theta, halves.optimizees.theta)
    torch.testing.assert_close(halves.optimizees.theta, whole.optimizees.theta, rtol=1e-9, atol=1e-12)
    for a, b, mean in zip(first, second, expected, strict=True):
        torch.testing.assert_close((a + b) / 2, mean, rtol=1e-6, atol=1e-9)


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


@pytest.mark.parametrize("arguments", [{}, {"estimator": "nres", "unroll": 2}])
def test_a_fit_goes_on_bit_for_bit(tmp_path, arguments):
    """Between rollouts, and in the middle of one."""
    rollouts = 6 if not arguments else 3
    trainer, whole = run(tmp_path, rollouts, **arguments)
    assert trainer.global_step == (6 if not arguments else 12)
    half = tmp_path / "step=3.ckpt" if not arguments else tmp_path / "step=6.ckpt"
    _, resumed = run(tmp_path / "again", rollouts, ckpt_path=half, **arguments)
    for ours, theirs in zip(resumed.rule.parameters(), whole.rule.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    if arguments:
        return
    with pytest.raises(CheckpointMismatchError, match=r"--model\.estimator is window, the checkpoint's evol"):
        run(tmp_path / "other", 6, half, estimator="window", unroll=8)
    again = MetaLearner.from_checkpoint(half, trust=["learned_momentum"])
    assert (again.estimator, again.sigma, again.unrolls) == ("evolution", 0.1, [8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "pes"}, "estimator must be one of window, evolution, nres"),
        ({"estimator": "nres"}, r"unroll \(20\) must not exceed horizon \(8\)"),
        ({"sigma": 0.0}, "sigma must be positive"),
        (
            {"second_order": True},
            "estimator='evolution' keeps no states: second_order, cuda_graphs, checkpoint_every and",
        ),
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
        PerturbedRollout(rule, optimizees(rule, [0, 1])).window({"decay": torch.zeros(2)}, 3)
    with pytest.raises(ValueError, match="unroll must be at least 1, got 0"):
        PerturbedRollout(rule, optimizees(rule, [0, 1])).window({}, 0)
