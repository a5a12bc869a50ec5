"""An LSTM on top of ZeroShot: where it starts, what it may change, and how each kind is trained."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from meta_training import fit
from torch import nn
from unrolled import assert_windows_are_unrolled, looped

from l2l_lightning import LearnedOptimizer, MetaLearner, ModuleTask, Optimizees, Rollout, pretrained, run_rule
from l2l_lightning.rollout.perturbed import PerturbedRollout
from l2l_lightning.rules import (
    CoordinatewiseLSTM,
    CorrectedDirection,
    CorrectedStepSize,
    Layout,
    ParameterInfo,
    Time,
    ZeroShot,
)
from l2l_lightning.tasks import SmallProblem, SmallProblems

KINDS = {"direction": CorrectedDirection, "step size": CorrectedStepSize}
T = 12


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def corrected(kind, head=0.5, **arguments):
    """On a trained ZeroShot whose weights decay, with a head off zero so that the LSTM has a say."""
    torch.manual_seed(0)
    rule = kind(hidden_size=3, **arguments)
    rule.start_from(pretrained.load("zero-shot"))
    with torch.no_grad():
        rule.head_weight.normal_(0, 0.5)
        rule.head_bias.fill_(head)
        rule.base.decay[0] = -1.0
    return rule.double()


def optimizees(count=3, family="cluster_perceptron", seed=3):
    task = SmallProblem(family, seed)
    return Optimizees(task, None, 0, "train", range(count), dtype=torch.float64)


def test_a_fresh_one_is_the_rule_that_it_stands_on(kind):
    fresh = kind()
    fresh.start_from(pretrained.load("zero-shot"))
    ours = run_rule(fresh.double(), optimizees(), T)
    theirs = run_rule(pretrained.load("zero-shot").double(), optimizees(), T)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    neutral = run_rule(kind().double(), optimizees(), T)
    torch.testing.assert_close(neutral, run_rule(ZeroShot().double(), optimizees(), T), rtol=1e-12, atol=0)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize(
    "counted", [{}, {"of_logarithms": True}, {"of_logarithms": True, "held_out": True}], ids=str
)
def test_the_meta_gradient_is_that_of_the_unrolled_graph(kind, orthogonal, counted):
    assert_windows_are_unrolled(
        *(corrected(kind, orthogonal=orthogonal), optimizees(), optimizees()),
        lengths=[4, 3],
        **counted,
        total_steps=20,
    )


def test_logarithms_of_losses_go_through_the_unrolled_graph_too():
    rule = CoordinatewiseLSTM(1, 3, p=4.0).double()
    for second_order in (False, True):
        assert_windows_are_unrolled(
            rule, optimizees(), optimizees(), [3], second_order=second_order, of_logarithms=True
        )


def test_a_loss_of_zero_has_no_part_in_the_meta_gradient_of_logarithms():
    """log 1e-8 stands for log 0."""
    task = ModuleTask(nn.Linear(2, 1), lambda y, _: 0 * y.sum(), sample=_points)
    rollout = Rollout(
        CoordinatewiseLSTM(1, 3), Optimizees(task, None, seed=0, stream="train", indices=range(2))
    )
    window = rollout.window(3, of_logarithms=True)
    window.meta_loss.backward()
    assert window.meta_loss.item() == pytest.approx(4 * math.log(1e-8))
    assert all(not phi.grad.any() for phi in rollout.rule.parameters())


def _points(generator):
    return torch.randn(4, 2, generator=generator), torch.zeros(4)


def updates(rule):
    """One step's update of a matrix and a vector after a few gradients: of the rule, and of its base."""
    layout = Layout((ParameterInfo("weight", (6, 5)), ParameterInfo("bias", (6,))))
    generator = torch.Generator().manual_seed(1)
    statistics = rule.init_statistics(36, torch.float64)
    state = rule.init_state(36, torch.float64)
    theta = torch.zeros(36, dtype=torch.float64)
    for t in range(4):
        grad = torch.randn(36, generator=generator, dtype=torch.float64)
        x = rule.read(grad, statistics, Time(grad.new_tensor(t), 10), layout)
        given, state = rule.step(x, state)
    own = rule.finish(given, x, theta, layout)
    base = rule.base.finish(rule.base.step(x, state[0, 0, :0])[0], x, theta, layout)
    return [torch.split(update, [30, 6]) for update in (own, base)]


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_corrected_direction_is_as_long_in_every_tensor(orthogonal):
    rule = corrected(CorrectedDirection, orthogonal=orthogonal)
    for ours, theirs in zip(*updates(rule), strict=True):
        assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-12)
        assert not torch.allclose(ours, theirs, rtol=0.01)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_corrected_step_size_leaves_the_direction_and_its_bounds(orthogonal):
    for head, bound in ((0.5, 1.0), (1e3, 1.0), (-1e3, 0.25)):
        rule = corrected(CorrectedStepSize, head, orthogonal=orthogonal, bound=bound)
        for ours, theirs in zip(*updates(rule), strict=True):
            ratio = ours / theirs
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)
            assert math.exp(-bound) * (1 - 1e-9) <= ratio[0] <= math.exp(bound) * (1 + 1e-9)
            assert ratio[0] != 1


