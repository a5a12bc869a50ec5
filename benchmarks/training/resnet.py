"""A torchvision ResNet-18, pretrained on some digits of MNIST and fine-tuned, all of it, on the others."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torchvision
from loop import ADAMW, Problem, Setting, draw_network, train
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from l2l_lightning.data import Images, load_images
from l2l_lightning.rollout.optimizees import derive_generator

# The channels' mean and deviation that torchvision's weights were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRETRAINING = Setting(ADAMW, lr=1e-3, weight_decay=0.01)
OLD_DIGITS, NEW_DIGITS = range(5), range(5, 10)


class NarrowResNet18(ResNet):
    """torchvision's ResNet-18 with stages of width, 2, 4 and 8 times width channels instead of 64 times."""

    def __init__(self, width: int, num_classes: int) -> None:
        self.width = width
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(8 * width, num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


def resnet_problem(args: Any) -> Problem:
    """Fine-tuning a ResNet-18 on the digits 5 to 9 with a new head, BatchNorm in training mode.

    It has torchvision's weights of args.weights, and is downloaded; or else it has args.width channels in its
    first stage and is pretrained here, on the digits 0 to 4.
    """
    splits = load_images("mnist", args.data_root)
    if args.weights is not None:
        width, pretrained = 64, torchvision.models.resnet18(weights=args.weights)
        origin = f"torchvision's weights {args.weights}"
    else:
        width, generator = args.width, derive_generator(args.seed, "train", 0)
        pretrained = draw_network(partial(NarrowResNet18, width, len(OLD_DIGITS)), generator).to(args.device)
        old = (coloured(images, OLD_DIGITS) for images in (splits.train, splits.validation))
        sizes = {"steps": args.pretraining_steps, "batch_size": args.batch_size}
        train(pretrained, PRETRAINING, *old, **sizes, generator=generator)
        pretrained = pretrained.cpu()
        origin = f"{args.pretraining_steps} steps of AdamW on the digits 0 to 4"

    def make_network() -> nn.Module:
        network = copy.deepcopy(pretrained)
        network.fc = nn.Linear(8 * width, len(NEW_DIGITS))
        return network

    description = f"ResNet-18 of width {width}, pretrained ({origin}), fine-tuned on MNIST's digits 5 to 9"
    new = (coloured(images, NEW_DIGITS) for images in splits)
    return Problem(description, splits.train.source, make_network, *new)


def coloured(images: Images, digits: range) -> TensorDataset:
    """Gives the images of some digits three channels, [M, 3, 28, 28], and labels from 0 on."""
    chosen = images.select(torch.isin(images.labels, torch.tensor(digits)).nonzero()[:, 0])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return TensorDataset((chosen.pixels.view(-1, 1, 28, 28) - mean) / std, chosen.labels - digits.start)
