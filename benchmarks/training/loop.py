"""A training loop, what it is given, and what is kept of a run: the same for every network and optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from l2l_lightning import LearnedOptimizer
from l2l_lightning.reproduce.zero_shot.peers import constant, cosine

ADAMW, ADAMW_COSINE = "adamw", "adamw-cosine"
EVALUATIONS = 10
"""How often the held-out data is looked at in a run, beside the time before the first step."""
EVALUATION_BATCH_SIZE = 256


class Problem(NamedTuple):
    """A network to train, and (input, label) pairs."""

    description: str
    source: str
    """Where the data comes from, for the record."""
    make_network: Callable[[], nn.Module]
    """Makes a network of logits [B, C] for labels [B], or [B, C, T] for [B, T]; draws from torch's stream."""
    train: TensorDataset
    validation: TensorDataset
    """The pairs that settings are chosen on."""
    test: TensorDataset
    """The pairs that are reported."""


class Setting(NamedTuple):
    """An optimizer, ADAMW, ADAMW_COSINE or what LearnedOptimizer takes as `rule`, and its hyperparameters."""

    optimizer: str
    lr: float
    weight_decay: float

    def make(self, network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Makes the optimizer of a network's parameters for so many steps, and the schedule of its rate."""
        hyperparameters = {"lr": self.lr, "weight_decay": self.weight_decay}
        schedule = cosine if self.optimizer == ADAMW_COSINE else constant
        if self.optimizer in (ADAMW, ADAMW_COSINE):
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(network.parameters(), **hyperparameters)
        else:
            parameters = network.named_parameters()
            optimizer = LearnedOptimizer(parameters, self.optimizer, total_steps=steps, **hyperparameters)
        return optimizer, LambdaLR(optimizer, lambda step: schedule(step, steps))


@dataclass
class Run:
    """What an optimizer did to one network."""

    losses: list[float] = field(default_factory=list)
    """The loss of every minibatch, before the update that it led to."""
    held_out: list[tuple[int, float, float]] = field(default_factory=list)
    """(updates made, loss, accuracy) on held-out data, before the first step and EVALUATIONS times since."""
    step_seconds: list[float] = field(default_factory=list)
    """Wall-clock of every step's forward, backward and update."""
    cpu_seconds: list[float] = field(default_factory=list)
    """The same in time that this process computed, in all its threads: other work does not lengthen it."""
    state_bytes: int = 0


def draw_network(make_network: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """Makes a network whose weights come from this generator; the global one is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return make_network()


def train(
    network: nn.Module,
    setting: Setting,
    data: TensorDataset,
    held_out: TensorDataset,
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
) -> Run:
    """Trains a network in place by cross-entropy, for a multiple of EVALUATIONS steps.

    Minibatches of batch_size pairs are drawn with replacement and depend on the generator (on the CPU) alone,
    so that they are alike for every optimizer.
    """
    device = next(network.parameters()).device
    optimizer, schedule = setting.make(network, steps)
    run = Run(held_out=[(0, *evaluate(network, held_out))])
    for step in range(1, steps + 1):
        indices = torch.randint(len(data), (batch_size,), generator=generator)
        inputs, labels = (values.to(device) for values in data[indices])
        start, cpu_start = _now(device), time.process_time()
        loss = F.cross_entropy(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.step_seconds.append(_now(device) - start)
        run.cpu_seconds.append(time.process_time() - cpu_start)
        run.losses.append(loss.item())
        if step % (steps // EVALUATIONS) == 0:
            run.held_out.append((step, *evaluate(network, held_out)))
    states = (value for entries in optimizer.state.values() for value in entries.values())
    run.state_bytes = sum(value.nbytes for value in states if isinstance(value, Tensor))
    return run


@torch.no_grad()
def evaluate(network: nn.Module, held_out: TensorDataset) -> tuple[float, float]:
    """Returns the mean loss and accuracy on held-out data, and leaves the network in training mode."""
    network.eval()
    device, loss, correct, count = next(network.parameters()).device, 0.0, 0, 0
    for start in range(0, len(held_out), EVALUATION_BATCH_SIZE):
        inputs, labels = (v.to(device) for v in held_out[start : start + EVALUATION_BATCH_SIZE])
        logits = network(inputs)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
        count += labels.numel()
    network.train()
    return loss / count, correct / count


def _now(device: torch.device) -> float:
    """Returns the time when the device has finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
