import json
import math

import numpy as np
import pytest
import torch

from l2l_lightning import baselines
from l2l_lightning.baselines import (
    BASELINES,
    Baseline,
    decades,
    final_losses,
    preferred_number,
    run_baseline,
    tune,
)
from l2l_lightning.optimizees import Optimizees
from l2l_lightning.tasks.base import Task

SGD = BASELINES["sgd"]


class Bowl(Task):
    """f(x) = Σ curvature/2 (x − shift)², with a shift of its own at every step if there is noise."""

    def __init__(self, curvature=(1.0,), noise=0.0):
        self.curvature, self.noise = tuple(curvature), noise
        self.num_coordinates = len(self.curvature)
        self.evaluations = 0

    def init(self, generator):
        return 1 + torch.rand(self.num_coordinates, generator=generator)

    def batch(self, instance, images, generator):
        return self.noise * torch.randn(self.num_coordinates, generator=generator)

    def loss(self, theta, batch):
        return (theta.new_tensor(self.curvature) / 2 * (theta - batch) ** 2).sum()

    def losses(self, thetas, batches):
        self.evaluations += 1
        return super().losses(thetas, batches)

    def config(self):
        return {"curvature": list(self.curvature), "noise": self.noise}


class Slope(Bowl):
    """f(x) = −x: every learning rate is beaten by a greater one."""

    def loss(self, theta, batch):
        return -theta.sum()


def hand_written(name, gradient, theta, learning_rate, steps):
    """The textbook's update in float64 NumPy; θ after each of the steps, the start first."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    path = [theta]
    for t in range(1, steps + 1):
        g = gradient(theta)
        if name == "sgd":
            update = g
        elif name == "momentum":
            m = 0.9 * m + g
            update = m
        elif name == "nag":
            m = 0.9 * m + g
            update = g + 0.9 * m
        elif name == "rmsprop":
            v = 0.99 * v + 0.01 * g**2
            update = g / (np.sqrt(v) + 1e-8)
        elif name in ("adam", "adamw"):
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g**2
            update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            if name == "adamw":
                theta = theta - 0.01 * learning_rate * theta
        theta = theta - learning_rate * update
        path.append(theta)
    return np.stack(path)


@pytest.mark.parametrize("name", BASELINES)
def test_follows_the_hand_written_formula(name):
    curvature = np.array([0.5, 2.0, 7.0])
    optimizees = Optimizees(Bowl(curvature), None, 0, "test", range(4), dtype=torch.float64)
    theta0 = optimizees.theta.clone()
    losses = run_baseline(BASELINES[name], 0.05, optimizees, 8)
    path = hand_written(name, lambda theta: curvature * theta, theta0.numpy(), 0.05, 8)
    expected = (curvature / 2 * path**2).sum(-1)
    np.testing.assert_allclose(losses.numpy(), expected[:-1], rtol=1e-12)
    np.testing.assert_allclose(optimizees.theta.numpy(), path[-1], rtol=1e-12)


@pytest.mark.parametrize("name", BASELINES)
def test_side_by_side_is_each_alone(name):
    task = Bowl((0.5, 2.0), noise=1.0)
    together = run_baseline(BASELINES[name], 0.1, Optimizees(task, None, 0, "test", range(3)), 12)
    alone = [run_baseline(BASELINES[name], 0.1, Optimizees(task, None, 0, "test", [i]), 12) for i in range(3)]
    assert torch.equal(together, torch.cat(alone, dim=1))


def test_each_run_starts_with_a_fresh_optimizer_and_leaves_the_caller_theta0():
    task = Bowl((1.0, 3.0))
    optimizees = Optimizees(task, None, 0, "test", range(2))
    theta0 = optimizees.theta
    before = theta0.clone()
    first = run_baseline(BASELINES["adam"], 0.1, optimizees, 5)
    second = run_baseline(BASELINES["adam"], 0.1, Optimizees(task, None, 0, "test", range(2)), 5)
    assert torch.equal(first, second)
    assert torch.equal(theta0, before)


def test_one_minibatch_a_step_so_that_baselines_are_paired():
    states = []
    for baseline in BASELINES.values():
        optimizees = Optimizees(Bowl(noise=1.0), None, 0, "test", range(2))
        run_baseline(baseline, 0.01, optimizees, 7)
        states.append(torch.stack([generator.get_state() for generator in optimizees.generators]))
    assert all(torch.equal(state, states[0]) for state in states)


def test_stops_when_diverged_only_if_told_to():
    task = Bowl((1.0,))
    for stop, evaluations in ((False, 60), (True, 6)):
        task.evaluations = 0
        losses = run_baseline(
            SGD, 1e5, Optimizees(task, None, 0, "test", range(2)), 60, stop_if_diverged=stop
        )
        assert losses.shape == (60, 2)
        assert task.evaluations == pytest.approx(evaluations, abs=2 * stop)
        assert not losses[-1].isfinite().any()


def test_final_loss_is_the_mean_of_the_last_ten():
    losses = torch.arange(30.0).reshape(15, 2)
    assert final_losses(losses).tolist() == [19.0, 20.0]
    assert final_losses(losses[:4]).tolist() == [3.0, 4.0]


def test_grids_are_wide_and_log_spaced():
    assert preferred_number(-4) == 0.05
    for baseline in BASELINES.values():
        rates = np.array(baseline.learning_rates)
        assert len(rates) >= 15
        assert (rates[1:] / rates[:-1]).max() <= 2.5 + 1e-9
        assert rates[-1] / rates[0] == pytest.approx(1e5)


@pytest.mark.parametrize(
    ("curvature", "best"),
    [(2.0, 0.5), (0.05, 20.0), (0.001, 1000.0), (5000.0, 2e-4)],
    ids=["inside the grid", "inside the grid too", "above the grid", "below the grid"],
)
def test_finds_the_inverse_of_the_curvature(curvature, best):
    tuned = tune(Bowl((curvature,)), None, 6, 0, num_optimizees=2, baselines=[SGD])["sgd"]
    assert tuned.learning_rate == best
    assert not tuned.at_edge
    rates = list(tuned.scores)
    assert rates == sorted(rates)
    assert set(SGD.learning_rates) <= set(rates)


def test_extension_is_bounded():
    tuned = tune(Slope(), None, 3, 0, num_optimizees=1, baselines=[SGD])["sgd"]
    assert tuned.at_edge
    assert len(tuned.scores) == len(SGD.grid) + baselines.MAX_EXTENSIONS
    assert tuned.learning_rate == 1e6


def test_one_diverged_optimizee_makes_the_score_infinite():
    scores = tune(Bowl((1e4,)), None, 60, 0, num_optimizees=2, baselines=[SGD])["sgd"].scores
    assert scores[100.0] == math.inf
    assert scores[1e-4] < 1e-6


def test_says_when_every_learning_rate_diverges():
    class Broken(Bowl):
        def loss(self, theta, batch):
            return theta.sum() * math.nan

    with pytest.raises(RuntimeError, match=r"sgd diverged at every learning rate .* θ0"):
        tune(Broken(), None, 3, 0, num_optimizees=1, baselines=[SGD])


class Search:
    """tune() with small settings, to be changed one at a time, and a count of the rates that it scored."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, task=None, horizon=4, seed=0, **changes):
        settings = {"num_optimizees": 2, "baselines": [SGD], "cache_dir": self.folder} | changes
        self.task = task or Bowl((2.0,))
        self.scored = 0
        tuned = tune(self.task, None, horizon, seed, progress=self.count, **settings)
        return next(iter(tuned.values()))

    def count(self, name, learning_rate, score):
        self.scored += 1


