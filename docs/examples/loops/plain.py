"""A plain loop: the one that all others of this folder are held to.

python docs/examples/loops/plain.py
"""

from small_problem import STEPS, make_loader, make_network, mse

from l2l_lightning import LearnedOptimizer


def main():
    """Returns the trained network, and the loss at every step."""
    network, losses = make_network(), []
    optimizer = LearnedOptimizer(network.parameters(), total_steps=STEPS)
    for inputs, labels in make_loader():
        loss = mse(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return network, losses


if __name__ == "__main__":
    print(*(f"{loss:.3f}" for loss in main()[1]))
