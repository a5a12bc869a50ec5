"""These functions give the shard of a parameter that this process holds, and shard its state alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2l_lightning.rules.shards import Cut


def local(tensor: Tensor) -> Tensor:
    """Returns what this process holds of a tensor: all of it, or a DTensor's shard.

    By the method's name, as importing the class takes long, and not every PyTorch has it.
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_gradient(parameter: Any) -> Tensor:
    """Returns what this process holds of a parameter's gradient, sharded as the parameter is."""
    gradient = parameter.grad
    if hasattr(parameter, "placements") and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return local(gradient)


def is_zero(gradient: Any) -> bool:
    """Returns whether a whole gradient is 0; for a DTensor, every process gets the same answer."""
    count = (gradient != 0).sum()
    return not (count.full_tensor() if hasattr(count, "full_tensor") else count)


def like(parameter: Any, state: Tensor) -> Tensor:
    """Wraps a parameter's local state [*state_shape, *local shape] as a DTensor if the parameter is one."""
    if not hasattr(parameter, "device_mesh"):
        return state
    from torch.distributed.tensor import DTensor, Placement, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    leading = state.ndim - parameter.ndim

    def shifted(placement: Placement) -> Placement:
        if isinstance(placement, _StridedShard):
            return _StridedShard(placement.dim + leading, split_factor=placement.split_factor)
        if isinstance(placement, Shard):
            return Shard(placement.dim + leading)
        return placement

    shape = torch.Size([*state.shape[:leading], *parameter.shape])
    stride = torch.empty(shape, device="meta").stride()
    placements = [shifted(placement) for placement in parameter.placements]
    # A DTensor takes over its local tensor's storage offset and can then not be copied (copy.deepcopy).
    storage = state.new_empty(state.shape)
    sharded = DTensor.from_local(
        storage, parameter.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    sharded._local_tensor = state
    return sharded


def cuts(parameter: Any) -> tuple[Cut, ...] | None:
    """Returns how a parameter was cut into shards, first to last, or None if that is not known."""
    if not hasattr(parameter, "device_mesh"):
        return ()
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = parameter.device_mesh
    placements: list[tuple[int, Any]] = list(enumerate(parameter.placements))
    if not all(isinstance(kind, Replicate | Shard | _StridedShard) for _, kind in placements):
        return None
    strided = [place for place in placements if isinstance(place[1], _StridedShard)]
    plain = [place for place in placements if isinstance(place[1], Shard) and place not in strided]
    made: list[Cut] = []
    sizes, counts = list(parameter.shape), [1] * parameter.ndim
    # A strided one, FSDP's on top of tensor parallelism, was made after those to its right.
    for axis, kind in [*plain, *reversed(strided)]:
        if isinstance(kind, _StridedShard) and kind.split_factor != counts[kind.dim]:
            return None
        cut = Cut(kind.dim, sizes[kind.dim], mesh.size(axis), mesh.get_local_rank(axis), mesh.get_group(axis))
        counts[kind.dim] *= cut.shards
        sizes[kind.dim] = cut.length(cut.index)
        if cut.shards > 1:
            made.append(cut)
    return tuple(made) if tuple(sizes) == tuple(local(parameter).shape) else None


def sum_over_shards(parameter: Any) -> Callable[[Tensor], Tensor] | None:
    """Returns a function that sums a tensor over the processes that hold a parameter's shards, or None.

    Every process of the mesh must call it, in the same order. Parameters that are sharded over the same
    dimensions of one mesh have the same function.
    """
    if not hasattr(parameter, "device_mesh"):
        return None
    from torch.distributed.tensor import Replicate

    mesh = parameter.device_mesh
    sharded = [axis for axis, kind in enumerate(parameter.placements) if not isinstance(kind, Replicate)]
    return _Sum(tuple(mesh.get_group(axis) for axis in sharded)) if sharded else None


@dataclass(frozen=True)
class _Sum:
    """Adds a tensor up over one process group after the other."""

    groups: tuple[Any, ...]

    def __call__(self, values: Tensor) -> Tensor:
        total = values.clone()
        for group in self.groups:
            torch.distributed.all_reduce(total, group=group)
        return total
