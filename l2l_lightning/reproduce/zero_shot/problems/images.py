"""Classifiers of images: the matrix of `reproduce generalise`, perceptrons, conv nets, ResNets, ViTs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from l2l_lightning.reproduce.generalise import Cell, cells
from l2l_lightning.reproduce.zero_shot import data
from l2l_lightning.reproduce.zero_shot.problem import PROBLEMS, QUICK, Problem, prediction
from l2l_lightning.reproduce.zero_shot.problems.networks import VisionTransformer, mlp

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU}


def classifier(
    family: str, build: Callable[[], nn.Module], dataset: str, size: int, steps: int, rows: Any = None
) -> Problem:
    """A network that classifies images in minibatches of `size`; rows replace the data set's."""
    rows = rows or data.images(dataset)
    loss = prediction(F.cross_entropy)
    return Problem(family, steps, build, rows.batches(size), rows.held_out, loss, rows.source)


def matrix(cell: Cell) -> Problem:
    """A cell of the generalisation matrix, with the task's own initialisation."""
    task = cell.task

    def build() -> nn.Module:
        sizes = [task.num_pixels, *task.hidden_sizes, task.num_classes]
        module = mlp(sizes, ACTIVATIONS[task.activation])
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=task.init_std)
        return module

    return classifier("matrix", build, cell.dataset, task.batch_size, cell.horizon)


def perceptron(
    family: str,
    dataset: str,
    sizes: Sequence[int],
    activation: type[nn.Module],
    steps: int,
    norm: bool = False,
) -> Problem:
    """A perceptron with PyTorch's initialisation, in minibatches of 64."""
    return classifier(family, partial(mlp, sizes, activation, norm), dataset, 64, steps)


