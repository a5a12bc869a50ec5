"""Quadratic bowls, whose every optimizer has a closed form."""

import torch

from l2l_lightning.tasks import Task


class Bowl(Task):
    """f(x) = Σ curvature/2 (x − shift)², with a shift of its own at every step if there is noise."""

    def __init__(self, curvature=(1.0,), noise=0.0):
        self.curvature, self.noise = list(curvature), noise
        self.num_coordinates = len(self.curvature)
        self.evaluations = 0

    def init(self, generator):
        return 1 + torch.rand(self.num_coordinates, generator=generator)

    def batch(self, instance, images, generator):
        return self.noise * torch.randn(self.num_coordinates, generator=generator)

    def loss(self, theta, batch):
        return (theta.new_tensor(self.curvature) / 2 * (theta - batch) ** 2).sum()

    def losses(self, thetas, batches):
        self.evaluations += 1
        return super().losses(thetas, batches)


class QuickBowl(Bowl):
    """A Bowl with its gradient written out, for tests of many steps."""

    def losses_and_grads(self, thetas, batches):
        curvature, distance = thetas.new_tensor(self.curvature), thetas - batches
        return (curvature / 2 * distance**2).sum(-1), curvature * distance
