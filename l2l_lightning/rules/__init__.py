"""Update rules: what is learned."""

from l2l_lightning.rules.base import UpdateRule
from l2l_lightning.rules.features import Features, NormalisedMoments
from l2l_lightning.rules.lstm import CoordinatewiseLSTM, LSTMRule
from l2l_lightning.rules.rnnprop import RNNprop

__all__ = ["CoordinatewiseLSTM", "Features", "LSTMRule", "NormalisedMoments", "RNNprop", "UpdateRule"]
