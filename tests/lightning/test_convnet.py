"""The paper's convolutional network against torch.nn in float64, and the labels that it is given."""

import pytest
import torch
from problems import generator
from torch import nn
from torch.nn import functional as F

from l2l_lightning.data import Images
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.tasks import ImageConvNet

COLOURS = "colour-digits"


def noise(count=40, classes=10):
    """Images in the format of CIFAR-10, with every label in turn."""
    pixels = torch.rand(count, 3, 32, 32, generator=generator())
    return Images(pixels, torch.arange(count) % classes, "noise", classes)


class Reference(nn.Module):
    """The same network of torch.nn's modules, written layer by layer."""

    def __init__(self, side, classes):
        super().__init__()

        def norm(kind, width):
            return kind(width, eps=1e-3, track_running_stats=False)

        self.conv0, self.norm0 = nn.Conv2d(3, 4, 5, padding=2), norm(nn.BatchNorm2d, 4)
        self.conv1, self.norm1 = nn.Conv2d(4, 5, 5, padding=2), norm(nn.BatchNorm2d, 5)
        self.fc0, self.norm2 = nn.Linear(5 * (side // 4) ** 2, 6), norm(nn.BatchNorm1d, 6)
        self.fc1 = nn.Linear(6, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm0(self.conv0(x))), 2)
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        return self.fc1(F.relu(self.norm2(self.fc0(x.flatten(1)))))


@pytest.mark.parametrize(("shrink", "classes"), [(1, None), (4, [7, 2, 5])])
def test_losses_and_gradients_are_those_of_torchs_modules(shrink, classes):
    task = ImageConvNet(COLOURS, [4, 5], [6], classes, batch_size=9, init_std=0.2, shrink=shrink)
    images = noise()
    optimizees = Optimizees(task, images, 0, "train", [0, 1], dtype=torch.float64)
    # β is 0 in θ0, where a wrong sign of it would not show.
    optimizees.theta += 0.1 * torch.randn(optimizees.theta.shape, generator=generator(), dtype=torch.float64)
    indices = torch.stack([task.batch((), images, generator(k)) for k in range(2)])
    batches = task.gather(indices, images)
    losses, grads = task.losses_and_grads(optimizees.theta, (batches[0].double(), batches[1]))
    chosen = torch.tensor([i for i in range(40) if classes is None or i % 10 in classes])
    reference = Reference(32 // shrink, task.num_classes).double()
    own = {name.replace("norm0.bias", "conv0.beta"): p for name, p in reference.named_parameters()}
    own |= {"conv1.beta": reference.norm1.bias, "fc0.beta": reference.norm2.bias}
    for k in range(2):
        parts = optimizees.theta[k].split([tensor.numel for tensor in task.tensors])
        with torch.no_grad():
            for tensor, part in zip(task.tensors, parts, strict=True):
                own[tensor.name].copy_(part.view(tensor.shape))
        drawn = chosen[indices[k]]
        pixels, labels = batches[0][k], images.labels[drawn].tolist()
        blocks = images.pixels[drawn].view(9, 3, 32 // shrink, shrink, 32 // shrink, shrink)
        torch.testing.assert_close(pixels, blocks.mean((3, 5)))
        targets = torch.tensor([label if classes is None else classes.index(label) for label in labels])
        loss = F.cross_entropy(reference(pixels.double()), targets)
        expected = torch.autograd.grad(loss, [own[tensor.name] for tensor in task.tensors])
        torch.testing.assert_close(losses[k], loss.detach())
        torch.testing.assert_close(grads[k], torch.cat([grad.flatten() for grad in expected]))


def test_it_has_the_papers_layers_and_theta0():
    task = ImageConvNet(COLOURS)
    # 3 convolutions of 16 channels with b and β, 32 units with b and β on 4x4 pixels, and ten logits.
    convolutions = 25 * 16 * (3 + 16 + 16) + 3 * 2 * 16
    assert task.num_coordinates == convolutions + 32 * (4 * 4 * 16 + 2) + 10 * (32 + 1) == 22_682
    theta, start = task.init(generator()), 0
    for tensor in task.tensors:
        part = theta[start : start + tensor.numel]
        start += tensor.numel
        if tensor.name.endswith("beta"):
            assert not part.any()
        elif tensor.numel > 1000:
            assert abs(part.std() - 0.01) < 1e-3
    assert start == len(theta)


def test_minibatches_are_of_the_classes_alone_and_relabelled():
    task, images = ImageConvNet(COLOURS, classes=[8, 3], batch_size=200), noise()
    pixels, labels = task.gather(task.batch((), images, generator())[None], images)
    # Every one of the eight images that are an 8 (now 0) or a 3 (now 1) is drawn, and no other.
    found = {(image.sum().item(), label) for image, label in zip(pixels[0], labels[0].tolist(), strict=True)}
    chosen = [(images.pixels[i].sum().item(), [8, 3].index(i % 10)) for i in range(40) if i % 10 in (3, 8)]
    assert len(found) == 8
    assert found == set(chosen)
    with pytest.raises(ValueError, match=r"noise has no example of the classes \[8, 9\]"):
        ImageConvNet(COLOURS, classes=[8, 9]).batch((), noise(classes=3), generator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "cifar11"}, "dataset"),
        ({"classes": [3]}, r"classes must name two at least, and none twice, got \[3\]"),
        ({"classes": [3, 3]}, "none twice"),
        ({"classes": [3, 10]}, r"classes\[1\] must be at most 9, got 10"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"channels": [0]}, r"channels\[0\] must be at least 1"),
        ({"shrink": 3}, "shrink must divide 32 and 32"),
        ({"init_std": -1}, "init_std must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageConvNet(**{"dataset": COLOURS} | arguments)