def test_what_never_had_a_gradient_stays(kind):
    rule = corrected(kind, orthogonal=False).float()
    weight = nn.Parameter(torch.randn(6, 5))
    untouched = nn.Parameter(torch.randn(6))
    optimizer = LearnedOptimizer([weight, untouched], rule, total_steps=T)
    before = untouched.detach().clone(), weight.detach().clone()
    for _ in range(3):
        weight.grad, untouched.grad = torch.randn(6, 5), torch.zeros(6)
        weight.grad[2] = 0
        optimizer.step()
    assert torch.equal(untouched, before[0])
    assert torch.equal(weight[2], before[1][2])
    assert not torch.equal(weight, before[1])


def test_the_population_is_moved_as_the_definition_says(monkeypatch):
    """Tensor by tensor, and from window to window."""
    rule = corrected(CorrectedStepSize)
    phis = {
        name: torch.stack([phi.detach() * (1 + 0.3 * k) for k in range(4)])
        for name, phi in rule.named_parameters()
    }
    found = []
    for _ in range(2):
        rollout = PerturbedRollout(rule, optimizees(4), 20)
        losses = torch.cat([rollout.window(phis, 4), rollout.window(phis, 3)])
        found.append((losses, rollout.optimizees.theta, rollout.parts[0].state))
        monkeypatch.setattr(CorrectedStepSize, "population_step", lambda *arguments: None)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_an_optimizer_moves_as_rollouts_do(kind):
    rule = corrected(kind)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def sample(generator):
        x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        return x, x[:, :3].argmax(-1)

    task = ModuleTask(model, sample=sample)
    twins = [Optimizees(task, None, 0, "test", [0], dtype=torch.float64) for _ in range(2)]
    losses, theta = looped(model, twins[0], rule, T)
    torch.testing.assert_close(run_rule(rule, twins[1], T)[:, 0], losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(twins[1].theta[0], theta, rtol=1e-9, atol=1e-12)


def test_files_keep_the_rule_below(kind, tmp_path):
    rule = corrected(kind).float()
    pretrained.save(rule, tmp_path / "ours.safetensors")
    loaded = pretrained.load(tmp_path / "ours.safetensors")
    assert {name: value.tolist() for name, value in loaded.state_dict().items()} == {
        name: value.tolist() for name, value in rule.state_dict().items()
    }
    assert loaded.config() == rule.config()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (CorrectedDirection, {"loss_weights": "held_out", "unroll": 3}),
        (CorrectedStepSize, {"loss_weights": "held_out", "estimator": "evolution"}),
    ],
)
def test_a_fit_trains_the_lstm_and_nothing_below(kind, options, tmp_path):
    model = MetaLearner(
        SmallProblems(["linear", "regression"]),
        kind(hidden_size=3),
        horizon=6,
        num_tasks=2,
        start_from="zero-shot",
        num_validation_optimizees=2,
        **options,
    )
    before = {name: value.clone() for name, value in model.rule.state_dict().items()}
    fit(model, tmp_path, num_rollouts=4)
    after = model.rule.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"head_weight", "weight_0"} <= changed
    assert not any(name.startswith("base.") for name in changed)
    for name, value in pretrained.load("zero-shot").state_dict().items():
        assert torch.equal(after[f"base.{name}"], value)


def test_a_rule_of_another_shape_is_refused(kind):
    for trained in (kind(hidden_size=5), CoordinatewiseLSTM()):
        with pytest.raises(ValueError, match="is a rule of another shape"):
            kind(hidden_size=3).start_from(trained)


def test_a_history_that_is_computed_in_chunks_is_refused():
    for options in ({"checkpoint_every": 2}, {"history_dtype": "bfloat16"}):
        rollout = Rollout(corrected(CorrectedDirection), optimizees(), total_steps=T, **options)
        with pytest.raises(ValueError, match="checkpoint_every must be None, and history_dtype 'float32'"):
            rollout.window(3)


def test_what_a_learner_counts_of_a_window_that_is_judged_on_held_out_examples():
    """Half of the mean log loss of the minibatches, and the log loss on held-out examples at the end."""
    task = SmallProblem("linear", 3)
    model = MetaLearner(task, corrected(CorrectedDirection).float(), horizon=5, unroll=5, num_tasks=2)
    assert model.weights(5).tolist() == [1.0] * 6
    model.loss_weights = "held_out"
    assert model.weights(5).tolist() == pytest.approx([0.1] * 5 + [1.0])


def test_what_looks_like_a_habit_is_told(kind):
    with pytest.warns(UserWarning, match="lr"):
        LearnedOptimizer(nn.Linear(3, 2).parameters(), corrected(kind).float(), lr=1e-3, total_steps=T)
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(3))], corrected(kind).float(), total_steps=1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="beyond total_steps=1"):
        optimizer.step()


def test_zero_shot_itself_has_no_window_gradient(tmp_path):
    model = MetaLearner(SmallProblem("linear"), ZeroShot(), horizon=6, unroll=3, num_tasks=2)
    with pytest.raises(MisconfigurationException, match=r"--model\.estimator evolution"):
        fit(model, tmp_path, num_rollouts=2)
