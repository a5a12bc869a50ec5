"""A torchvision ResNet-18, pretrained on some classes and fine-tuned on others."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from l2l_lightning.data import Images, ImageSplits, load_images
from l2l_lightning.errors import CommandLineError
from l2l_lightning.examples.module import ADAMW, OptimizerSetting
from l2l_lightning.examples.problem import Problem
from l2l_lightning.examples.training import train
from l2l_lightning.rollout.optimizees import derive_generator

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels red, green and blue: what torchvision's weights were trained with."""

PRETRAINING = OptimizerSetting(ADAMW, lr=1e-3, weight_decay=0.01)

OLD_DIGITS, NEW_DIGITS = range(5), range(5, 10)
"""What the network is pretrained on, and fine-tuned on."""


class NarrowResNet18(ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet-18 with stages of width, 2, 4 and 8 times width channels; 64 is ResNet-18 itself.

    The stem has 64 channels whatever the width.

    Args:
        width: Channels of the first stage.
        num_classes: Outputs.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition".

    Example:
        >>> NarrowResNet18(width=4, num_classes=5)(torch.randn(2, 3, 28, 28)).shape
        torch.Size([2, 5])
    """

    def __init__(self, width: int, num_classes: int) -> None:
        self.width = width
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(8 * width, num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        layer: nn.Sequential = super()._make_layer(block, planes * self.width // 64, *args, **kwargs)
        return layer


def resnet_problem(
    *,
    width: int = 16,
    weights: str | None = None,
    data_root: str | None = None,
    steps: int = 100,
    batch_size: int = 64,
    pretraining_steps: int = 200,
    seed: int = 0,
    accelerator: str = "auto",
) -> Problem:
    """Fine-tuning a ResNet-18 on MNIST's digits 5 to 9, with a new head.

    All layers are trained, BatchNorm in training mode. Without `weights` the network is pretrained here, on
    the digits 0 to 4 with AdamW.

    Args:
        width: Channels of the first stage, 64 for ResNet-18 itself.
        weights: torchvision's name of pretrained weights ("IMAGENET1K_V1"), which it downloads; they are of
            width 64.
        data_root: Folder of all of MNIST; None is as for `load_images`.
        steps: Fine-tuning steps.
        batch_size: Images in a minibatch.
        pretraining_steps: How long it is pretrained.
        seed: Of every random draw.
        accelerator: Lightning's name of the kind of device.

    Raises:
        CommandLineError: Width is less than 1, there are no such weights, or not for this width, or they
            cannot be downloaded.
        DataNotFoundError: MNIST is not where data_root says.
    """
    if width < 1:
        raise CommandLineError(f"--width must be at least 1, got {width}")
    splits = load_images("mnist", data_root)
    if weights is not None:
        pretrained, origin = _torchvision_resnet(width, weights), f"torchvision's weights {weights}"
    else:
        pretrained = _pretrain(width, splits, pretraining_steps, batch_size, seed, accelerator)
        origin = f"{pretraining_steps} steps of AdamW on the digits 0 to 4"

    def network() -> nn.Module:
        network = copy.deepcopy(pretrained)
        network.fc = nn.Linear(8 * width, len(NEW_DIGITS))
        return network

    parameters = sum(parameter.numel() for parameter in network().parameters())
    return Problem(
        name="resnet",
        description=(
            f"ResNet-18 of width {width} ({parameters:,} parameters), pretrained ({origin}), "
            f"fine-tuned on MNIST's digits 5 to 9 for {steps} steps of {batch_size} images"
        ),
        source=splits.train.source,
        make_network=network,
        train=_coloured(splits.train, NEW_DIGITS),
        validation=_coloured(splits.validation, NEW_DIGITS),
        test=_coloured(splits.test, NEW_DIGITS),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        accelerator=accelerator,
    )


def _pretrain(
    width: int, splits: ImageSplits, steps: int, batch_size: int, seed: int, accelerator: str
) -> nn.Module:
    """A network that knows the digits 0 to 4."""
    generator = derive_generator(seed, "train", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        network = NarrowResNet18(width, len(OLD_DIGITS))
    train(
        network,
        PRETRAINING,
        _coloured(splits.train, OLD_DIGITS),
        _coloured(splits.validation, OLD_DIGITS),
        steps=steps,
        batch_size=batch_size,
        generator=generator,
        accelerator=accelerator,
    )
    pretrained: nn.Module = network.cpu()
    return pretrained


def _torchvision_resnet(width: int, weights: str) -> nn.Module:
    if width != 64:
        raise CommandLineError(f"--weights {weights} is a ResNet-18 of width 64, not {width}: add --width 64")
    names = [weight.name for weight in torchvision.models.get_model_weights("resnet18")]
    if weights not in names:
        raise CommandLineError(f"--weights {weights}: torchvision has {', '.join(names)} only")
    try:
        network: nn.Module = torchvision.models.get_model("resnet18", weights=weights)
    except (OSError, RuntimeError) as error:
        raise CommandLineError(
            f"--weights {weights}: torchvision cannot load it ({error}); without --weights the network is "
            "pretrained here"
        ) from error
    return network


def _coloured(images: Images, digits: range) -> TensorDataset:
    """The images of some digits as torchvision's networks take them, [M, 3, 28, 28], labels from 0 on."""
    chosen = images.select(torch.isin(images.labels, torch.tensor(digits)).nonzero()[:, 0])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return TensorDataset((chosen.pixels.view(-1, 1, 28, 28) - mean) / std, chosen.labels - digits.start)
