"""A scheduler on top of a rule that has a schedule: its factor multiplies the rule's own.

python docs/examples/loops/with_scheduler.py
"""

from small_problem import STEPS, make_loader, make_network, mse
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from l2l_lightning import LearnedOptimizer


def constant(optimizer):
    """Returns what a loop gets that insists on a scheduler: it leaves the rule alone."""
    return LambdaLR(optimizer, lambda step: 1.0)


def cosine(optimizer):
    """Returns what decays a second time."""
    return CosineAnnealingLR(optimizer, STEPS)


def main(make_scheduler=constant):
    """Returns the trained network, and the lr of every step."""
    network, rates = make_network(), []
    optimizer = LearnedOptimizer(network.parameters(), total_steps=STEPS)
    scheduler = make_scheduler(optimizer)
    for inputs, labels in make_loader():
        loss = mse(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return network, rates


if __name__ == "__main__":
    print(main()[0])