@pytest.fixture
def search(tmp_path):
    return Search(tmp_path / "tuning")


def test_a_kept_search_is_not_repeated(search):
    first = search()
    assert search.scored == len(first.scores)
    second = search()
    assert search.scored == 0
    assert search.task.evaluations == 1  # the fingerprint
    assert second == first


@pytest.mark.parametrize(
    "changes",
    [
        {"task": Bowl((3.0,))},
        {"horizon": 5},
        {"seed": 1},
        {"num_optimizees": 3},
        {"dtype": torch.float64},
        {"baselines": [Baseline("sgd", lambda p, lr: torch.optim.SGD(p, lr, dampening=0.5), SGD.grid)]},
        {"baselines": [Baseline("sgd", SGD.make, decades(-4, 2))]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_setting_is_searched_anew(search, changes):
    search()
    search(**changes)
    assert search.scored > 0
    assert len(list(search.folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", '{"settings"', "{}", "[]", "null"])
def test_a_corrupted_file_is_warned_of_and_replaced(search, damage):
    first = search()
    (path,) = search.folder.iterdir()
    path.write_text(damage)
    with pytest.warns(UserWarning, match="Tuning sgd again"):
        assert search() == first
    assert search.scored > 0
    search()
    assert search.scored == 0


def test_a_task_whose_code_changed_is_searched_anew(search):
    class Before(Bowl):
        pass

    class After(Bowl):
        def loss(self, theta, batch):
            return super().loss(theta, batch) ** 2

    After.__qualname__ = Before.__qualname__
    search(Before((2.0,)))
    (path,) = search.folder.iterdir()
    After.__name__ = Before.__name__
    with pytest.warns(UserWarning, match="at θ0 was"):
        search(After((2.0,)))
    assert list(search.folder.iterdir()) == [path]


def test_the_file_says_where_the_numbers_come_from(search):
    tuned = search(Bowl((1e4,)), horizon=60)
    (path,) = search.folder.iterdir()
    assert path.name.startswith("bowl-sgd-")

    def forbid(constant):
        raise AssertionError(f"{constant} is not JSON")

    kept = json.loads(path.read_text(), parse_constant=forbid)
    assert kept["origin"]["task"] == "Bowl(curvature=[10000.0], noise=0.0)"
    assert set(kept["origin"]) == {"task", "commit", "versions", "device", "date"}
    assert "torch" in kept["origin"]["versions"]
    assert kept["settings"]["horizon"] == 60
    assert kept["settings"]["data_source"] is None
    assert kept["learning_rate"] == tuned.learning_rate == 1e-4
    assert kept["scores"][-1] == {"learning_rate": 100.0, "final_loss": None}
    assert len(kept["scores"]) == len(tuned.scores)
