"""Update rules: what is learned."""

from l2l_lightning.rules.base import Rule, UpdateRule
from l2l_lightning.rules.features import Features, NormalisedMoments
from l2l_lightning.rules.grouped import Grouped
from l2l_lightning.rules.layout import Layout, ParameterInfo, Time
from l2l_lightning.rules.lstm import CoordinatewiseLSTM, LSTMRule
from l2l_lightning.rules.rnnprop import RNNprop

__all__ = [
    "CoordinatewiseLSTM",
    "Features",
    "Grouped",
    "LSTMRule",
    "Layout",
    "NormalisedMoments",
    "ParameterInfo",
    "RNNprop",
    "Rule",
    "Time",
    "UpdateRule",
]
