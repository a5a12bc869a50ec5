"""Layout and time tell features to which tensors coordinates belong, and how many steps came before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_lightning.rules.shards import Cut


class Time(NamedTuple):
    """How far an optimisation has come."""

    step: Tensor
    """t, the number of steps before this one: a scalar in the gradients' dtype, but in float32 at least, on
    their device."""
    total: int | None
    """T, the number of steps that there will be; None if nobody has said."""


@dataclass(frozen=True)
class ParameterInfo:
    """One tensor of an optimizee, or one parameter of an optimizer.

    Args:
        name: As `named_parameters` gives it; "" if it is not known.
        shape: The whole tensor's.
        group: The index of the optimizer's parameter group; 0 along a rollout.
        local_shape: What this process holds of it; None is all of it.
        sum_over_shards: Adds a tensor up over the processes that hold the other shards; the same function for
            tensors that the same processes share.
        cuts: How it was cut into shards, first to last; None if that is not known.
        inputs_first: Whether the first dimension is the inputs', where torch.nn has the outputs'.

    Example:
        >>> ParameterInfo("conv.weight", (20, 1, 5, 5)).rank
        4
    """

    name: str
    shape: tuple[int, ...]
    group: int = 0
    local_shape: tuple[int, ...] | None = None
    sum_over_shards: Callable[[Tensor], Tensor] | None = None
    inputs_first: bool = False
    cuts: tuple[Cut, ...] | None = ()

    @property
    def fans(self) -> tuple[int, int]:
        """Fan-in and fan-out: of a tensor of several dimensions one of them and all others; else (1, 1).

        Example:
            >>> ParameterInfo("conv.weight", (20, 1, 5, 5)).fans
            (25, 20)
        """
        if self.rank < 2 or self.numel == 0:
            return 1, 1
        first, others = self.shape[0], self.numel // self.shape[0]
        return (first, others) if self.inputs_first else (others, first)

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """The number of coordinates of the whole tensor."""
        return torch.Size(self.shape).numel()

    @property
    def shape_here(self) -> tuple[int, ...]:
        """The shape of what this process holds."""
        return self.shape if self.local_shape is None else self.local_shape

    @property
    def numel_here(self) -> int:
        """The number of coordinates that this process holds."""
        return torch.Size(self.shape_here).numel()


@dataclass(frozen=True)
class Layout:
    """Says which of [copies, N] flat coordinates belong to which tensor; each copy has its tensors in order.

    Args:
        tensors: The tensors of one optimizee.
        copies: K optimizees side by side; an optimizer has one.
        num_tensors: Tensors of the whole optimizee, with those that other rules move; None: these are all.

    Example:
        >>> layout = Layout((ParameterInfo("weight", (2, 2)), ParameterInfo("bias", (2,))))
        >>> layout.mean(torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 20.0]))
        tensor([ 2.5000,  2.5000,  2.5000,  2.5000, 15.0000, 15.0000])
    """

    tensors: tuple[ParameterInfo, ...]
    copies: int = 1
    num_tensors: int | None = None

    @property
    def num_coordinates(self) -> int:
        """N, the coordinates of one copy on this process."""
        return sum(tensor.numel_here for tensor in self.tensors)

    def split(self, values: Tensor) -> list[Tensor]:
        """Returns each tensor's part of values [..., copies · N], as a view [..., copies, *shape here]."""
        return [
            part.view(*part.shape[:-1], *tensor.shape_here)
            for part, tensor in zip(self._parts(values), self.tensors, strict=True)
        ]

    def mean(self, values: Tensor) -> Tensor:
        """Replaces values [..., copies · N] by their mean over each tensor of each copy.

        Of a sharded tensor it is the mean over all shards, for which its processes wait for one another: once
        for all tensors that the same processes share.
        """
        parts = self._parts(values)
        totals = [part.sum(-1, keepdim=True) for part in parts]
        shared: dict[Callable[[Tensor], Tensor], list[int]] = {}
        for index, tensor in enumerate(self.tensors):
            if tensor.sum_over_shards is not None:
                shared.setdefault(tensor.sum_over_shards, []).append(index)
        for add_up, chosen in shared.items():
            sums = add_up(torch.cat([totals[index] for index in chosen], -1))
            for index, total in zip(chosen, torch.split(sums, 1, -1), strict=True):
                totals[index] = total
        means = [
            (total / tensor.numel).expand_as(part)
            for part, total, tensor in zip(parts, totals, self.tensors, strict=True)
        ]
        return torch.cat(means, -1).flatten(-2)

    def _parts(self, values: Tensor) -> Sequence[Tensor]:
        whole = values.view(*values.shape[:-1], self.copies, self.num_coordinates)
        return torch.split(whole, [tensor.numel_here for tensor in self.tensors], dim=-1)

    def select(self, chosen: Sequence[int]) -> Layout:
        """Returns the layout of the tensors at these positions."""
        tensors = tuple(self.tensors[index] for index in chosen)
        return Layout(tensors, self.copies, self.num_tensors or len(self.tensors))

    def columns(self, chosen: Sequence[int]) -> Tensor:
        """Returns where the coordinates of these tensors are in a copy, int64 [their number]."""
        parts = torch.split(torch.arange(self.num_coordinates), [t.numel_here for t in self.tensors])
        return torch.cat([parts[index] for index in chosen])