def conv(channels: int, normalised: bool, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Two convolutions with stride 2 and a linear layer, for MNIST."""

    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(outputs)] if normalised else []
        return [nn.Conv2d(inputs, outputs, 3, stride=2), *norm, activation()]

    layers = [*layer(1, channels), *layer(channels, 2 * channels)]
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *layers, nn.Flatten(), nn.Linear(72 * channels, 10))


class NarrowResNet18(ResNet):  # type: ignore[misc]
    """torchvision's ResNet-18 with stages of 16, 32, 64 and 128 channels, on images of one channel."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(128, num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
        return super()._make_layer(block, planes // 4, *args, **kwargs)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of pixels [B, 784], which become three channels."""
        x: torch.Tensor = super().forward(pixels.view(-1, 1, 28, 28).expand(-1, 3, -1, -1))
        return x


@functools.cache
def digits_of_mnist(first: int) -> data.Data:
    """The five digits from `first` on, labelled from 0 on."""
    whole = data.images("mnist")
    parts = []
    for pixels, labels in (whole.train, whole.validation, whole.test):
        chosen = (labels >= first) & (labels < first + 5)
        parts.append((pixels[chosen], labels[chosen] - first))
    return data.Data(parts[0], parts[1], parts[2], f"digits {first} to {first + 4} of {whole.source}")


@functools.cache
def pretrained_resnet() -> nn.Module:
    """A network after 200 steps of AdamW on the digits 0 to 4, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, generator = NarrowResNet18(5), torch.Generator().manual_seed(0)
    optimizer, batch = torch.optim.AdamW(module.parameters(), 1e-3), digits_of_mnist(0).batches(32)
    for _ in range(200):
        pixels, labels = batch(generator)
        module.zero_grad()
        F.cross_entropy(module(pixels), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module


def resnet(fine_tuned: bool, steps: int) -> Problem:
    """A ResNet on the digits 5 to 9, from scratch or, with a new head, from what was trained on 0 to 4."""

    def build() -> nn.Module:
        if not fine_tuned:
            return NarrowResNet18(5)
        module = copy.deepcopy(pretrained_resnet())
        module.fc = nn.Linear(128, 5)
        return module

    return classifier("resnet", build, "mnist", 32, steps, digits_of_mnist(5))


for _cell in cells("star"):
    if _cell.dataset != "smiles":
        PROBLEMS[f"matrix: {_cell}"] = partial(matrix, _cell)

_small = (64, 32, 10)
PROBLEMS |= {
    "digits 64-32-10 tanh, 300": partial(perceptron, "digits", "digits", _small, nn.Tanh, 300),
    "digits 64-64-64-10 GELU, 1000": partial(perceptron, "digits", "digits", (64, 64, 64, 10), nn.GELU, 1000),
    "digits 64-32-32-10 LayerNorm, 300": partial(
        perceptron, "digits", "digits", (64, 32, 32, 10), nn.ReLU, 300, True
    ),
    "digits 64-48-48-48-48-10 SiLU, 1000": partial(
        perceptron, "digits", "digits", (64, 48, 48, 48, 48, 10), nn.SiLU, 1000
    ),
    "MNIST 784-100-10 ReLU, 300": partial(perceptron, "MNIST", "mnist", (784, 100, 10), nn.ReLU, 300),
    "MNIST 784-64-64-10 GELU, 1000": partial(perceptron, "MNIST", "mnist", (784, 64, 64, 10), nn.GELU, 1000),
    "MNIST 784-64-64-64-10 LayerNorm, 300": partial(
        perceptron, "MNIST", "mnist", (784, 64, 64, 64, 10), nn.ReLU, 300, True
    ),
    "plateau digits 64-16-16-16-10 sigmoid, 1000": partial(
        perceptron, "plateau", "digits", (64, 16, 16, 16, 10), nn.Sigmoid, 1000
    ),
    "plateau MNIST 784-20-20-10 sigmoid, 600": partial(
        perceptron, "plateau", "mnist", (784, 20, 20, 10), nn.Sigmoid, 600
    ),
    "plateau MNIST 784-32-32-32-10 sigmoid, 1000": partial(
        perceptron, "plateau", "mnist", (784, 32, 32, 32, 10), nn.Sigmoid, 1000
    ),
}
for _steps in (100, 300, 1000, 3000, 10000):
    PROBLEMS[f"horizon digits 64-32-10 ReLU, {_steps}"] = partial(
        perceptron, "horizon", "digits", _small, nn.ReLU, _steps
    )
for _steps in (100, 300, 1000, 3000):
    PROBLEMS[f"horizon MNIST 784-32-10 GELU, {_steps}"] = partial(
        perceptron, "horizon", "mnist", (784, 32, 10), nn.GELU, _steps
    )
for _channels, _norm, _steps in ((8, False, 100), (8, False, 300), (16, False, 300), (8, False, 1000)):
    PROBLEMS[f"conv {_channels} channels, {_steps}"] = partial(
        classifier, "conv", partial(conv, _channels, _norm), "mnist", 32, _steps
    )
for _channels, _steps in ((8, 100), (8, 300), (16, 300), (8, 1000)):
    PROBLEMS[f"conv {_channels} channels BatchNorm, {_steps}"] = partial(
        classifier, "conv with BatchNorm", partial(conv, _channels, True), "mnist", 32, _steps
    )
PROBLEMS |= {
    "ResNet-18 ¼ fine-tuned, 60": partial(resnet, True, 60),
    "ResNet-18 ¼ from scratch, 150": partial(resnet, False, 150),
    "ViT 32×2, 300": partial(classifier, "ViT", partial(VisionTransformer, 32, 2), "mnist", 32, 300),
    "ViT 32×2, 1000": partial(classifier, "ViT", partial(VisionTransformer, 32, 2), "mnist", 32, 1000),
    "ViT 48×3, 300": partial(classifier, "ViT", partial(VisionTransformer, 48, 3), "mnist", 32, 300),
}
QUICK += [
    *("matrix: digits sigmoid 20 @100", "digits 64-32-10 tanh, 300", "conv 8 channels BatchNorm, 100"),
    *("horizon MNIST 784-32-10 GELU, 100", "matrix: mnist relu 20 @100"),
]
