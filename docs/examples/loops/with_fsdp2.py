"""FSDP2, of one process or of those that torchrun starts: parameters are sharded before the optimizer.

torchrun --nproc-per-node 2 docs/examples/loops/with_fsdp2.py
"""

import os

from small_problem import STEPS, make_loader, make_network, mse
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from l2l_lightning import LearnedOptimizer


def main():
    """Returns the whole parameters of the trained network."""
    alone = {} if "RANK" in os.environ else {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group("gloo", **alone)
    try:
        network = make_network()
        fully_shard(network, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
        optimizer = LearnedOptimizer(network.parameters(), total_steps=STEPS)  # after fully_shard
        for inputs, labels in make_loader():  # all processes' minibatches are the same here
            loss = mse(network(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # every process takes every step
        return [parameter.full_tensor().detach() for parameter in network.parameters()]
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    print([tuple(parameter.shape) for parameter in main()])
