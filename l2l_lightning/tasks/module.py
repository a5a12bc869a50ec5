"""Any nn.Module with a loss as a task."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from l2l_lightning.checks import check_at_least, check_choice
from l2l_lightning.class_paths import dotted_path, resolve
from l2l_lightning.data.data_sets import DATA_SETS, OWN
from l2l_lightning.data.examples import Examples
from l2l_lightning.data.images import need_examples
from l2l_lightning.rules.layout import ParameterInfo
from l2l_lightning.tasks.base import Batch, Task, WithBuffers, WithSeed, check_scalar
from l2l_lightning.tasks.functional_module import FunctionalModule


class ModuleTask(Task):
    """Trains any nn.Module: f_t(θ) = loss_fn(module_θ(inputs), targets), θ the parameters to be optimised.

    θ [N] is the concatenation of the parameters that require a gradient, in the order of `named_parameters`,
    each in row-major order; a tied one is there once, and frozen ones are constants. A minibatch is (inputs,
    targets): examples of a data set or of the user's own data, drawn with replacement, or what `sample`
    draws. Inputs are a tensor, or a tuple of the module's positional arguments, or a dict of its keyword
    arguments; targets any pytree.

    The module runs K times at once under torch.func.vmap, or one optimizee after the other where vmap cannot
    run its forward (nn.LSTM, `.item()`) or minibatches differ in shape. Random numbers (dropout, a VAE's
    sample) are drawn from a seed that the optimizee's generator gives after every minibatch. Buffers that a
    forward updates (BatchNorm's running statistics) are the optimizee's own, start with θ0 and are updated
    once a step. Held-out examples are then evaluated in eval mode, and leave the buffers as they are.

    Args:
        module: A function without arguments (a class, a lambda) that builds the module, called anew for every
            θ0; or its dotted path; or an nn.Module, of which the submodules' `reset_parameters` then draw θ0,
            and all else starts as it is given. Only what a dotted path names can be rebuilt from a
            checkpoint.
        loss_fn: (output, targets) to a scalar, or its dotted path.
        batch_size: B, examples in a minibatch.
        image_shape: What every input is reshaped to, such as [1, 28, 28]; None leaves it as it is: flat of
            grey images (MNIST's 784 pixels), [3, 32, 32] of CIFAR-10 and SVHN.
        sample: A function of a torch.Generator to (inputs, targets), CPU tensors, which replaces the data
            set; or its dotted path. By a parameter named `split`, if it has one, it is told "train",
            "validation" or "test"; else training, tuning and testing have their examples from it alike.
        init_std: θ0 ~ N(0, init_std²) instead of the module's own initialisation.
        dataset: A name that `load_images` knows, or "own" for the data that MetaData was given; None is the
            latter if it was given any, and else MNIST.

    Raises:
        ValueError: An argument out of its range, a path that cannot be imported, a module that cannot be
            initialised anew or has nothing to optimise, or (when it is called) a minibatch that is not
            (inputs, targets) or a loss that is not scalar.
        TypeError: An argument of the wrong kind, or (when it is called) inputs that the module does not take.

    Example:
        >>> from torch import nn
        >>> def sample(generator):
        ...     x = torch.randn(16, 3, generator=generator)
        ...     return x, x.sum(-1, keepdim=True)
        >>> task = ModuleTask(lambda: nn.Linear(3, 1), nn.functional.mse_loss, sample=sample)
        >>> task.num_coordinates, task.init(torch.Generator().manual_seed(0)).shape
        (4, torch.Size([4]))
    """

    def __init__(
        self,
        # str first: the command line then keeps a path a path, which it can write to a configuration.
        module: str | nn.Module | Callable[[], nn.Module],
        loss_fn: str | Callable[[Tensor, Any], Tensor] = "torch.nn.functional.cross_entropy",
        batch_size: int = 128,
        image_shape: Sequence[int] | None = None,
        sample: str | Callable[[torch.Generator], Batch] | None = None,
        init_std: float | None = None,
        dataset: str | None = None,
    ) -> None:
        check_at_least(1, batch_size=batch_size)
        if init_std is not None:
            check_at_least(0, init_std=init_std)
        if dataset is not None:
            check_choice([*DATA_SETS, OWN], dataset=dataset)
            if sample is not None:
                raise ValueError("dataset is what `sample` replaces: give one of the two")
        if image_shape is not None:
            if sample is not None:
                raise ValueError("image_shape is for the images that `sample` replaces: reshape in `sample`")
            if dataset in DATA_SETS:
                _check_image_shape(image_shape, DATA_SETS[dataset].num_pixels, dataset)
        self.module = resolve(module, "module")
        self.loss_fn = resolve(loss_fn, "loss_fn")
        self.batch_size = batch_size
        self.image_shape = None if image_shape is None else list(image_shape)
        self.sample = None if sample is None else resolve(sample, "sample")
        self.init_std = init_std
        self.dataset = None if sample is not None else dataset or "mnist"
        self.accepts_own_data = sample is None and dataset is None
        self._sample_takes_split = self.sample is not None and _takes_split(self.sample)
        self._split = "train"
        self._on_splits = {self._split: self}

        self.network = FunctionalModule(self.module)
        self.num_coordinates = self.network.num_coordinates
        self.init(torch.Generator())  # fails now rather than at the first rollout

    @property
    def tensors(self) -> tuple[ParameterInfo, ...]:
        """The parameters that θ consists of, by their names."""
        return tuple(ParameterInfo(name, tuple(shape)) for name, shape in self.network.shapes.items())

    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0, [N]: by the module's own initialisation, or from N(0, init_std²)."""
        return self.begin(generator)[0]

    def begin(self, generator: torch.Generator) -> tuple[Tensor, Batch]:
        """Draws θ0, and the frozen parameters and buffers, by name, that the module's build draws with it."""
        if self.init_std is None:
            theta, drawn = self.network.draw(generator)
        else:
            theta = self.init_std * torch.randn(self.num_coordinates, generator=generator)
            drawn = self.network.draw(generator)[1] if self.network.drawn else {}
        return theta, drawn or ()

    def buffers(self, instance: Batch, images: Examples | None, device: torch.device) -> dict[str, Tensor]:
        """Returns the buffers that a forward updates, and the constants that are the optimizee's own."""
        self._observe(images, device)
        return self.network.own(instance or {})

    def _observe(self, images: Examples | None, device: torch.device) -> None:
        """Tries the loss once, to find out what a forward updates and whether it draws random numbers."""
        if self.network.behaviour is not None or (self.dataset is not None and images is None):
            return
        # Outside of inference mode, whose tensors do not say whether they were changed.
        with torch.inference_mode(False):
            generator = torch.Generator().manual_seed(0)  # no optimizee's
            theta = self.init(generator).to(device)
            drawn = self._minibatch(images, generator)
            beside = device if images is None else images.device
            stacked = tree_map_only(Tensor, lambda leaf: leaf[None].to(beside), drawn)
            gathered = tree_map_only(Tensor, lambda leaf: leaf[0].to(device), self.gather(stacked, images))
            batch = tree_map_only(
                Tensor, lambda leaf: leaf.to(theta.dtype) if leaf.is_floating_point() else leaf, gathered
            )
            self.network.observe(lambda own: self._loss(theta, batch, own), theta)

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Within this context a module that draws random numbers or updates buffers is in eval mode."""
        if not self.network.is_another_in_evaluation:
            yield
            return
        self._mode = " in eval mode"
        try:
            with self.network.evaluation_mode():
                yield
        finally:
            self._mode = ""

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values: the data set as it was given."""
        return super().config() | {"dataset": None if self.accepts_own_data else self.dataset}

    @property
    def data_source(self) -> str | None:  # type: ignore[override]
        """What `sample` is, and whether training and testing differ by it; None without one."""
        if self.sample is None:
            return None
        of = "each split its own" if self._sample_takes_split else "for training and test alike"
        return f"generated by {dotted_path(self.sample)}, {of}"

    def on_split(self, split: str) -> ModuleTask:
        """Returns the task whose `sample` is told the split; itself if `sample` is not told any."""
        if not self._sample_takes_split:
            return self
        # Kept: what is known of a task (a recorded graph, whether vmap can run it) is known of this object.
        if split not in self._on_splits:
            self._on_splits[split] = copy.copy(self)
            self._on_splits[split]._split = split
        return self._on_splits[split]

    def batch(self, instance: Batch, images: Examples | None, generator: torch.Generator) -> Batch:
        """Draws the indices of a minibatch of examples, [B], or calls `sample`; then a random module's seed.

        The seed is torch.randint(2**62, ()).
        """
        if self.network.behaviour is None:
            self._observe(images, torch.device("cpu") if images is None else images.device)
        minibatch = self._minibatch(images, generator)
        if not self.network.random:
            return minibatch
        return WithSeed(minibatch, torch.randint(2**62, (), generator=generator))

    def _minibatch(self, images: Examples | None, generator: torch.Generator) -> Batch:
        if self.sample is not None:
            told = {"split": self._split} if self._sample_takes_split else {}
            return self.sample(generator, **told)
        return need_examples(images, self).sample_indices(self.batch_size, generator)

    def gather(self, batches: Batch, images: Examples | None) -> Batch:
        """Turns indices [K, B] into inputs [K, B, …] and targets [K, B, …]; `sample`'s stay."""
        if isinstance(batches, WithSeed):
            return batches._replace(batch=self.gather(batches.batch, images))
        if self.sample is not None:
            return batches
        examples = need_examples(images, self)
        inputs, targets = examples.gather(batches)
        if self.image_shape is None:
            return inputs, targets
        if not isinstance(inputs, Tensor):
            raise ValueError(
                f"image_shape is for inputs that are one tensor each, unlike those of {examples.source}"
            )
        numbers = math.prod(inputs.shape[batches.ndim :])
        _check_image_shape(self.image_shape, numbers, examples.source)
        return inputs.reshape(*batches.shape, *self.image_shape), targets

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Computes loss_fn(module_θ(inputs), targets) of θ [N] and a batch (inputs, targets)."""
        batch, own = batch if isinstance(batch, WithBuffers) else (batch, None)
        if not isinstance(batch, WithSeed):
            return self._loss(theta, batch, own)
        try:
            seed = int(batch.seed)
        except RuntimeError as error:  # under vmap
            raise RuntimeError("each draws random numbers of its own") from error
        with self.network.seeded(seed, theta.device):
            return self._loss(theta, batch.batch, own)

    def _loss(self, theta: Tensor, batch: Batch, own: Mapping[str, Tensor] | None) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            kind = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
            raise ValueError(
                f"a minibatch must be (inputs, targets), got {kind}: several inputs are a tuple or a dict, "
                "such as ((x, y), targets)"
            )
        inputs, targets = batch
        value: Tensor = self.loss_fn(self.network(theta, inputs, own), targets)
        check_scalar(value, f"loss_fn = {dotted_path(self.loss_fn)}")
        return value


def _takes_split(sample: Callable[..., Batch]) -> bool:
    """Whether `sample` wants to know the split: it has a parameter of that name."""
    try:
        signature = inspect.signature(sample)
    except (TypeError, ValueError):  # of a built-in, which has none
        return False
    told = {"split": "train"} if "split" in signature.parameters else {}
    try:
        signature.bind(None, **told)
    except TypeError as error:
        raise TypeError(
            f"sample = {dotted_path(sample)} must be a function of (generator), or of (generator, split): "
            f"{error}"
        ) from error
    return bool(told)


def _check_image_shape(image_shape: Sequence[int], numbers: int, source: str) -> None:
    if math.prod(image_shape) != numbers:
        raise ValueError(f"image_shape must hold {numbers} pixels, got {list(image_shape)} ({source})")
