"""A regression that the loops of this folder train: a network, and 40 minibatches in a fixed order."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS, BATCH = 40, 16


def make_network():
    """Returns a network of 161 parameters, of the same weights whenever it is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def make_data():
    """Returns inputs [640, 8] and labels [640, 1]: one epoch is STEPS minibatches."""
    inputs = torch.randn(STEPS * BATCH, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :4].sin().sum(1, keepdim=True))


def make_loader():
    """Returns the minibatches, in the same order every time."""
    return DataLoader(make_data(), batch_size=BATCH)


mse = nn.functional.mse_loss
