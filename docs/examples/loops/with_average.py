"""An exponential moving average of the weights, which a rule with a decay of its own needs less.

python docs/examples/loops/with_average.py
"""

from small_problem import STEPS, make_loader, make_network, mse
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from l2l_lightning import LearnedOptimizer


def main(decay=0.9):
    """Returns the trained network, and the averaged one."""
    network = make_network()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer = LearnedOptimizer(network.parameters(), total_steps=STEPS)
    for inputs, labels in make_loader():
        loss = mse(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(network)
    return network, average.module


if __name__ == "__main__":
    print(*main())
