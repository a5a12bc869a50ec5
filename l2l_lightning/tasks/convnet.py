"""Convolutional networks on images: the paper's third experiment."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_lightning.checks import check_at_least, check_choice, check_whole_numbers
from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.examples import Examples
from l2l_lightning.data.images import Images, need_examples
from l2l_lightning.rules.layout import ParameterInfo
from l2l_lightning.tasks.base import Batch, Task, rows, split_vector

KERNEL = 5
"""Rows and columns of a convolution's kernel; zeros around the images keep their size."""

EPSILON = 1e-3
"""What batch normalisation adds to a variance: the default of Sonnet, the library of DeepMind's code."""

_OF_CLASSES: weakref.WeakKeyDictionary[Images, dict[tuple[int, ...], Images]] = weakref.WeakKeyDictionary()
"""Images of some classes, by those that they were chosen of: they are looked for once."""


class ImageConvNet(Task):
    """A convolutional network that classifies images: f_t(θ) = mean cross-entropy of a minibatch.

    z_l = relu(maxpool(BN(W_l ∗ z_{l-1} + b_l) + β_l)), with 5x5 kernels and the maximum over 2x2 pixels; then
    z_l = relu(BN(W_l z_{l-1} + b_l) + β_l), fully connected, and C logits W z + b. BN subtracts the
    minibatch's mean and divides by its deviation, of each channel or unit, at test time as well. θ is
    (W, b, β) of every layer, "conv0.weight", "conv0.bias", "conv0.beta", … "fc0.weight" and on; with the
    paper's layers on "cifar10" N = 22,682. Every evaluation draws its minibatch with replacement.

    Args:
        dataset: A name that `load_images` knows.
        channels: Of each convolution.
        hidden_sizes: Units of each fully connected layer before the last.
        classes: The labels of the images that minibatches are drawn from, which become 0, 1, … in this order;
            None takes all.
        batch_size: B, images in a minibatch.
        init_std: W, b ~ N(0, init_std²) in θ0; β is 0.
        shrink: Every square of shrink x shrink pixels becomes its mean: with 2 a step takes a quarter of the
            time.

    Raises:
        ValueError: An argument out of its range, or (when a minibatch is drawn or gathered) images of another
            size, or none of the classes.

    Example:
        >>> from l2l_lightning.data import load_images
        >>> from l2l_lightning.rollout.optimizees import Optimizees
        >>> task, images = ImageConvNet("mnist", channels=[4], classes=[3, 8]), load_images("mnist").train
        >>> optimizees = Optimizees(task, images, seed=0, stream="train", indices=[0, 1])
        >>> losses, grads = optimizees.losses_and_grads()
        >>> losses.shape, grads.shape == (2, task.num_coordinates)
        (torch.Size([2]), True)

    Source: Andrychowicz et al. 2016, section 3.3; what that leaves open is as in `problems.cifar10` of
    github.com/google-deepmind/learning-to-learn.
    """

    def __init__(
        self,
        dataset: str = "cifar10",
        channels: Sequence[int] = (16, 16, 16),
        hidden_sizes: Sequence[int] = (32,),
        classes: Sequence[int] | None = None,
        batch_size: int = 128,
        init_std: float = 0.01,
        shrink: int = 1,
    ) -> None:
        check_choice(DATA_SETS, dataset=dataset)
        sizes = {
            f"{name}[{i}]": n
            for name, v in (("channels", channels), ("hidden_sizes", hidden_sizes))
            for i, n in enumerate(v)
        }
        check_whole_numbers(1, 10**6, shrink=shrink, **sizes)
        check_whole_numbers(2, 10**6, batch_size=batch_size)  # one image has no deviation
        check_at_least(0, init_std=init_std)
        known = DATA_SETS[dataset]
        if classes is not None:
            if len(classes) < 2 or len(set(classes)) < len(classes):
                raise ValueError(f"classes must name two at least, and none twice, got {list(classes)}")
            check_whole_numbers(
                0, known.num_classes - 1, **{f"classes[{i}]": c for i, c in enumerate(classes)}
            )
        self.dataset = dataset
        self.channels = list(channels)
        self.hidden_sizes = list(hidden_sizes)
        self.classes = None if classes is None else list(classes)
        self.batch_size = batch_size
        self.init_std = init_std
        self.shrink = shrink
        *colours, height, width = known.image_shape
        self.image_shape = (*(colours or [1]), height, width)
        if height % shrink or width % shrink:
            raise ValueError(f"shrink must divide {height} and {width}, the images' sides, got {shrink}")
        self.num_classes = known.num_classes if classes is None else len(classes)
        self.shapes = self._shapes()
        self.num_coordinates = sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that θ is made of, in order, by name."""
        colours, height, width = self.image_shape
        height, width = height // self.shrink, width // self.shrink
        weights: dict[str, tuple[int, ...]] = {}
        for index, (inputs, outputs) in enumerate(pairwise([colours, *self.channels])):
            weights[f"conv{index}"] = (outputs, inputs, KERNEL, KERNEL)
            height, width = -(-height // 2), -(-width // 2)
        features = height * width * [colours, *self.channels][-1]
        for index, (inputs, outputs) in enumerate(pairwise([features, *self.hidden_sizes, self.num_classes])):
            weights[f"fc{index}"] = (outputs, inputs)
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, shape in weights.items():
            shapes |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1], f"{layer}.beta": shape[:1]}
        del shapes[f"{layer}.beta"]  # the logits are not normalised
        return shapes

    @property
    def tensors(self) -> tuple[ParameterInfo, ...]:
        """Every layer's weight, bias and (but for the last) β."""
        return tuple(ParameterInfo(name, shape) for name, shape in self.shapes.items())

    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0, [N]: weights and biases from N(0, init_std²), β = 0."""
        theta = self.init_std * torch.randn(self.num_coordinates, generator=generator)
        for name, part in self._named(theta).items():
            if name.endswith("beta"):
                part.zero_()
        return theta

    def _named(self, theta: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.shapes, split_vector(theta, list(self.shapes.values())), strict=True))

    def batch(self, instance: Batch, images: Examples | None, generator: torch.Generator) -> Batch:
        """Draws the indices of a minibatch among the images of the task's classes, [B]."""
        return self._of_classes(images).sample_indices(self.batch_size, generator)

    def gather(self, batches: Batch, images: Examples | None) -> Batch:
        """Turns indices [K, B] into images [K, B, colours, H, W] and labels [K, B]."""
        pixels, labels = self._of_classes(images).gather(batches)
        pixels = pixels.view(*labels.shape, *self.image_shape)
        if self.shrink > 1:
            small = F.avg_pool2d(pixels.flatten(0, 1), self.shrink)
            pixels = small.view(*labels.shape, *small.shape[1:])
        return pixels, labels

    def _of_classes(self, examples: Examples | None) -> Examples:
        """Returns the images of the task's classes, relabelled in their order."""
        examples = need_examples(examples, self)
        if self.classes is None:
            return examples
        if not isinstance(examples, Images):
            raise ValueError(
                f"classes are chosen of images that are kept as tensors, not of {examples.source}"
            )
        kept, key = _OF_CLASSES.setdefault(examples, {}), tuple(self.classes)
        if key not in kept:
            kept[key] = examples.of_classes(key)
        return kept[key]

    def losses(self, thetas: Tensor, batches: Batch) -> Tensor:
        """Computes the losses [K] of θ [K, N]: at once, or on a CPU one after the other.

        torch.func.vmap makes a grouped convolution of the K, which takes a CPU longer.
        """
        return (
            self._looped(thetas, rows(batches, len(thetas)))
            if thetas.is_cpu
            else super().losses(thetas, batches)
        )

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes f(θ) of θ [N] on images [B, colours, H, W] and labels [B]."""
        z, labels = batch
        of = self._named(theta)
        for layer in (f"conv{index}" for index in range(len(self.channels))):
            z = F.conv2d(z, of[f"{layer}.weight"], of[f"{layer}.bias"], padding=KERNEL // 2)
            z = _normalised(z, of[f"{layer}.beta"])
            z = torch.relu(F.max_pool2d(z, 2, ceil_mode=True))  # ReLU after it is the same, of a quarter
        z = z.flatten(1)
        for layer in (f"fc{index}" for index in range(len(self.hidden_sizes))):
            z = F.linear(z, of[f"{layer}.weight"], of[f"{layer}.bias"])
            z = torch.relu(_normalised(z, of[f"{layer}.beta"]))
        last = f"fc{len(self.hidden_sizes)}"
        return F.cross_entropy(F.linear(z, of[f"{last}.weight"], of[f"{last}.bias"]), labels)


def _normalised(z: Tensor, beta: Tensor) -> Tensor:
    """Returns z with mean β and deviation 1 in every channel, [B, channels, …], by the minibatch's own."""
    # Without a weight torch cannot differentiate it twice, which second-order meta-gradients do.
    return F.batch_norm(z, None, None, torch.ones_like(beta), beta, training=True, eps=EPSILON)
