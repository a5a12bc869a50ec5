"""A trained rule in a training loop of your own: a small CNN on scikit-learn's digits, beside AdamW.

    python docs/examples/own_training_loop.py

LearnedOptimizer is a torch.optim.Optimizer, so the loop is the same for all. It is told how many steps there
will be, and nothing else: a rate and a schedule are its rule's own, fitted on small networks, some of them
on these digits. AdamW gets its default learning rate and two greater ones. Every optimizer meets the same
initial weights and minibatches, seed by seed, which makes the paired difference of two as sharp as it is.
"""

import torch
from torch import nn
from torch.nn import functional as F

from l2l_lightning import LearnedOptimizer
from l2l_lightning.comparison.statistics import Interval, lead, paired_difference
from l2l_lightning.data.digits import read_digits

OPTIMIZERS = {
    "learned": lambda parameters, steps: LearnedOptimizer(parameters, total_steps=steps),
    "AdamW, lr 0.001": lambda parameters, steps: torch.optim.AdamW(parameters),
    "AdamW, lr 0.01": lambda parameters, steps: torch.optim.AdamW(parameters, lr=0.01),
    "AdamW, lr 0.03": lambda parameters, steps: torch.optim.AdamW(parameters, lr=0.03),
}
"""They are made of a network's parameters and the number of optimizer steps."""


def make_network():
    """Returns a CNN of 5,130 parameters."""
    convolution = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2))  # [B, 1, 8, 8] to [B, 16, 3, 3]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10))


def load_data():
    """Returns (images [M, 1, 8, 8], labels [M]) to train on, and others to test on."""
    images, labels = read_digits()
    images = images[:, None]
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = shuffled[:1400], shuffled[1400:]
    return (images[train], labels[train]), (images[test], labels[test])


def train(make_optimizer, data, seed, steps):
    """Returns the loss and the accuracy on the test images after so many steps."""
    (images, labels), (test_images, test_labels) = data
    torch.manual_seed(seed)  # the network's weights, then the minibatches
    network = make_network()
    optimizer = make_optimizer(network.parameters(), steps)
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits = network(test_images)
    accuracy = (logits.argmax(1) == test_labels).float().mean()
    return F.cross_entropy(logits, test_labels).item(), accuracy.item()


def main(steps=100, num_seeds=3):
    """Prints a line for each optimizer, and returns their test losses [num_seeds] by name."""
    data, found = load_data(), {}
    for name, make_optimizer in OPTIMIZERS.items():
        runs = torch.tensor([train(make_optimizer, data, seed, steps) for seed in range(num_seeds)])
        found[name], accuracies = runs.double().T
        line = f"{name:16} loss {Interval.of(found[name])}, accuracy {Interval.of(accuracies)}"
        if name != "learned":
            difference = paired_difference(found["learned"], found[name])
            line += f"; learned - it {difference} (lead: {lead(found['learned'], found[name])})"
        print(line)
    return found


if __name__ == "__main__":
    main()
