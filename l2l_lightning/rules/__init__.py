"""Update rules: what is learned."""

from l2l_lightning.rules.base import Rule, UpdateRule
from l2l_lightning.rules.corrected import CorrectedDirection, CorrectedStepSize
from l2l_lightning.rules.features import Features, NormalisedMoments
from l2l_lightning.rules.grouped import Grouped
from l2l_lightning.rules.layout import Layout, ParameterInfo, Time
from l2l_lightning.rules.lstm import CoordinatewiseLSTM, LSTMRule
from l2l_lightning.rules.nominal import NominalFeatures
from l2l_lightning.rules.rnnprop import RNNprop
from l2l_lightning.rules.zero_shot import ZeroShot

__all__ = [
    "CoordinatewiseLSTM",
    "CorrectedDirection",
    "CorrectedStepSize",
    "Features",
    "Grouped",
    "LSTMRule",
    "Layout",
    "NominalFeatures",
    "NormalisedMoments",
    "ParameterInfo",
    "RNNprop",
    "Rule",
    "Time",
    "UpdateRule",
    "ZeroShot",
]
