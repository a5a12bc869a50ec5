"""Hugging Face's accelerate: the optimizer is prepared as any other is.

python docs/examples/loops/with_accelerate.py
"""

from accelerate import Accelerator
from small_problem import STEPS, make_loader, make_network, mse

from l2l_lightning import LearnedOptimizer


def main():
    """Returns the trained network."""
    accelerator = Accelerator(cpu=True)
    network, loader = make_network(), make_loader()
    optimizer = LearnedOptimizer(network.parameters(), total_steps=STEPS // accelerator.num_processes)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    for inputs, labels in loader:
        loss = mse(network(inputs), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    return accelerator.unwrap_model(network)


if __name__ == "__main__":
    print(main())
