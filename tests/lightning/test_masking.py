"""Optimizees that go NaN or infinite: the others train on, with the numbers of a rollout without them."""

import copy
import math

import pytest
import torch
from exactness import assert_identical
from lightning.pytorch.callbacks import Callback
from meta_training import fit
from problems import gradient, make_rule_of

from l2l_lightning import MetaLearner
from l2l_lightning.rollout.optimizees import Optimizees, derive_generator
from l2l_lightning.rollout.rollout import Rollout
from l2l_lightning.rules import CoordinatewiseLSTM
from l2l_lightning.tasks import Task
from l2l_lightning.training.callbacks import CollapseGuard, MetaTrainingError

FAULTS = ("NaN", "infinite loss", "infinite gradient")


class Faulty(Task):
    """A smooth loss in noise; some optimizees fail in one evaluation, the `at`-th, and are well after it."""

    num_coordinates = 4

    def __init__(self, fault, at):
        self.fault, self.at = fault, at

    def init(self, generator):
        return torch.randn(4, generator=generator)

    def instance(self, generator):
        return {"sick": torch.rand((), generator=generator) < 0.4, "evaluations": torch.tensor(0)}

    def batch(self, instance, images, generator):
        fails = instance["sick"] & (instance["evaluations"] == self.at)
        instance["evaluations"] += 1
        return torch.randn(4, generator=generator), fails

    def loss(self, theta, batch):
        noise, fails = batch
        smooth = (theta**2 - noise).square().sum().add(1).log() + (theta * noise).sum().sin()
        if self.fault == "infinite gradient":  # of a finite loss: the root's at zero
            return smooth + torch.where(fails, theta - theta.detach(), 1.0).sqrt().sum()
        if self.fault == "infinite loss":  # with a finite gradient
            return smooth + torch.where(fails, math.inf, 0.0)
        return smooth + (torch.where(fails, math.nan, 0.0) * theta).sum()

    def sick(self, index, seed=0):
        generator = derive_generator(seed, "train", index)
        self.init(generator)
        return bool(self.instance(generator)["sick"])


def some_indices(task, sick, healthy):
    """So many indices of sick optimizees and of healthy ones, in their order."""
    found = {True: [], False: []}
    for index in range(50):
        found[task.sick(index)].append(index)
    return sorted(found[True][:sick] + found[False][:healthy])


def rollout(rule, task, indices, **options):
    return Rollout(rule, Optimizees(task, None, 0, "train", indices, dtype=torch.float64), **options)


