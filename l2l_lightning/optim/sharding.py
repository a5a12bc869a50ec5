"""These functions give the shard of a parameter that this process holds, and shard its state alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


def sum_over_shards(parameter: Any) -> Callable[[Tensor], Tensor] | None:
    """Returns a function that sums a tensor over the processes that hold a parameter's shards, or None.

    Every process of the mesh must call it, in the same order.
    """
    if not hasattr(parameter, "device_mesh"):
        return None
    from torch.distributed.tensor import Replicate

    mesh = parameter.device_mesh
    sharded = [dim for dim, kind in enumerate(parameter.placements) if not isinstance(kind, Replicate)]
    return _add_up_over(mesh, tuple(sharded)) if sharded else None


@functools.cache  # so that parameters which are sharded alike have the same, and can share one message
def _add_up_over(mesh: Any, dims: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def add_up(values: Tensor) -> Tensor:
        total = values.clone()
        for dim in dims:
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
        return total

    return add_up
