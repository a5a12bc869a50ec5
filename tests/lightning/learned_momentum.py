"""A second rule, which has nothing fused: what the contract alone gives a rule is tested on it."""

import torch

from l2l_lightning.rules import UpdateRule


class LearnedMomentum(UpdateRule):
    """u = -η tanh(m), m a running mean of gradients: a rule that has nothing but the contract's `step`."""

    state_shape = (1,)

    def __init__(self):
        super().__init__()
        self.log_rate = torch.nn.Parameter(torch.empty(()))
        self.decay = torch.nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def step(self, grad, state):
        mean = self.decay.sigmoid() * state[0] + grad
        return -self.log_rate.exp() * mean.tanh(), mean[None]

    @torch.no_grad()
    def reset_parameters(self, generator=None):
        self.log_rate.fill_(-2.0)
        self.decay.fill_(0.3)

    def config(self):
        return {}
