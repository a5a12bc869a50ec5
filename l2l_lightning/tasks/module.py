"""Any nn.Module with a loss as a task."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import UninitializedParameter

from l2l_lightning.checks import check_at_least, check_choice
from l2l_lightning.class_paths import dotted_path, resolve
from l2l_lightning.data.data_sets import DATA_SETS, OWN
from l2l_lightning.data.examples import Examples
from l2l_lightning.data.images import need_examples
from l2l_lightning.rules.layout import ParameterInfo
from l2l_lightning.tasks.base import Batch, Task, check_scalar, split_vector


class ModuleTask(Task):
    """Trains any nn.Module: f_t(θ) = loss_fn(module_θ(inputs), targets), θ all the module's parameters.

    θ [N] is the concatenation of the parameters in the order of `named_parameters`, each in row-major order.
    A minibatch is (inputs, targets): examples of a data set or of the user's own data, of any shape, drawn
    with replacement; or what `sample` draws.
    The module runs K times at once under torch.func.vmap, or one optimizee after the other where vmap cannot
    run its forward (nn.LSTM, `.item()`). What it computes must depend on θ and the minibatch alone: dropout,
    running statistics and other buffers that a forward updates are refused.

    Args:
        module: A function without arguments (a class, a lambda) that builds the module, called anew for every
            θ0; or its dotted path; or an nn.Module, whose submodules' `reset_parameters` then draw θ0. Only
            what a dotted path names can be rebuilt from a checkpoint.
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
            initialised anew or keeps more than θ, or (when it is called) a loss that is not scalar or a
            forward that updates a buffer.
        TypeError: An argument of the wrong kind.

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

        self.skeleton = self._build()  # θ replaces its parameters at every call
        _check_stateless(self.skeleton)
        self._constants: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        self.shapes = {name: parameter.shape for name, parameter in self.skeleton.named_parameters()}
        self.num_coordinates = sum(shape.numel() for shape in self.shapes.values())
        if self.num_coordinates == 0:
            raise ValueError("module has no parameters to optimise")
        self.init(torch.Generator())  # fails now rather than at the first rollout

    @property
    def tensors(self) -> tuple[ParameterInfo, ...]:
        """The module's parameters, which θ consists of, by their names."""
        return tuple(ParameterInfo(name, tuple(shape)) for name, shape in self.shapes.items())

    def _build(self) -> nn.Module:
        if isinstance(self.module, nn.Module):
            return copy.deepcopy(self.module)
        try:
            module = self.module()
        except TypeError as error:
            raise TypeError(
                f"module = {dotted_path(self.module)} cannot be called without arguments ({error}): "
                "pass a function that builds the module, such as lambda: nn.Linear(784, 10)"
            ) from error
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must build an nn.Module, got {type(module).__name__}")
        return module

    def init(self, generator: torch.Generator) -> Tensor:
        """Draws θ0, [N]: by the module's own initialisation, or from N(0, init_std²)."""
        if self.init_std is not None:
            return self.init_std * torch.randn(self.num_coordinates, generator=generator)
        # Modules draw from torch's global stream: seed it from the optimizee's, and put it back.
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = self._build()
            if isinstance(self.module, nn.Module):
                _reset_parameters(module)
        return torch.cat([p.detach().flatten().float().cpu() for p in module.parameters()])

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
        """Draws the indices of a minibatch of examples, [B], or calls `sample`."""
        if self.sample is not None:
            told = {"split": self._split} if self._sample_takes_split else {}
            return self.sample(generator, **told)
        return need_examples(images, self).sample_indices(self.batch_size, generator)

    def gather(self, batches: Batch, images: Examples | None) -> Batch:
        """Turns indices [K, B] into inputs [K, B, …] and targets [K, B, …]; `sample`'s stay."""
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
        inputs, targets = batch
        parameters = dict(zip(self.shapes, split_vector(theta, list(self.shapes.values())), strict=True))
        constants = self._constants_as(theta)
        versions = {name: constant._version for name, constant in constants.items()}
        output = functional_call(self.skeleton, parameters | constants, (inputs,))
        if updated := [name for name, constant in constants.items() if constant._version != versions[name]]:
            raise ValueError(
                f"module = {dotted_path(self.module)} updates {', '.join(updated)} at every call, "
                "which θ does not hold: pass a module that does not, such as one in eval mode"
            )
        value: Tensor = self.loss_fn(output, targets)
        check_scalar(value, f"loss_fn = {dotted_path(self.loss_fn)}")
        return value

    def _constants_as(self, theta: Tensor) -> dict[str, Tensor]:
        """Returns the module's buffers in θ's dtype on its device; kept, as the host waits for a transfer."""
        key = (theta.device, theta.dtype)
        if key not in self._constants:
            with torch.inference_mode(False):  # a validation's would not do for a fit
                self._constants[key] = {
                    name: buffer.to(theta.device, theta.dtype if buffer.is_floating_point() else buffer.dtype)
                    for name, buffer in self.skeleton.named_buffers()
                }
        return self._constants[key]


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


def _reset_parameters(module: nn.Module) -> None:
    """Draws a module's parameters anew, children first: a parent may overrule what they draw."""
    for name, part in reversed(list(module.named_modules())):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
        elif next(part.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"{name or 'module'} ({type(part).__name__}) has parameters and no reset_parameters to draw "
                "them anew: pass a function that builds the module, or init_std"
            )


def _check_stateless(module: nn.Module) -> None:
    """Refuses what would make f_t depend on more than θ and the minibatch."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name} has no shape before the module's first call: build the module with its sizes, such "
                "as nn.Linear for nn.LazyLinear"
            )
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and part.training and part.running_mean is not None:
            raise ValueError(
                f"{name or 'module'} ({type(part).__name__}) updates running statistics at every call, which "
                "θ does not hold: build it with track_running_stats=False (it then uses the minibatch's)"
            )
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            raise ValueError(
                f"{name or 'module'} ({type(part).__name__}) draws from a stream that is not the "
                "optimizee's, so that its losses would not repeat: remove it or set p=0"
            )
