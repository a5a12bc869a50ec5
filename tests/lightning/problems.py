"""What tasks and rollouts of tests are made of: functions, modules, samples, a task of one's own, rules."""

import torch
from learned_momentum import LearnedMomentum
from torch import nn

from l2l_lightning.rules import CoordinatewiseLSTM, RNNprop
from l2l_lightning.tasks import Task


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Rosenbrock(Task):
    """A task of one's own: not quadratic, with constants of its own and noise in every evaluation."""

    num_coordinates = 4

    def init(self, generator):
        return torch.randn(4, generator=generator)

    def instance(self, generator):
        return torch.rand(4, generator=generator)

    def batch(self, instance, images, generator):
        return instance, torch.randn(4, generator=generator)

    def loss(self, theta, batch):
        scale, noise = batch
        valley = (theta[1:] - theta[:-1] ** 2).square().sum() + (1 - theta[:-1]).square().sum()
        return valley + (scale * theta * noise).sum().sin()


def quartic(theta):
    return (theta[0] * theta[1] - 1) ** 2 + (theta**4).sum()


def halves(generator):
    return torch.full((3,), 0.5)


def regression(generator):
    x = torch.randn(6, 3, generator=generator)
    return x, x.sum(-1, keepdim=True)


class TinyNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))


class ConvNet(nn.Sequential):
    def __init__(self):
        norm = nn.BatchNorm2d(2, track_running_stats=False)
        super().__init__(
            nn.Conv2d(1, 2, 5, stride=4), norm, nn.Softplus(), nn.Flatten(), nn.Linear(2 * 6 * 6, 10)
        )


class Recurrent(nn.Module):
    """What torch.func.vmap cannot run."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 2, batch_first=True)

    def forward(self, x):
        return self.lstm(x[..., None])[0][:, -1, :1]


RULES = {
    "LSTM": lambda: CoordinatewiseLSTM(hidden_size=5, p=4.0),
    "three layers": lambda: CoordinatewiseLSTM(num_layers=3, hidden_size=3, p=4.0, gradient_scale=10.0),
    "momentum": LearnedMomentum,
    "RNNprop": lambda: RNNprop(num_layers=1, hidden_size=3, beta=0.5),
}


def make_rule_of(name, dtype=torch.float64):
    torch.manual_seed(0)
    return RULES[name]().to(dtype)


def gradient(rule, window):
    """The window's meta-gradient, flat."""
    return torch.cat([d.reshape(-1) for d in torch.autograd.grad(window.meta_loss, list(rule.parameters()))])
