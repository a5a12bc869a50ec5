"""The decay of weights that fit_decay.py gives a rule, number by number, and what it is chosen by."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import fit_decay

from l2l_lightning import Optimizees, run_rule
from l2l_lightning.rules import ZeroShot
from l2l_lightning.rules.nominal import DECAY_FACTS
from l2l_lightning.tasks import SmallProblem
from l2l_lightning.tasks.small.families import FAMILIES


def log_decay(rule, **facts):
    """The decay's logarithm by the formula; facts are at zero where nothing is said."""
    return sum(a * facts.get(name, 0.0) for a, name in zip(rule.decay.tolist(), DECAY_FACTS, strict=False))


def test_changes_leave_the_decay_at_the_pivot_and_move_it_by_the_facts():
    rule = ZeroShot()
    with torch.no_grad():
        rule.decay.copy_(torch.tensor([-4.0, -0.8]))
    new = fit_decay.with_decay(rule, {"one": 0.5, "log gain": 3.0, "log T": 0.25})
    at = {"one": 1.0, "log SNR": -2.0}
    before = log_decay(rule, **at)
    assert log_decay(new, **at | {"log gain": fit_decay.PIVOT}) == pytest.approx(before + 0.5)
    assert log_decay(new, **at | {"log gain": fit_decay.PIVOT + 2}) == pytest.approx(before + 6.5)
    assert log_decay(new, **at | {"log gain": fit_decay.PIVOT, "log T": 2}) == pytest.approx(before + 1)
    for name, value in rule.state_dict().items():
        assert name == "decay" or torch.equal(value, new.state_dict()[name])


def test_everything_is_run_at_every_horizon_but_the_slow_families_at_the_last():
    found, names = list(fit_decay.problems([3, 7])), {*FAMILIES, *fit_decay.ENDLESS}
    problems = 2 * len(FAMILIES) + len(fit_decay.ENDLESS)
    assert len(found) == len(set(found)) == 3 * problems - 2 * len(fit_decay.SHORT_ONLY)
    assert {name for name, _, horizon in found if horizon == 2000} == names - {*fit_decay.SHORT_ONLY}


def test_candidates_side_by_side_have_the_losses_of_each_alone():
    first, second = ZeroShot(decay_facts=4), fit_decay.with_decay(ZeroShot(), {"log gain": 2.0, "one": 3.0})
    both = fit_decay.scores([first, second], "plateau", 3, 40)
    for rule, found in zip((first, second), both, strict=True):
        ones = Optimizees(SmallProblem("plateau", 3), None, 0, "train", [0])
        run_rule(rule, ones, 40)
        assert found.item() == pytest.approx(ones.held_out_losses(None).log().item(), rel=1e-3)
    assert both[0] != both[1]


def test_families_count_alike_and_no_problem_for_more_than_a_factor_of_e():
    """Losses are made up: by 5 lower in one family, by 0.5 higher in another, by 0.25 lower without end."""

    class Pool:
        def submit(self, run, rules, name, seed, horizon):
            change = {"linear": -5.0, "regression": 0.5}.get(
                name, -0.25 if name in fit_decay.ENDLESS else 0.0
            )
            return SimpleNamespace(result=lambda: torch.tensor([1.0, 1.0 + change]))

    _, gain = fit_decay.gains([ZeroShot(), ZeroShot()], range(2), Pool())
    families = (1 - 0.5) / len(FAMILIES)
    every = (1 - 0.5 + 0.25) / (len(FAMILIES) + 1)
    assert gain == pytest.approx((every, families, 0.25))


def test_what_is_endless_has_new_examples_at_every_step_and_is_judged_without_noise():
    for name, build in fit_decay.ENDLESS.items():
        ones = Optimizees(build(), None, 0, "train", range(1))
        (x, y), (others, _) = (ones.next_batches() for _ in range(2))
        assert not torch.isin(x, others).any()
        held_out = ones.held_out_losses(None)
        theta = ones.theta[0]
        task = build().on_split("validation")
        x, y = task.sample(torch.Generator().manual_seed(0), "validation")
        again = task.sample(torch.Generator().manual_seed(0), "validation")[1]
        assert torch.equal(y, again), name
        assert len(x) == 512
        # Another 512 places of the same function: the losses are near each other.
        assert math.isclose(held_out.item(), task.loss(theta, (x, y)).item(), rel_tol=0.2), name
