"""torch.compile of a whole training step, of which the optimizer's part is left as it is.

python docs/examples/loops/with_compile.py
"""

import torch
from small_problem import STEPS, make_loader, make_network, mse

from l2l_lightning import LearnedOptimizer


def main(backend="inductor"):
    """Returns the trained network."""
    network = make_network()
    optimizer = LearnedOptimizer(network.parameters(), total_steps=STEPS)

    @torch.compile(backend=backend)
    def train_step(inputs, labels):
        optimizer.zero_grad()
        loss = mse(network(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    for inputs, labels in make_loader():
        train_step(inputs, labels)
    return network


if __name__ == "__main__":
    print(main())
