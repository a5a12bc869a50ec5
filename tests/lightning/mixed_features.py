"""A rule of one's own that reads features: what the contract asks of it is all that is here."""

import torch
from l2l_kernels import LSTMSpec

from l2l_lightning.rules import Features, LSTMRule, NormalisedMoments


class LogAndMoments(Features):
    """RNNprop's two inputs, and log|g| / p beside them: a feature that knows the scale."""

    width = 3
    rows = NormalisedMoments.rows

    def __init__(self):
        self.moments = NormalisedMoments(beta=0.9)

    def __call__(self, grad, statistics):
        magnitude = grad.abs().clamp(min=torch.e**-10).log() / 10
        return torch.cat([magnitude[None], self.moments(grad, statistics)])


class MixedLSTM(LSTMRule):
    def __init__(self):
        super().__init__(LSTMSpec(1, 4, "features", width=3), 0.1, 1.0, None, LogAndMoments())
