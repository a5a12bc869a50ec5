"""Modules of every kind that a user may bring, and the loop that a user would write for them."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

from l2l_lightning.rollout.optimizees import derive_generator
from l2l_lightning.tasks.random_streams import seeded

CPU = torch.device("cpu")


class Recurrent(nn.Module):
    """The last output of a recurrent network, through a linear layer."""

    def __init__(self, network, width=4):
        super().__init__()
        self.network, self.head = network, nn.Linear(width, 1)

    def forward(self, x, lengths=None):
        if lengths is None:
            return self.head(self.network(x)[0][:, -1])
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.network(packed)[1][0][-1])


class LooksAtItsOutput(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum().item() > 0 else 2 * y


class Counts(nn.Linear):
    """Buffers that are put in another's place, and updated in place; one of them is in no state dict."""

    def __init__(self):
        super().__init__(3, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return super().forward(x - self.mean) * self.calls


class Teacher(nn.Module):
    """A frozen copy of the first weights, which follows the others at every call."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(3, 1), nn.Linear(3, 1)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ours.mul_(0.9).add_(0.1 * theirs)
        return self.student(x) + 0.5 * self.teacher(x)


class Autoencoder(nn.Module):
    """A VAE: what it decodes is drawn, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 4), nn.Linear(2, 3)

    def forward(self, x):
        mean, log_std = self.encode(x).chunk(2, -1)
        code = mean + log_std.exp() * torch.randn_like(mean)
        return self.decode(code), mean, log_std


def elbo(output, x):
    decoded, mean, log_std = output
    return (decoded - x).square().mean() + (mean.square() + (2 * log_std).exp() - 2 * log_std).mean()


class Flips(nn.Linear):
    """Draws from Python's and NumPy's streams."""

    def forward(self, x):
        return super().forward(x) * random.random() + np.random.rand()  # noqa: NPY002


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


def frozen_first():
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    network[0].requires_grad_(False)
    return network


class Features(nn.Linear):
    """Random features, which every build draws and nothing changes."""

    def __init__(self):
        super().__init__(6, 1)
        self.register_buffer("directions", torch.randn(3, 6))

    def forward(self, x):
        return super().forward((x @ self.directions).cos())


