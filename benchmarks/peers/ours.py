"""Our side of the comparison, through the package's own rollout: what a training step of MetaLearner does."""

import torch
import torch._dynamo  # an import of torch.optim's, which comes with the first optimizer
from harness import HIDDEN, META_LR, OUTPUT_SCALE, P_THRESHOLD, main

from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import Rollout
from l2l_lightning.rules import CoordinatewiseLSTM
from l2l_lightning.tasks import MNISTMLP


class GivenMLP(MNISTMLP):
    """The package's MLP on the problem's θ0, images and minibatches, which are given, not drawn."""

    def __init__(self, problem, device):
        super().__init__()
        self.images = torch.from_numpy(problem["images"]).to(device)
        self.labels = torch.from_numpy(problem["labels"]).to(device)
        self.thetas = iter(torch.from_numpy(problem["theta"]))
        self.tasks = iter(range(len(problem["theta"])))
        self.indices = torch.from_numpy(problem["indices"]).flatten(0, 1)  # [evaluations, K, B]

    def init(self, generator):
        return next(self.thetas)

    def instance(self, generator):
        return iter(self.indices[:, next(self.tasks)])

    def batch(self, instance, images, generator):
        return next(instance)

    def gather(self, batches, images):
        pixels = self.images.index_select(0, batches.flatten())
        return pixels.view(*batches.shape, -1), self.labels[batches]


def prepare(problem, options, precision=None):
    device = options.device
    shape = 2, HIDDEN, "log_sign", P_THRESHOLD, OUTPUT_SCALE
    rule = CoordinatewiseLSTM(*shape, precision=precision).to(device)
    parameters = list(rule.parameters())
    torch.nn.utils.vector_to_parameters(torch.from_numpy(problem["phi"]).to(device), parameters)
    adam = torch.optim.Adam(parameters, lr=META_LR)
    tasks = range(len(problem["theta"]))
    optimizees = Optimizees(GivenMLP(problem, device), None, 0, "test", tasks, device)
    # True rather than the default: a graph that cannot be recorded is an error, not another measurement.
    graphs = {} if device == "cpu" else {"cuda_graphs": options.cuda_graphs}
    rollout = Rollout(rule, optimizees, **graphs)

    def meta_step(indices):
        adam.zero_grad()
        meta_loss = rollout.window(len(indices) - 1).meta_loss
        meta_loss.backward()
        gradient = torch.cat([parameter.grad.view(-1) for parameter in parameters])
        adam.step()
        return meta_loss.item(), gradient

    return meta_step


if __name__ == "__main__":
    main("torch", prepare, torch.cuda.max_memory_allocated)
