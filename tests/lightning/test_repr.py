"""What a notebook shows of the public classes: one line or a few, of what was asked for and what there is."""

import numpy as np
import pytest
import torch
from learned_momentum import LearnedMomentum
from torch import nn

from l2l_lightning import (
    MNISTMLP,
    CoordinatewiseLSTM,
    FunctionTask,
    ImageMLP,
    LearnedOptimizer,
    MetaData,
    Mixture,
    ModuleTask,
    NoisyScaledSquare,
    Optimizees,
    Quadratic,
    UpdateRule,
    load,
)
from l2l_lightning.class_paths import Configurable
from l2l_lightning.rules import Grouped, RNNprop


def bowl(theta):
    return theta.square().sum()


def linear():
    return nn.Linear(3, 1)


class Forgetful(UpdateRule):
    """Keeps none of its arguments."""

    state_shape = (0,)

    def __init__(self, rate):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor([rate]))

    def step(self, inputs, state):
        return -self.phi * inputs, state

    def reset_parameters(self, generator=None):
        pass


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Quadratic, "Quadratic(batch_size=1)"),
        (lambda: Quadratic(dim=3), "Quadratic(dim=3, batch_size=1)"),
        (NoisyScaledSquare, "NoisyScaledSquare()"),
        (MNISTMLP, "MNISTMLP()"),
        (
            lambda: MNISTMLP(hidden_sizes=[5], activation="relu"),
            "MNISTMLP(hidden_sizes=[5], activation='relu')",
        ),
        (lambda: ImageMLP("digits"), "ImageMLP(dataset='digits')"),
        (lambda: FunctionTask(bowl, dim=2), "FunctionTask(f='test_repr.bowl', dim=2)"),
        (
            lambda: ModuleTask(linear, nn.functional.mse_loss),
            "ModuleTask(module='test_repr.linear', loss_fn='torch.nn.functional.mse_loss')",
        ),
        (
            lambda: Mixture([MNISTMLP(), MNISTMLP(hidden_sizes=[5])]),
            "Mixture([MNISTMLP(), MNISTMLP(hidden_sizes=[5])])",
        ),
        (
            lambda: CoordinatewiseLSTM(1, 3),
            "CoordinatewiseLSTM(num_layers=1, hidden_size=3) with 76 numbers in φ",
        ),
        (lambda: load("lstm-mnist"), "CoordinatewiseLSTM() with 5,141 numbers in φ"),
        (LearnedMomentum, "LearnedMomentum() with 2 numbers in φ"),
        (lambda: Forgetful(0.1), "Forgetful(…) with 1 numbers in φ"),
        (MetaData, "MetaData(num_rollouts=100), nothing loaded"),
        (
            lambda: Optimizees(Quadratic(dim=3), None, seed=0, stream="test", indices=range(4)),
            "4 Optimizees of Quadratic(dim=3, batch_size=1), each of 3 coordinates, on cpu",
        ),
    ],
)
def test_an_object_says_what_it_is(make, text):
    assert repr(make()) == text
    assert str(make()) == text


class OfAnArray(Configurable):
    """An array has no one answer to whether it is the default."""

    def __init__(self, scales=None):
        self.scales = scales


def test_an_argument_that_cannot_be_compared_is_no_error():
    assert repr(OfAnArray(np.ones(3))) == "OfAnArray(…)"
    assert repr(OfAnArray()) == "OfAnArray()"


def test_a_grouped_rule_says_its_members():
    rule = Grouped({"conv": RNNprop(1, 2), "": CoordinatewiseLSTM(1, 3)})
    assert repr(rule) == (
        "Grouped({'conv': RNNprop(num_layers=1, hidden_size=2) with 43 numbers in φ, "
        "'': CoordinatewiseLSTM(num_layers=1, hidden_size=3) with 76 numbers in φ})"
    )


def test_data_that_is_loaded_is_counted():
    data = MetaData(train=(torch.randn(600, 3), torch.randn(600, 1)), num_rollouts=10)
    data.load(ModuleTask(linear, nn.functional.mse_loss))
    assert repr(data) == f"MetaData(num_rollouts=10), 400 + 100 + 100 examples: {data.source}"
    assert data.source.startswith("own data: tensors [M, 3], [M, 1]")


def test_an_optimizer_says_how_far_it_is_and_what_is_not_as_usual():
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "rule": "lstm-mnist", "lr": 0.5}]
    optimizer = LearnedOptimizer(groups, total_steps=10)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert repr(optimizer) == (
        "LearnedOptimizer of 8 coordinates in 2 tensors\n"
        "  group 0: rule zero-shot, step 1 of 10\n"
        "  group 1: rule lstm-mnist, step 1 of 10, lr 0.5"
    )
    assert repr(LearnedOptimizer([model.weight])).endswith("  group 0: rule zero-shot-free, step 0")
