import json
import math

import numpy as np
import pytest
import torch
from bowls import Bowl, QuickBowl

from l2l_lightning.comparison.baselines import (
    BASELINES,
    Alternative,
    Baseline,
    Trial,
    TunedBaseline,
    decades,
    preferred_number,
    run_baseline,
)
from l2l_lightning.comparison.tuning import MAX_EXTENSIONS, tune
from l2l_lightning.errors import TaskError
from l2l_lightning.provenance import origin
from l2l_lightning.rollout.optimizees import Optimizees

SGD = BASELINES["sgd"]
MOMENTUM = BASELINES["momentum"]
ADAM = BASELINES["adam"]


def tuned_one(task, horizon, baseline=SGD, num_optimizees=2, **settings):
    settings |= {"num_optimizees": num_optimizees, "baselines": [baseline]}
    return tune(task, None, [horizon], 0, **settings)[horizon][baseline.name]


class Slope(Bowl):
    """f(x) = −x: every learning rate is beaten by a greater one."""

    def loss(self, theta, batch):
        return -theta.sum()


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


@pytest.mark.parametrize(
    ("curvature", "best"),
    [(2.0, 0.5), (0.001, 1000.0), (5000.0, 2e-4)],
    ids=["inside the grid", "above the grid", "below the grid"],
)
def test_finds_the_inverse_of_the_curvature(curvature, best):
    tuned = tuned_one(Bowl((curvature,)), 6)
    assert tuned.learning_rate == best
    assert not tuned.at_edge
    rates = list(tuned.scores)
    assert rates == sorted(rates)
    assert set(SGD.learning_rates) <= set(rates)


def test_extension_is_bounded():
    tuned = tuned_one(Slope(), 3, num_optimizees=1)
    assert tuned.at_edge
    assert len(tuned.scores) == len(SGD.grid) + MAX_EXTENSIONS
    assert tuned.learning_rate == 1e6


def test_says_when_every_learning_rate_diverges():
    class Broken(Bowl):
        def loss(self, theta, batch):
            return theta.sum() * math.nan

    with pytest.raises(TaskError, match=r"sgd diverged at every learning rate .* θ0"):
        tuned_one(Broken(), 3, num_optimizees=1)


def heavy_ball_loss(curvature, theta0, learning_rate, momentum, horizon):
    """Momentum's final loss on f(x) = Σ curvature/2 x², from powers of its linear map."""
    total = 0.0
    for c, start in zip(curvature, theta0.T, strict=True):
        # (m, x) to (β m + c x, x − η (β m + c x))
        step = np.array([[momentum, c], [-learning_rate * momentum, 1 - learning_rate * c]])
        reached = np.linalg.matrix_power(step, horizon - 10)
        for _ in range(10):
            total += (c / 2 * (reached[1, 1] * start) ** 2).mean() / 10
            reached = step @ reached
    return total


@pytest.mark.parametrize(
    ("condition", "horizon", "momentum"), [(30, 150, 0.8), (1000, 150, 0.9), (6000, 300, 0.95)]
)
def test_chooses_the_momentum_that_the_theory_wants(condition, horizon, momentum):
    """The brute force runs no optimizer: all momenta at all rates, from the iterates' closed form.

    Asymptotically the best momentum is ((√κ − 1) / (√κ + 1))².
    """
    task = QuickBowl((1.0, float(condition)))
    theta0 = Optimizees(task, None, 0, "tuning", range(2), dtype=torch.float64).theta.numpy()
    momenta = [setting.get("momentum", 0.9) for setting in MOMENTUM.settings]
    rates = [preferred_number(position) for position in range(-20, 4)]
    with np.errstate(over="ignore", invalid="ignore"):
        losses = {
            (b, rate): heavy_ball_loss(task.curvature, theta0, rate, b, horizon)
            for b in momenta
            for rate in rates
        }
    best = min((key for key in losses if math.isfinite(losses[key])), key=losses.get)
    tuned = tuned_one(task, horizon, MOMENTUM, dtype=torch.float64)
    assert (tuned.setting.get("momentum", 0.9), tuned.learning_rate) == best
    assert min(tuned.scores.values()) == pytest.approx(losses[best], rel=1e-4)
    theory = ((condition**0.5 - 1) / (condition**0.5 + 1)) ** 2
    assert momentum == best[0] == min(momenta, key=lambda b: abs(b - theory))


def test_the_default_setting_wins_a_draw():
    same = Baseline(
        "same", lambda p, lr, factor=1.0: torch.optim.SGD(p, lr), SGD.grid, (Alternative({"factor": 2.0}),)
    )
    tuned = tuned_one(Bowl((2.0,)), 4, same)
    assert tuned.setting == {}
    assert len({trial.final_loss for trial in tuned.trials if trial.learning_rate == 0.5}) == 1


@pytest.mark.parametrize(
    "task", [QuickBowl((1.0, 500.0), noise=0.2), QuickBowl((1e4,))], ids=["noisy", "steep"]
)
def test_several_horizons_are_several_searches(task):
    """The steep one diverges at most rates, at some after the shorter horizons' ends."""
    runs = []
    settings = {"num_optimizees": 2, "baselines": [SGD, MOMENTUM, ADAM]}
    several = tune(task, None, [15, 3, 40], 0, progress=lambda *run: runs.append(run), **settings)
    assert list(several) == [15, 3, 40]
    alone = {horizon: tune(task, None, [horizon], 0, **settings)[horizon] for horizon in several}
    assert several == alone
    tried = {
        (name, *trial.setting.items(), trial.learning_rate)
        for tuned in alone.values()
        for name, baseline in tuned.items()
        for trial in baseline.trials
    }
    assert len(runs) == len(tried)
    assert "momentum (momentum 0.95)" in {label for label, _, _ in runs}


