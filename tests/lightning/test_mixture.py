"""Mixtures: every member its share, nobody else's optimizees, and the same run after an interruption."""

import pytest
import torch
from meta_training import fit, make_rule

from l2l_lightning import (
    MNISTMLP,
    ComparisonSettings,
    CoordinatewiseLSTM,
    MetaData,
    MetaLearner,
    MetaTrainer,
    Mixture,
    Optimizees,
    Quadratic,
    Rollout,
    run_rule,
)
from l2l_lightning.round_robin import turn
from l2l_lightning.tasks import ImageMLP, NoisyScaledSquare


def test_every_stretch_of_turns_has_each_once():
    for count in (1, 2, 3, 7):
        turns = [turn(index, count, "name") for index in range(10 * count)]
        for start in range(0, len(turns), count):
            assert sorted(turns[start : start + count]) == list(range(count))


def test_turns_are_shuffled_anew_and_by_name():
    stretches = [tuple(turn(4 * s + i, 4, "a") for i in range(4)) for s in range(30)]
    assert len(set(stretches)) > 10
    assert [turn(i, 4, "a") for i in range(40)] != [turn(i, 4, "b") for i in range(40)]


def test_a_rollout_is_of_one_member_and_members_share_evenly():
    small, large = Quadratic(dim=2), Quadratic(dim=5)
    mixture = Mixture([small, large])
    members = [mixture.member(index) for index in range(20)]
    assert members.count(small) == members.count(large) == 10
    assert mixture.num_coordinates == 5
    # Listed twice, a member is met twice as often, and is one member still.
    weighted = Mixture([small, large, large])
    assert [weighted.member(index) for index in range(30)].count(large) == 20
    assert weighted.members == [small, large]


def test_meta_training_on_a_mixture_is_adam_on_its_members_rollouts(tmp_path):
    """Against the same loop written out by hand, members of different sizes and horizons in turns."""
    tasks = [Quadratic(dim=2), NoisyScaledSquare(dim=3)]
    mixture = Mixture(tasks)
    model = MetaLearner(
        mixture, make_rule(), horizon=[2, 4], unroll=2, num_tasks=2, learning_rate=0.01,
        lr_schedule="constant", num_validation_optimizees=2, seed=7,
    )  # fmt: skip
    fit(model, tmp_path, num_rollouts=4, limit_val_batches=0)
    rule = make_rule()
    adam = torch.optim.Adam(rule.parameters(), lr=0.01)
    lengths = []
    for index in range(4):
        task = tasks[turn(index, 2, "member")]
        rollout = Rollout(rule, Optimizees(task, None, 7, "train", range(2 * index, 2 * index + 2)))
        lengths.append([2, 4][turn(index, 2, "horizon")])
        for _ in range(lengths[-1] // 2):
            adam.zero_grad()
            rollout.window(2).meta_loss.backward()
            adam.step()
    assert sorted(lengths) == [2, 2, 4, 4]
    for ours, theirs in zip(model.rule.parameters(), rule.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_validation_is_the_mean_over_the_members(tmp_path):
    tasks = [Quadratic(dim=2), NoisyScaledSquare(dim=3)]
    model = MetaLearner(
        Mixture(tasks), make_rule(), horizon=[6, 3], unroll=3, num_validation_optimizees=6, seed=1
    )
    trainer = fit(model, tmp_path, num_rollouts=1)
    sums = [
        run_rule(model.rule, Optimizees(task, None, 1, "validation", range(3)), 6).sum(0).mean()
        for task in tasks
    ]
    assert float(trainer.callback_metrics["val/sum_loss"]) == pytest.approx(float(sum(sums) / 2), rel=1e-5)


def test_what_is_no_mixture_is_refused():
    refused = {
        "at least one task": [],
        "must not hold a mixture": [Mixture([Quadratic()])],
        "share one data set, got digits, mnist": [MNISTMLP(), ImageMLP("digits")],
    }
    for message, tasks in refused.items():
        with pytest.raises(ValueError, match=message):
            Mixture(tasks)
    mixture = Mixture([Quadratic()])
    for refused in (lambda: mixture.init(torch.Generator()), lambda: mixture.loss(torch.zeros(10), ())):
        with pytest.raises(TypeError, match="take a member's"):
            refused()


def test_comparing_on_a_mixture_asks_for_a_member(tmp_path):
    tasks = [Quadratic(dim=2), NoisyScaledSquare(dim=3)]
    model = MetaLearner(Mixture(tasks), CoordinatewiseLSTM(hidden_size=4), horizon=3, unroll=3)
    trainer = MetaTrainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    settings = ComparisonSettings(num_optimizees=2, num_tuning_optimizees=2, baselines=["sgd"])
    with pytest.raises(ValueError, match="one member at a time"):
        trainer.compare(model, MetaData(), settings, out=str(tmp_path))
    result = trainer.compare(model, MetaData(), settings, out=str(tmp_path / "one"), task=tasks[1])
    assert result.task == tasks[1].describe()
