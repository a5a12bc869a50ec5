"""Rules of one's own that read features: what the contract asks of them is all that is here."""

import torch
from l2l_kernels import LSTMSpec

from l2l_lightning.rules import Features, LSTMRule, NormalisedMoments, UpdateRule


class LogAndMoments(Features):
    """RNNprop's two inputs, and log|g| / p beside them: a feature that knows the scale."""

    width = 3
    rows = NormalisedMoments.rows

    def __init__(self):
        self.moments = NormalisedMoments(beta=0.9)

    def __call__(self, grad, statistics, time, layout):
        magnitude = grad.abs().clamp(min=torch.e**-10).log() / 10
        return torch.cat([magnitude[None], self.moments(grad, statistics, time, layout)])


class MixedLSTM(LSTMRule):
    def __init__(self):
        super().__init__(LSTMSpec(1, 4, "features", width=3), 0.1, 1.0, None, LogAndMoments())


class TensorAndTime(Features):
    """g / RMS(g) over its tensor, t / T, and the tensor's rank: all that a layout and a time tell."""

    width = 3
    rows = 1

    def __call__(self, grad, statistics, time, layout):
        if time.total is None:
            raise ValueError("TensorAndTime needs total_steps")
        statistics += layout.mean(grad**2)
        scaled = grad / (statistics[0] + 1e-12).sqrt()
        rank = torch.zeros_like(grad)
        for part, tensor in zip(layout.split(rank), layout.tensors, strict=True):
            part.fill_(tensor.rank)
        return torch.stack([scaled, (time.step / time.total).clamp(max=1).expand_as(grad), rank])


class TensorwiseMomentum(UpdateRule):
    """u = -η(t/T, rank) m, m a running mean of the tensor's normalised gradients."""

    state_shape = (1,)

    def __init__(self):
        super().__init__()
        self.features = TensorAndTime()
        self.head = torch.nn.Parameter(torch.empty(3))
        self.decay = torch.nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def step(self, inputs, state):
        scaled, time, rank = inputs
        mean = self.decay.sigmoid() * state[0] + scaled
        rate = (self.head[0] + self.head[1] * time + self.head[2] * rank).exp()
        return -rate * mean, mean[None]

    @torch.no_grad()
    def reset_parameters(self, generator=None):
        self.head.copy_(torch.tensor([-4.0, -1.0, 0.3]))
        self.decay.fill_(0.3)

    def config(self):
        return {}
