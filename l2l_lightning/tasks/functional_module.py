"""Any nn.Module as a function of a vector θ, of what an optimizee has of its own, and of its inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from l2l_lightning.class_paths import dotted_path
from l2l_lightning.tasks.random_streams import OtherStreams, TorchStreams, seeded


class Behaviour(NamedTuple):
    """What a module's calls do besides computing an output."""

    updated: frozenset[str] = frozenset()
    """Names of the frozen parameters and buffers that they update."""
    random: bool = False
    """Whether they draw random numbers from a global stream."""
    random_elsewhere: bool = False
    """Whether they draw some from Python's or NumPy's."""

    def joined(self, other: Behaviour) -> Behaviour:
        """Returns what either of two calls does."""
        return Behaviour(
            self.updated | other.updated,
            self.random or other.random,
            self.random_elsewhere or other.random_elsewhere,
        )


class FunctionalModule:
    """A module as a function of θ and its inputs, and of those of its tensors that are an optimizee's own.

    θ [N] is the concatenation of the parameters that require a gradient, in the order of `named_parameters`,
    each in row-major order; a parameter of several names is one. The others, frozen, and the buffers are
    constants. All optimizees share a constant, but for those that

    - every build draws anew (`drawn`), such as a frozen random projection, or
    - a forward updates (`updated`), such as BatchNorm's running statistics:

    of these every optimizee has its own.

    Args:
        module: A function without arguments that builds the module, or an nn.Module, of which θ0 alone is
            drawn anew.

    Raises:
        ValueError: There is no parameter to optimise, or one without a shape, or a module that exchanges
            statistics between processes.
        TypeError: What builds a module takes arguments, or does not build one.
    """

    def __init__(self, module: nn.Module | Callable[[], nn.Module]) -> None:
        self.module = module
        self.skeleton = self._build()  # θ and constants replace its tensors at every call
        _check(self.skeleton)
        self.shapes = {name: p.shape for name, p in self.skeleton.named_parameters() if p.requires_grad}
        self._sizes = [shape.numel() for shape in self.shapes.values()]
        self.num_coordinates = sum(self._sizes)
        if self.num_coordinates == 0:
            raise ValueError("module has no parameters to optimise, which require a gradient")
        self.behaviour: Behaviour | None = None
        """What calls do, once `observe` has found out."""
        self.drawn: set[str] = set()
        """Names of the constants that every build draws anew."""
        self._moved: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        self._binds: dict[Any, bool] = {}
        if _constants(self.skeleton) and not isinstance(module, nn.Module):
            self.draw(torch.Generator())

    @property
    def name(self) -> str:
        """What messages call the module."""
        return f"module = {dotted_path(self.module)}"

    @property
    def random(self) -> bool:
        """Whether calls draw random numbers, as far as has been observed."""
        return self.behaviour is not None and self.behaviour.random

    @property
    def is_another_in_evaluation(self) -> bool:
        """Whether held-out examples are for eval mode, as of a module that is random or updates buffers."""
        return self.behaviour is not None and bool(self.behaviour.random or self.behaviour.updated)

    def _build(self) -> nn.Module:
        if isinstance(self.module, nn.Module):
            return copy.deepcopy(self.module)
        try:
            module = self.module()
        except TypeError as error:
            raise TypeError(
                f"{self.name} cannot be called without arguments ({error}): "
                "pass a function that builds the module, such as lambda: nn.Linear(784, 10)"
            ) from error
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must build an nn.Module, got {type(module).__name__}")
        return module

    def draw(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Builds the module anew, from a seed of the generator's: θ0 [N], and the constants that it drew.

        The seed is torch.randint(2**62, ()). Of an nn.Module the submodules' `reset_parameters` draw θ0.
        """
        seed = int(torch.randint(2**62, (), generator=generator))
        # Modules draw from the global streams.
        with seeded(seed, torch.device("cpu")):
            module = self._build()
            if isinstance(self.module, nn.Module):
                _reset_parameters(module)
        theta = torch.cat(
            [p.detach().flatten().float().cpu() for p in module.parameters() if p.requires_grad]
        )
        if isinstance(self.module, nn.Module):
            return theta, {}
        found, shared = _constants(module), _constants(self.skeleton)
        self.drawn |= {name for name in shared if not _same(found[name].cpu(), shared[name].cpu())}
        return theta, {name: found[name].cpu() for name in shared if name in self.drawn}

    def own(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns an optimizee's own tensors at θ0, by name, on the CPU: those drawn, and those updated."""
        updated = self.behaviour.updated if self.behaviour else frozenset()
        return {
            name: drawn[name] if name in drawn else value.cpu()
            for name, value in _constants(self.skeleton).items()
            if name in self.drawn or name in updated
        }

    def __call__(self, theta: Tensor, inputs: Any, own: Mapping[str, Tensor] | None = None) -> Any:
        """Returns the module's output.

        Args:
            theta: θ, [N].
            inputs: Its argument; or a tuple of its positional arguments, a dict of its keyword arguments.
            own: The optimizee's own tensors, which are updated in place; None are those of the first module,
                which stay as they are.

        Raises:
            ValueError: A forward updates what the first ones did not, or changes a buffer's shape.
            TypeError: The module does not take such inputs.
        """
        constants = self._constants_as(theta)
        if own is None:
            changing = self.behaviour.updated if self.behaviour else constants
            own = {name: constants[name].clone() for name in changing}
        shared = {name: value for name, value in constants.items() if name not in own} if own else constants
        versions = {name: value._version for name, value in shared.items()}
        parts = zip(self.shapes.items(), torch.split(theta, self._sizes), strict=True)
        values = {**{name: part.view(shape) for (name, shape), part in parts}, **shared, **own}
        arguments, options = self._arguments(inputs)
        output = functional_call(self.skeleton, values, arguments, options)
        for name, value in own.items():
            if values[name] is not value:  # the forward has put another tensor in its place
                if values[name].shape != value.shape:
                    raise ValueError(f"{self.name} changes the shape of {name}, which must stay as it is")
                value.copy_(values[name].detach())
        if changed := [n for n, v in shared.items() if values[n] is not v or v._version != versions[n]]:
            raise ValueError(
                f"{self.name} updates {', '.join(changed)}, which its first call left alone: what a forward "
                "updates, it must update from the first one on"
            )
        return output

    def _arguments(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the positional and the keyword arguments that inputs are."""
        if type(inputs) is tuple:
            if self._takes(len(inputs)):
                return inputs, {}
        elif type(inputs) is dict:
            if self._takes(0, *inputs):
                return (), inputs
        else:
            return (inputs,), {}
        if self._takes(1):
            return (inputs,), {}
        taken = inspect.signature(self.skeleton.forward)
        given = f"{len(inputs)} inputs" if isinstance(inputs, tuple) else f"inputs {', '.join(inputs)}"
        raise TypeError(
            f"{self.name} takes {taken} and is given {given}: a tuple holds its positional arguments, a dict "
            "its keyword arguments"
        )

    def _takes(self, positional: int, *keywords: str) -> bool:
        """Whether the module's forward can be called with so many positional and these keyword arguments."""
        key = positional, keywords
        if key not in self._binds:
            try:
                inspect.signature(self.skeleton.forward).bind(*range(positional), **dict.fromkeys(keywords))
            except TypeError:
                self._binds[key] = False
            else:
                self._binds[key] = True
        return self._binds[key]

    def _constants_as(self, theta: Tensor) -> dict[str, Tensor]:
        """Returns the constants in θ's dtype on its device; kept, as the host waits for a transfer."""
        key = (theta.device, theta.dtype)
        if key not in self._moved:
            with torch.inference_mode(False):  # a validation's would not do for a fit
                self._moved[key] = {
                    name: value.to(theta.device, theta.dtype if value.is_floating_point() else value.dtype)
                    for name, value in _constants(self.skeleton).items()
                }
        return self._moved[key]

    def observe(self, run: Callable[[Mapping[str, Tensor]], object], theta: Tensor) -> None:
        """Finds out what calls update, and whether they draw random numbers, by one call of another build.

        Args:
            run: Evaluates a loss of the module with `own` tensors, by calling this object.
            theta: θ, [N], on the device that it runs on.

        Raises:
            ValueError: A forward adds a buffer.
        """
        constants, kept = self._constants_as(theta), self.skeleton
        with seeded(0, torch.device("cpu")):
            self.skeleton = self._build()  # a call may leave more behind than buffers
        try:
            found = self._observed(run, constants, theta.device)
            if found.random or found.updated:  # else it is never called in eval mode
                with self.evaluation_mode():
                    found = found.joined(self._observed(run, constants, theta.device))
            added = sorted(_constants(self.skeleton).keys() - constants.keys())
        finally:
            self.skeleton = kept
        if added:
            raise ValueError(
                f"{self.name} makes {', '.join(added)} at its first call: register buffers with their first "
                "values, so that every optimizee can have its own"
            )
        self.behaviour = found

    def _observed(
        self,
        run: Callable[[Mapping[str, Tensor]], object],
        constants: Mapping[str, Tensor],
        device: torch.device,
    ) -> Behaviour:
        own = {name: value.clone() for name, value in constants.items()}
        versions = {name: value._version for name, value in own.items()}
        with seeded(0, device), torch.enable_grad():
            of_torch, others = TorchStreams(device), OtherStreams()
            run(own)
            draws, draws_elsewhere = of_torch.moved(), others.moved()
        updated = {
            name
            for name, value in own.items()
            if value._version != versions[name] or not _same(value, constants[name])
        }
        updated |= set(_running_statistics(self.skeleton))
        return Behaviour(frozenset(updated), draws or draws_elsewhere, draws_elsewhere)

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Within this context the module is in eval mode."""
        training = [part for part in self.skeleton.modules() if part.training]
        self.skeleton.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True

    @contextmanager
    def seeded(self, seed: int, device: torch.device) -> Iterator[None]:
        """Within this context a seed determines the random numbers of a call."""
        torch_alone = self.behaviour is not None and not self.behaviour.random_elsewhere
        with seeded(seed, device, torch_alone), self._without_cudnn(device):
            yield

    def _without_cudnn(self, device: torch.device) -> AbstractContextManager[Any]:
        recurrent = (part for part in self.skeleton.modules() if isinstance(part, nn.RNNBase))
        if device.type == "cuda" and any(part.dropout > 0 for part in recurrent):
            # cuDNN's recurrent dropout has a stream of its own, which runs on from call to call.
            return torch.backends.cudnn.flags(enabled=False)
        return nullcontext()


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's frozen parameters and buffers by name."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return frozen | {name: buffer.detach() for name, buffer in module.named_buffers()}


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors hold the same; sparse ones are not looked into."""
    return ours.layout != torch.strided or torch.equal(ours, theirs)


def _running_statistics(module: nn.Module) -> Iterator[str]:
    """The names of normalisations' running statistics: they are updated, whatever their values."""
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and part.training and part.track_running_stats:
            yield from (f"{name}.{own}".lstrip(".") for own, _ in part.named_buffers(recurse=False))


def _reset_parameters(module: nn.Module) -> None:
    """Draws a module's parameters anew, children first: a parent may overrule what they draw.

    A part whose own parameters are all frozen stays as it is.
    """
    for name, part in reversed(list(module.named_modules())):
        parameters = list(part.parameters(recurse=False))
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            continue
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
        elif parameters:
            raise ValueError(
                f"{name or 'module'} ({type(part).__name__}) has parameters and no reset_parameters to draw "
                "them anew: pass a function that builds the module, or init_std"
            )


def _check(module: nn.Module) -> None:
    """Refuses what has no shape yet, and what is no function of one optimizee."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"{name} has no shape before the module's first call: build the module with its sizes, such "
                "as nn.Linear for nn.LazyLinear"
            )
    for name, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm):
            raise ValueError(
                f"{name or 'module'} (SyncBatchNorm) would mix the optimizees of several processes: use "
                "BatchNorm"
            )
