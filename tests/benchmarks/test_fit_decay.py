"""The decay of weights that fit_decay.py gives a rule, number by number, and what it is chosen by."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import fit_decay

from l2l_lightning.rules import ZeroShot
from l2l_lightning.rules.nominal import DECAY_FACTS
from l2l_lightning.tasks.small.families import FAMILIES


def log_decay(rule, **facts):
    """The decay's logarithm by the formula; facts are at zero where nothing is said."""
    return sum(a * facts.get(name, 0.0) for a, name in zip(rule.decay.tolist(), DECAY_FACTS, strict=False))


def test_changes_leave_the_typical_decay_and_move_it_by_the_facts():
    rule = ZeroShot()
    with torch.no_grad():
        rule.decay.copy_(torch.tensor([-4.0, -0.8]))
    new = fit_decay.with_decay(rule, {"one": 0.5, "log T": 0.25, "log slow SNR": -1.5})
    at = {"one": 1.0, "log SNR": -2.0}
    before = log_decay(rule, **at)
    typical = {**at, "log slow SNR": fit_decay.TYPICAL}
    assert log_decay(new, **typical) == pytest.approx(before + 0.5)
    assert log_decay(new, **typical | {"log T": 2.0}) == pytest.approx(before + 0.5 + 0.5)
    assert log_decay(new, **typical | {"log slow SNR": -1.0}) == pytest.approx(before + 0.5 - 3.0)
    for name, value in rule.state_dict().items():
        assert name == "decay" or torch.equal(value, new.state_dict()[name])


def test_every_family_is_run_at_every_horizon_but_the_slow_ones_at_the_last():
    found = list(fit_decay.problems())
    assert len(found) == len(set(found)) == 3 * len(FAMILIES) + len(FAMILIES) - len(fit_decay.SHORT_ONLY)
    assert {family for family, horizon in found if horizon == 3000} == {*FAMILIES} - {*fit_decay.SHORT_ONLY}