class Named(nn.Module):
    """Two inputs and an option."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 1), nn.Linear(2, 1)

    def forward(self, x, y, *, scale=None):
        z = self.first(x) * self.second(y)
        return z if scale is None else scale[:, None] * z


def normalised(norm):
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 1))


def spectral(norm):
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1))


def vectors(generator):
    x = torch.randn(6, 3, generator=generator)
    return x, x.sum(-1, keepdim=True).sin()


def themselves(generator):
    return (torch.randn(6, 3, generator=generator),) * 2


def sequences(generator):
    x = torch.randn(4, 5, 3, generator=generator)
    return x, x.sum((1, 2))[:, None].sin()


def of_any_length(generator):
    length = int(torch.randint(1, 7, (), generator=generator))
    x = torch.randn(4, length, 3, generator=generator)
    return x, x.sum((1, 2))[:, None].sin()


def padded(generator):
    lengths = torch.randint(1, 6, (4,), generator=generator)
    x = torch.randn(4, 5, 3, generator=generator)
    return (x, lengths), x[:, 0].sum(-1, keepdim=True)


def of_any_size(generator):
    size = int(torch.randint(2, 5, (), generator=generator))
    x = torch.randn(size, 3, generator=generator)
    return x, x.sum(-1, keepdim=True).sin()


def pairs(generator):
    x, y = torch.randn(6, 3, generator=generator), torch.randn(6, 2, generator=generator)
    return (x, y), (x.sum(-1) * y.sum(-1))[:, None]


def named(generator):
    (x, y), z = pairs(generator)
    return {"scale": torch.rand(6, generator=generator), "y": y, "x": x}, z


def hand_written(build, sample, loss_fn, random, index, windows, make_optimizer, stream="train", extra=False):
    """One optimizee as torch's users train it: θ0 and minibatches of (seed 0, stream, index).

    Args:
        windows: Steps of each window, each of which ends with another evaluation if `extra`.

    Returns:
        The network, all losses, and the generator, from which what comes next is drawn.
    """
    generator = derive_generator(0, stream, index)
    with seeded(draw_seed(generator), CPU):
        network = build().double()
    optimizer = make_optimizer([p for p in network.parameters() if p.requires_grad])
    losses = []
    for steps in windows:
        for _ in range(steps):
            loss = evaluated(network, sample, loss_fn, random, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if extra:
            before = {name: value.clone() for name, value in constants(network).items()}
            losses.append(evaluated(network, sample, loss_fn, random, generator).detach())
            for name, value in constants(network).items():
                value.copy_(before[name])
    return network, torch.stack(losses), generator


def draw_seed(generator):
    return int(torch.randint(2**62, (), generator=generator))


def evaluated(network, sample, loss_fn, random, generator):
    inputs, targets = sample(generator)
    seed = draw_seed(generator) if random else 0
    inputs = inputs if isinstance(inputs, tuple | dict) else (inputs,)
    with seeded(seed, CPU):
        if isinstance(inputs, dict):
            output = network(**{name: value.double() for name, value in inputs.items()})
        else:
            output = network(*(value.double() if value.is_floating_point() else value for value in inputs))
        return loss_fn(output, targets.double())


def constants(network):
    """Frozen parameters and buffers by name."""
    frozen = {name: p.data for name, p in network.named_parameters() if not p.requires_grad}
    return frozen | dict(network.named_buffers())


# Builder, sample, loss, whether its losses draw random numbers, what is its optimizees' own.
MODULES = {
    "BatchNorm": (
        lambda: normalised(nn.BatchNorm1d(4)),
        vectors,
        F.mse_loss,
        False,
        {"1.running_mean", "1.running_var", "1.num_batches_tracked"},
    ),
    "BatchNorm of cumulative means": (
        lambda: normalised(nn.BatchNorm1d(4, momentum=None)),
        vectors,
        F.mse_loss,
        False,
        {"1.running_mean", "1.running_var", "1.num_batches_tracked"},
    ),
    "spectral norm": (
        lambda: spectral(parametrizations.spectral_norm),
        vectors,
        F.mse_loss,
        False,
        {"0.parametrizations.weight.0._u", "0.parametrizations.weight.0._v"},
    ),
    "spectral norm by hooks": (
        lambda: spectral(nn.utils.spectral_norm),
        vectors,
        F.mse_loss,
        False,
        {"0.weight_u", "0.weight_v"},
    ),
    "weight norm": (lambda: spectral(parametrizations.weight_norm), vectors, F.mse_loss, False, set()),
    "buffers of all kinds": (Counts, vectors, F.mse_loss, False, {"calls", "mean"}),
    "a teacher": (Teacher, vectors, F.mse_loss, False, {"teacher.weight", "teacher.bias"}),
    "LSTM": (lambda: Recurrent(nn.LSTM(3, 4, batch_first=True)), sequences, F.mse_loss, False, set()),
    "item": (lambda: LooksAtItsOutput(3, 1), vectors, F.mse_loss, False, set()),
    "any length": (
        lambda: Recurrent(nn.RNN(3, 4, batch_first=True)),
        of_any_length,
        F.mse_loss,
        False,
        set(),
    ),
    "packed": (lambda: Recurrent(nn.LSTM(3, 4, batch_first=True)), padded, F.mse_loss, False, set()),
    "any size": (
        lambda: normalised(nn.BatchNorm1d(4)),
        of_any_size,
        F.mse_loss,
        False,
        {"1.running_mean", "1.running_var", "1.num_batches_tracked"},
    ),
    "positional": (Named, pairs, F.mse_loss, False, set()),
    "keywords": (Named, named, F.mse_loss, False, set()),
    "dropout": (lambda: normalised(nn.Dropout(0.3)), vectors, F.mse_loss, True, set()),
    "dropout of any size": (lambda: normalised(nn.Dropout(0.3)), of_any_size, F.mse_loss, True, set()),
    "dropout and BatchNorm": (
        lambda: normalised(nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Dropout(0.3))),
        vectors,
        F.mse_loss,
        True,
        {"1.0.running_mean", "1.0.running_var", "1.0.num_batches_tracked"},
    ),
    "dropout in a GRU": (
        lambda: Recurrent(nn.GRU(3, 2, num_layers=2, dropout=0.5, batch_first=True, bidirectional=True)),
        sequences,
        F.mse_loss,
        True,
        set(),
    ),
    "VAE": (Autoencoder, themselves, elbo, True, set()),
    "other streams": (lambda: Flips(3, 1), vectors, F.mse_loss, True, set()),
    "tied": (Tied, vectors, F.mse_loss, False, set()),
    "frozen": (frozen_first, vectors, F.mse_loss, False, {"0.weight", "0.bias"}),
    "random features": (Features, vectors, F.mse_loss, False, {"directions"}),
}
