"""A second rule, which has nothing fused: what the contract alone gives a rule is tested on it."""

import torch

from l2l_lightning.rules import UpdateRule


class LearnedMomentum(UpdateRule):
    """u = -η tanh(m), m a running mean of gradients: a rule that has nothing but the contract's `step`."""

    state_shape = (1,)

    def __init__(self):
        super().__init__()
        self.log_rate = torch.nn.Parameter(torch.tensor(-2.0))
        self.decay = torch.nn.Parameter(torch.tensor(0.3))

    def step(self, grad, state):
        mean = self.decay.sigmoid() * state[0] + grad
        return -self.log_rate.exp() * mean.tanh(), mean[None]

    def reset_parameters(self, generator=None):
        raise NotImplementedError

    def config(self):
        return {}