def test_refuses_a_horizon_of_no_steps():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tune(Bowl(), None, [5, 0], 0)


TRIAL = {"setting": {"momentum": 0.95}, "learning_rate": 0.05, "final_loss": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[(key, f"no tuned baseline: .*{key}") for key in ("baseline", "learning_rate", "setting", "scores")],
        ({"baseline": "lbfgs"}, "unknown baseline 'lbfgs': choose from sgd, momentum"),
        ({"baseline": ["sgd"]}, "unknown baseline"),
        ({"comment": "mine"}, "keys or numbers that a tuned baseline has not"),
        ({"setting": {"beta": 0.5}}, "no tuned baseline: .*beta"),
        ({"setting": {"momentum": -1.0}}, "Invalid momentum value"),
        ({"setting": {"momentum": "0.9"}}, "no tuned baseline"),
        ({"setting": {"momentum": math.nan}}, "cannot run at 0.05, {'momentum': nan}"),
        ({"setting": None}, "no tuned baseline"),
        ({"setting": {}}, "not among its scores"),
        ({"learning_rate": 0.0}, "momentum cannot run at 0.0"),
        ({"learning_rate": math.nan}, "momentum cannot run at nan"),
        ({"learning_rate": None}, "no tuned baseline"),
        ({"learning_rate": 0.1}, "not among its scores"),
        ({"scores": None}, "no tuned baseline"),
        ({"scores": [{"learning_rate": 0.05, "final_loss": 1.0}]}, "no tuned baseline: .*setting"),
        ({"scores": [TRIAL | {"final_loss": math.nan}]}, "keys or numbers"),
        (
            {"scores": [TRIAL, TRIAL | {"learning_rate": 0.1, "final_loss": 0.5}]},
            "not the best of its scores",
        ),
    ],
)
def test_json_is_read_strictly(change, message):
    tuned = TunedBaseline(MOMENTUM, 0.05, {"momentum": 0.95}, (Trial(**TRIAL),))
    content = tuned.as_json()
    if isinstance(change, str):
        del content[change]
    else:
        content |= change
    with pytest.raises(ValueError, match=message):
        TunedBaseline.from_json(content)


class Search:
    """tune() with small settings, to be changed one at a time, and a count of the rates that it scored."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, task=None, horizon=4, seed=0, **changes):
        settings = {"num_optimizees": 2, "baselines": [SGD], "cache_dir": self.folder} | changes
        self.task, scored = task or Bowl((2.0,)), []
        tuned = tune(self.task, None, [horizon], seed, progress=lambda *run: scored.append(run), **settings)
        self.scored = len(scored)
        return next(iter(tuned[horizon].values()))


@pytest.fixture
def search(tmp_path):
    return Search(tmp_path / "tuning")


def test_a_kept_search_is_not_repeated(search):
    arguments = {"task": QuickBowl((1.0, 6000.0)), "horizon": 300, "baselines": [MOMENTUM]}
    first = search(**arguments)
    assert search.scored == len(first.trials)
    assert first.setting == {"momentum": 0.95}
    assert search(**arguments) == first
    assert search.scored == 0


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
        {"baselines": [Baseline("sgd", SGD.make, SGD.grid, (Alternative({}, positions=9),))]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_setting_is_searched_anew(search, changes):
    search()
    search(**changes)
    assert search.scored > 0
    assert len(list(search.folder.iterdir())) == 2


def test_only_the_horizons_that_are_not_kept_are_run(search):
    known = search(horizon=8)
    several = tune(search.task, None, [4, 8], 0, num_optimizees=2, baselines=[SGD], cache_dir=search.folder)
    assert several[8]["sgd"] == known
    assert several[4]["sgd"] == search(horizon=4)
    assert search.scored == 0
    assert len(list(search.folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{}", "null", "without settings"])
def test_a_file_that_cannot_be_read_is_warned_of_and_replaced(search, damage):
    first = search()
    (path,) = search.folder.iterdir()
    if damage == "without settings":  # an earlier version's format
        kept = json.loads(path.read_text())
        del kept["setting"], kept["scores"][0]["setting"]
        damage = json.dumps(kept)
    path.write_text(damage)
    with pytest.warns(UserWarning, match="Tuning sgd again"):
        assert search() == first
    assert search.scored > 0
    assert search() == first
    assert search.scored == 0
    assert search.task.evaluations == 1  # the loss at θ0, to know the task by


def test_a_task_whose_code_changed_is_searched_anew(search, monkeypatch):
    first = search()
    monkeypatch.setattr(Bowl, "loss", lambda self, theta, batch: (theta**4).sum())
    with pytest.warns(UserWarning, match="at θ0 was"):
        assert search() != first
    assert len(list(search.folder.iterdir())) == 1


def test_the_file_says_where_the_numbers_come_from(search):
    def forbid(constant):
        raise AssertionError(f"{constant} is not JSON")

    tuned = search(Bowl((1e4,)), horizon=60)
    (path,) = search.folder.glob("bowl-sgd-*")
    kept = json.loads(path.read_text(), parse_constant=forbid)
    assert kept["origin"].keys() == {"task", *origin("cpu")}
    assert kept["origin"]["task"] == "Bowl(curvature=[10000.0], noise=0.0)"
    assert kept["search"]["horizon"] == 60
    assert kept["learning_rate"] == tuned.learning_rate == 1e-4
    assert kept["scores"][-1] == {"setting": {}, "learning_rate": 100.0, "final_loss": None}
    assert len(kept["scores"]) == len(tuned.trials)
