"""A rule for each kind of tensor: in rollouts, in LearnedOptimizer, in files."""

import copy
import pickle

import pytest
import torch
from meta_training import fit
from mixed_features import TensorwiseMomentum
from torch import nn
from unrolled import assert_same_carried, assert_windows_are_unrolled, looped

from l2l_lightning import (
    CoordinatewiseLSTM,
    LearnedOptimizer,
    MetaLearner,
    ModuleTask,
    Optimizees,
    Rollout,
    run_rule,
)
from l2l_lightning.errors import GroupError
from l2l_lightning.rules import Grouped, RNNprop
from l2l_lightning.tasks import Mixture, Quadratic


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.fc = nn.Linear(2 * 2 * 2, 3)

    def forward(self, x):
        return self.fc(self.conv(x).tanh().flatten(1))


def sample(generator):
    x = torch.randn(5, 1, 4, 4, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long()


def by_size(tensor):
    return "large" if tensor.numel > 10 else "small"


def lstm(**arguments):
    return CoordinatewiseLSTM(1, 4, **arguments)


RULES = {
    "name": lambda: Grouped({"conv": lstm(), "fc": RNNprop(1, 3)}),
    "first key": lambda: Grouped({"bias$": TensorwiseMomentum(), "": lstm()}),
    "rank": lambda: Grouped({"1": lstm(p=4.0), "2|4": TensorwiseMomentum()}, by="rank"),
    "function": lambda: Grouped({"small": RNNprop(1, 3), "large": lstm()}, by=by_size),
    "one without tensors": lambda: Grouped({"conv": lstm(), "embedding": lstm(), "fc": RNNprop(1, 3)}),
}


def optimizees(dtype=torch.float64, indices=range(3)):
    return Optimizees(ModuleTask(ConvNet, sample=sample), None, 0, "train", indices, dtype=dtype)


@pytest.fixture(params=RULES)
def rule(request):
    torch.manual_seed(0)
    return RULES[request.param]().double()


@pytest.mark.parametrize(
    "options", [{}, {"checkpoint_every": 2}, {"second_order": True}], ids=["full", "kept", "second order"]
)
def test_the_meta_gradient_is_the_unrolled_graphs(rule, options):
    """The oracle moves tensor after tensor; φ's derivatives are those of all members, in their order."""
    ours, theirs = optimizees(), optimizees()
    rollout, carried = assert_windows_are_unrolled(rule, ours, theirs, (3, 2), total_steps=5, **options)
    torch.testing.assert_close(ours.theta, theirs.theta, rtol=1e-12, atol=1e-14)
    assert_same_carried(rollout, carried)


def test_a_sick_optimizee_is_masked_in_every_part(rule):
    ours, others = optimizees(), optimizees(indices=[0, 2])
    ours.theta[1, 0] = torch.nan
    windows = [Rollout(rule, x, total_steps=9).window(3) for x in (ours, others)]
    assert windows[0].masked.tolist() == [False, True, False]
    gradients = [
        torch.autograd.grad(w.meta_loss, list(rule.parameters()), allow_unused=True) for w in windows
    ]
    for all_three, two in zip(*gradients, strict=True):
        torch.testing.assert_close(3 * all_three, 2 * two, rtol=1e-9, atol=1e-14)


def test_in_a_loop_of_ones_own_it_is_the_rollouts(rule):
    """And so is its copy, by pickle where it can be named."""
    rule = pickle.loads(pickle.dumps(rule.float()))
    ran = optimizees(torch.float32, [0])
    losses, theta = looped(ConvNet(), optimizees(torch.float32, [0]), rule, 6)
    torch.testing.assert_close(losses, run_rule(rule, ran, 6)[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theta, ran.theta[0], rtol=1e-5, atol=1e-6)


def test_a_rollout_goes_on_from_its_state_dict(rule):
    whole, resumed = (Rollout(rule, optimizees(), total_steps=9) for _ in range(2))
    whole.window(3)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    expected, found = whole.window(2), resumed.window(2)
    assert torch.equal(found.meta_loss, expected.meta_loss)
    assert torch.equal(resumed.optimizees.theta, whole.optimizees.theta)
    with pytest.raises(ValueError, match="it has the state"):
        Rollout(lstm().double(), optimizees()).load_state_dict(whole.state_dict())


def test_it_is_meta_trained_and_comes_back_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    rule = Grouped({"conv": lstm(), "fc": RNNprop(1, 3)})
    before = copy.deepcopy(rule)
    task = ModuleTask(ConvNet, sample=sample)
    model = MetaLearner(task, rule, horizon=6, unroll=3, num_tasks=2, num_validation_optimizees=2)
    trainer = fit(model, tmp_path)
    for ours, theirs in zip(rule.members, before.members, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "grouped.ckpt")
    again = MetaLearner.from_checkpoint(tmp_path / "grouped.ckpt", trust=["test_grouped"]).rule
    assert again.config() == rule.config()
    for ours, theirs in zip(again.parameters(), rule.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_tensor_without_a_rule_ends_before_a_run(tmp_path):
    """In a mixture, too, whose other tasks have no such tensor."""
    task = Mixture([ModuleTask(ConvNet, sample=sample), Quadratic(3)])
    model = MetaLearner(task, Grouped({"conv": lstm(), "fc": lstm()}), horizon=4, unroll=2)
    with pytest.raises(GroupError, match=r"no rule for the tensor 'theta'.*\(--model\.rule\.rules\)"):
        fit(model, tmp_path)


def test_phi_is_drawn_member_by_member():
    rule = Grouped({"conv": lstm(), "fc": lstm()})
    rule.reset_parameters(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for member in rule.members:
        alone = lstm()
        alone.reset_parameters(generator)
        for ours, theirs in zip(member.parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_it_starts_from_the_same_groups_or_every_group_from_one_rule():
    one, other = lstm(), Grouped({"conv": lstm(), "fc": lstm()})
    rule = Grouped({"conv": lstm(), "fc": lstm()})
    rule.start_from(other)
    pairs = list(zip(rule.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    rule.start_from(one)
    for member in rule.members:
        for ours, theirs in zip(member.parameters(), one.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() != theirs.data_ptr()
    with pytest.raises(ValueError, match="is a rule of another shape"):
        Grouped({"conv": lstm(), "fc": RNNprop(1, 3)}).start_from(one)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Grouped({}), ValueError, "rules must name at least one rule"),
        (lambda: Grouped({"a": nn.Linear(1, 1)}), TypeError, r"rules\['a'\] must be an UpdateRule"),
        (lambda: Grouped({"(": lstm()}), ValueError, r"the key '\(' of rules is no regular expression"),
        (lambda: Grouped({"a": lstm()}, by="size"), ValueError, "by='size' cannot be imported"),
        (lambda: Grouped({"a": lstm()}, by=3), TypeError, "by must be callable"),
        (lambda: Grouped(dict.fromkeys("ab", lstm())), ValueError, "rules must hold every rule once"),
        (lambda: Rollout(Grouped({"conv": lstm()}), optimizees()), ValueError, "no rule for the tensor 'fc"),
        (
            lambda: LearnedOptimizer(ConvNet().parameters(), Grouped({"": lstm()})),
            ValueError,
            r"pass the optimizer model.named_parameters\(\)",
        ),
        (
            lambda: LearnedOptimizer(ConvNet().named_parameters(), Grouped({"conv": lstm()})),
            ValueError,
            "its name is 'fc.weight', the keys of its rules",
        ),
        (
            lambda: LearnedOptimizer(ConvNet().parameters(), TensorwiseMomentum()),
            ValueError,
            "needs total_steps",
        ),
        (
            lambda: LearnedOptimizer(ConvNet().parameters(), lstm(), total_steps=0),
            ValueError,
            "total_steps must be at least 1, got 0",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
