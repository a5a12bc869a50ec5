"""Small multilayer perceptrons on images: the paper's second experiment, and its transfer targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_lightning.checks import check_at_least, check_choice
from l2l_lightning.data.data_sets import DATA_SETS
from l2l_lightning.data.examples import Examples
from l2l_lightning.data.images import need_examples
from l2l_lightning.rules.layout import ParameterInfo
from l2l_lightning.tasks.base import Batch, Task, split_vector

ImageData = Literal[
    "mnist", "digits", "smiles", "colour-digits", "fashion-mnist", "kmnist", "cifar10", "svhn"
]
"""The names in DATA_SETS."""


class Activation(NamedTuple):
    """A nonlinearity z = function(a), and dz/da as a function of z; elementwise, on tensors of any shape."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


ACTIVATIONS = {
    "sigmoid": Activation(torch.sigmoid, lambda z: z * (1 - z)),
    "relu": Activation(torch.relu, lambda z: (z > 0).to(z.dtype)),
    "tanh": Activation(torch.tanh, lambda z: 1 - z * z),
    "elu": Activation(F.elu, lambda z: 1 + z.clamp(max=0)),
}


class ImageMLP(Task):
    """A multilayer perceptron that classifies images: f_t(θ) = mean cross-entropy of a minibatch.

    z_0 = pixels [D], z_l = act(z_{l-1} W_l + b_l), and the last layer's C outputs are the logits. θ is
    (W_1, b_1, W_2, b_2, …), each W_l [inputs, outputs] in row-major order. D and C are the data set's: with
    20 hidden units, "mnist" is 784-20-10 (N = 15,910), "digits" 64-20-10 (1,510), "smiles" 784-20-2 (15,742),
    "cifar10", whose colours are flattened, 3072-20-10 (61,670).
    Every evaluation draws its minibatch with replacement.

    Args:
        dataset: "mnist", "digits" (8x8, of scikit-learn), "smiles" (GENKI-4K, or two folders of images),
            "colour-digits", "fashion-mnist", "kmnist", "cifar10" or "svhn".
        hidden_sizes: Units of each hidden layer; [] is a linear classifier.
        activation: "sigmoid", "relu", "tanh" or "elu".
        batch_size: B, images in a minibatch.
        init_std: θ0 ~ N(0, init_std²), weights and biases alike.
        stride: Only every stride-th row and column of the images: with 2, MNIST's network has a quarter of
            the inputs, and meta-training on it takes a quarter of the time.

    Raises:
        ValueError: An argument out of its range, or (when a minibatch is gathered) images of another size or
            number of classes.

    Example:
        >>> from l2l_lightning.data import load_images
        >>> from l2l_lightning.rollout.optimizees import Optimizees
        >>> task, images = ImageMLP("digits", hidden_sizes=[20]), load_images("digits").train
        >>> optimizees = Optimizees(task, images, seed=0, stream="train", indices=[0, 1])
        >>> losses, grads = optimizees.losses_and_grads()
        >>> losses.shape, grads.shape
        (torch.Size([2]), torch.Size([2, 1510]))

    Source: Andrychowicz et al. 2016, section 3.2; `problems.mnist` of
    github.com/google-deepmind/learning-to-learn.
    """

    def __init__(
        self,
        dataset: ImageData,
        hidden_sizes: Sequence[int] = (20,),
        activation: Literal["sigmoid", "relu", "tanh", "elu"] = "sigmoid",
        batch_size: int = 128,
        init_std: float = 0.01,
        stride: int = 1,
    ) -> None:
        check_choice(DATA_SETS, dataset=dataset)
        check_choice(ACTIVATIONS, activation=activation)
        check_at_least(1, batch_size=batch_size, stride=stride)
        check_at_least(1, **{f"hidden_sizes[{i}]": size for i, size in enumerate(hidden_sizes)})
        check_at_least(0, init_std=init_std)
        self.dataset: ImageData = dataset
        self.hidden_sizes = list(hidden_sizes)
        self.activation = activation
        self.batch_size = batch_size
        self.init_std = init_std
        self.stride = stride
        self.num_pixels = DATA_SETS[dataset].num_pixels
        self.num_classes = DATA_SETS[dataset].num_classes
        *channels, height, width = DATA_SETS[dataset].image_shape
        inputs = math.prod([*channels, *(len(range(0, length, stride)) for length in (height, width))])
        layers = pairwise([inputs, *hidden_sizes, self.num_classes])
        self.shapes = [shape for inputs, outputs in layers for shape in ((inputs, outputs), (1, outputs))]
        self.num_coordinates = sum(rows * columns for rows, columns in self.shapes)

    @property
    def tensors(self) -> tuple[ParameterInfo, ...]:
        """Every layer's weight [inputs, units] and bias [units], "0.weight", "0.bias", "1.weight" and on."""
        return tuple(
            ParameterInfo(f"{index // 2}.bias", shape[1:])
            if index % 2
            else ParameterInfo(f"{index // 2}.weight", shape, inputs_first=True)
            for index, shape in enumerate(self.shapes)
        )

    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0 ~ N(0, init_std²), [N]."""
        return self.init_std * torch.randn(self.num_coordinates, generator=generator)

    def batch(self, instance: Batch, images: Examples | None, generator: torch.Generator) -> Batch:
        """Draws the indices of a minibatch, [B]."""
        return need_examples(images, self).sample_indices(self.batch_size, generator)

    def gather(self, batches: Batch, images: Examples | None) -> Batch:
        """Turns indices [K, B] into the pixels that the network reads, [K, B, inputs], and labels [K, B]."""
        images = need_examples(images, self)
        pixels, labels = images.gather(batches)
        if pixels.ndim > labels.ndim + 1:  # of coloured images
            pixels = pixels.flatten(labels.ndim)
        # Checked here, which runs once an evaluation, and not at all where evaluations are replayed.
        if pixels.shape[-1] != self.num_pixels or images.num_classes not in (None, self.num_classes):
            classes = "" if images.num_classes is None else f" in {images.num_classes} classes"
            raise ValueError(
                f"{type(self).__name__} on {self.dataset!r} takes images of {self.num_pixels} pixels in "
                f"{self.num_classes} classes, and was given {pixels.shape[-1]} pixels{classes} "
                f"({images.source}): pass a split of load_images({self.dataset!r})"
            )
        if self.stride > 1:
            whole = pixels.view(*labels.shape, *DATA_SETS[self.dataset].image_shape)
            pixels = whole[..., :: self.stride, :: self.stride].flatten(labels.ndim)
        return pixels, labels

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes f(θ) of θ [N] on pixels [B, inputs] and labels [B]."""
        pixels, labels = batch
        return self.losses(theta.unsqueeze(0), (pixels.unsqueeze(0), labels.unsqueeze(0))).squeeze(0)

    def losses(self, thetas: Tensor, batches: Batch) -> Tensor:
        """Computes the losses [K] of θ [K, N] at once, by one batched product a layer."""
        pixels, labels = batches
        *_, logits = self._layers(pixels, split_vector(thetas, self.shapes))
        per_image = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return per_image.view_as(labels).mean(-1)

    @torch.no_grad()
    def losses_and_grads(self, thetas: Tensor, batches: Batch) -> tuple[Tensor, Tensor]:
        """Computes the losses [K] and gradients [K, N] of θ [K, N] by backpropagation written out.

        Half of autograd's time would go to its graph.
        """
        pixels, labels = batches
        parameters = split_vector(thetas, self.shapes)
        *inputs, logits = self._layers(pixels, parameters)
        log_p, target = torch.log_softmax(logits, -1), labels.unsqueeze(-1)
        losses = -log_p.gather(-1, target).squeeze(-1).mean(-1)
        delta = log_p.exp().scatter_add_(-1, target, log_p.new_full((), -1.0).expand(target.shape))
        delta /= self.batch_size  # ∂f/∂logits = (p - onehot) / B, [K, B, C]
        grads = torch.empty_like(thetas)
        views = split_vector(grads, self.shapes)
        derivative = ACTIVATIONS[self.activation].derivative
        for layer in reversed(range(len(inputs))):
            z = inputs[layer]
            views[2 * layer].copy_(torch.bmm(z.mT, delta))
            torch.sum(delta, 1, keepdim=True, out=views[2 * layer + 1])
            if layer > 0:
                delta = torch.bmm(delta, parameters[2 * layer].mT) * derivative(z)
        return losses, grads

    def _layers(self, z: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Returns every layer's input z_0, z_1, …, [K, B, units] each, then the logits [K, B, C]."""
        *hidden, (W_out, b_out) = zip(parameters[::2], parameters[1::2], strict=True)
        inputs = [z]
        for W, b in hidden:
            inputs.append(ACTIVATIONS[self.activation].function(torch.baddbmm(b, inputs[-1], W)))
        return [*inputs, torch.baddbmm(b_out, inputs[-1], W_out)]


class MNISTMLP(ImageMLP):
    """`ImageMLP` on "mnist": the paper's network is 784-20-10, with N = 15,910.

    Args:
        hidden_sizes: Units of each hidden layer; [] is a linear classifier.
        activation: "sigmoid", "relu", "tanh" or "elu".
        batch_size: B, images in a minibatch.
        init_std: θ0 ~ N(0, init_std²), weights and biases alike.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> MNISTMLP(hidden_sizes=[20]).num_coordinates
        15910
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (20,),
        activation: Literal["sigmoid", "relu", "tanh", "elu"] = "sigmoid",
        batch_size: int = 128,
        init_std: float = 0.01,
    ) -> None:
        super().__init__("mnist", hidden_sizes, activation, batch_size, init_std)