HISTORIES = [{}, {"checkpoint_every": 2}, {"checkpoint_every": 9}, {"history_dtype": "bfloat16"}]


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_others_go_on_as_if_the_sick_ones_were_not_there(fault, at):
    """Every fault at every place to both orders, of every history; the rules in turn.

    A window masks before rules see it.
    """
    for number, (second_order, options) in enumerate([(True, {}), *((False, kind) for kind in HISTORIES)]):
        turn = (FAULTS.index(fault) + at // 2 + number) % 3
        assert_the_others_go_on(("LSTM", "momentum", "RNNprop")[turn], second_order, fault, at, options)


def assert_the_others_go_on(name, second_order, fault, at, options):
    rule, task = make_rule_of(name), Faulty(fault, at)
    indices = some_indices(task, sick=2, healthy=3)
    masked = torch.tensor([task.sick(index) for index in indices])
    ours = rollout(rule, task, indices, **options)
    others = rollout(rule, task, [index for index in indices if not task.sick(index)], **options)
    for number, T in enumerate((4, 3, 1)):  # the fourth evaluation is the first window's last
        weights = torch.rand(T + 1, dtype=torch.float64)
        window, expected = (r.window(T, weights, second_order) for r in (ours, others))
        assert torch.equal(window.masked, masked)
        assert not expected.masked.any()
        torch.testing.assert_close(window.meta_loss, 3 / 5 * expected.meta_loss, rtol=1e-12, atol=0)
        d_phi, d_expected = gradient(rule, window), 3 / 5 * gradient(rule, expected)
        assert d_expected.norm() > 0
        assert (d_phi - d_expected).norm() <= 1e-12 * d_expected.norm()
        assert_identical(window.losses[:, ~masked], expected.losses)
        assert_identical(ours.optimizees.theta[~masked], others.optimizees.theta)
        states = ours.parts[0].state.view(*rule.state_shape, len(indices), -1)[..., ~masked, :]
        assert_identical(states.flatten(-2), others.parts[0].state)
        statistics = ours.parts[0].statistics.view(-1, *ours.optimizees.theta.shape)[:, ~masked]
        assert_identical(statistics.flatten(1), others.parts[0].statistics)
        if number > 0:
            assert window.losses[:, masked].isnan().all()
    fresh = rollout(rule, Faulty(fault, 99), indices)
    assert not fresh.window(4).masked.any()


@pytest.mark.parametrize("second_order", [False, True])
def test_an_optimizee_may_fail_after_another(second_order):
    """One is masked from the start, two fail later: windows are divided by all and count the well ones."""
    rule, task = make_rule_of("LSTM"), Faulty("NaN", at=6)
    indices = some_indices(task, sick=2, healthy=2)
    ours = rollout(rule, task, indices)
    well = next(k for k, index in enumerate(indices) if not task.sick(index))
    with torch.no_grad():
        ours.optimizees.theta[well] = math.nan
    counts = [int(ours.window(3, second_order=second_order).masked.sum()) for _ in range(3)]
    assert counts == [1, 3, 3]
    last = next(index for k, index in enumerate(indices) if k != well and not task.sick(index))
    alone = rollout(rule, task, [last])
    for _ in range(3):
        alone.window(3, second_order=second_order)
    d_phi = gradient(rule, ours.window(2, second_order=second_order))
    expected = gradient(rule, alone.window(2, second_order=second_order)) / 4
    torch.testing.assert_close(d_phi, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("second_order", [False, True])
def test_without_any_optimizee_left_the_meta_gradient_is_nan(second_order):
    rule, task = make_rule_of("LSTM"), Faulty("infinite gradient", at=1)
    ours = rollout(rule, task, some_indices(task, sick=2, healthy=0))
    for _ in range(2):
        window = ours.window(2, second_order=second_order)
        assert window.masked.all()
        assert window.meta_loss.isnan()
        assert gradient(rule, window).isnan().all()


def test_a_window_that_nobody_differentiates_masks_as_well():
    rule, task = make_rule_of("LSTM"), Faulty("NaN", at=1)
    indices = some_indices(task, sick=1, healthy=2)
    differentiated, plain = rollout(rule, task, indices), rollout(rule, task, indices)
    window = differentiated.window(3)
    with torch.no_grad():
        ours = plain.window(3)
    assert torch.equal(ours.masked, window.masked)
    assert torch.equal(ours.meta_loss, window.meta_loss.detach())


@pytest.mark.parametrize("options", HISTORIES)
def test_a_rollout_resumes_bit_for_bit_with_those_masked_that_were(options):
    rule, task = make_rule_of("LSTM"), Faulty("infinite loss", at=1)
    indices = some_indices(task, sick=1, healthy=2)
    whole, resumed = (rollout(rule, task, indices, **options) for _ in range(2))
    whole.window(3)
    saved = copy.deepcopy(whole.state_dict())
    expected = whole.window(4)
    resumed.load_state_dict(saved)
    window = resumed.window(4)
    assert window.masked.sum() == 1
    assert resumed.steps_done == 7
    torch.testing.assert_close(window.losses, expected.losses, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(gradient(rule, window), gradient(rule, expected))


class Record(Callback):
    """What is logged at every meta-step."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def meta_train(folder, task, num_tasks, **trainer):
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, preprocessing="identity")
    model = MetaLearner(task, rule, 6, 3, num_tasks, learning_rate=0.01, lr_schedule="constant")
    record, guard = Record(), CollapseGuard()
    fit(model, folder, record, guard, num_rollouts=3, limit_val_batches=0, **trainer)
    return model, record.logged, guard


def test_a_meta_training_goes_on_without_the_sick_and_says_so(tmp_path):
    task = Faulty("NaN", at=2)
    model, logged, guard = meta_train(tmp_path, task, num_tasks=4)
    assert guard.restarts == 0
    rule = CoordinatewiseLSTM(hidden_size=4, preprocessing="identity")
    torch.manual_seed(0)
    rule.reset_parameters()
    adam = torch.optim.Adam(rule.parameters(), lr=0.01)
    steps = iter(logged)
    for first in (0, 4, 8):
        well = [index for index in range(first, first + 4) if not task.sick(index)]
        assert well
        inner = Rollout(rule, Optimizees(task, None, 0, "train", well))
        for _ in range(2):
            adam.zero_grad()
            window, step = inner.window(3), next(steps)
            (window.meta_loss * (len(well) / 4)).backward()
            adam.step()
            assert step["masked"] == 4 - len(well)
            assert step["meta_loss"] == pytest.approx(float(window.meta_loss), rel=1e-5)
    assert {step["masked"] for step in logged} != {0.0}
    for ours, by_hand in zip(model.rule.parameters(), rule.parameters(), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-7)


@pytest.mark.forks
def test_two_processes_with_one_task_each_are_one_with_two(tmp_path):
    """Even where all that a process has is masked, as long as the other one has an optimizee left."""
    task = Faulty("infinite gradient", at=1)
    sick = [task.sick(index) for index in range(6)]
    assert any(a != b for a, b in zip(sick[::2], sick[1::2], strict=True))
    assert not any(a and b for a, b in zip(sick[::2], sick[1::2], strict=True))
    one, *_ = meta_train(tmp_path / "one", task, num_tasks=2)
    two, *_ = meta_train(tmp_path / "two", task, num_tasks=1, strategy="ddp_fork", devices=2)
    for a, b in zip(one.rule.parameters(), two.rule.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_meta_training_whose_optimizees_are_all_masked_restarts(tmp_path):
    class Hopeless(Faulty):
        def instance(self, generator):
            return {"sick": torch.tensor(True), "evaluations": torch.tensor(0)}

    with pytest.raises(MetaTrainingError, match=r"after 3 restarts.*NaN or infinite"):
        meta_train(tmp_path, Hopeless("NaN", at=1), num_tasks=2)
