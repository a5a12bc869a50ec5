"""The memory that windows of rollouts reuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2l_lightning.rollout.cuda_graphs import CAPACITY, GraphCache, Recorder


class Workspace:
    """Named buffers and recorded CUDA graphs that are reused from window to window.

    A window's history is hundreds of MiB: to hand it back to the system and fault it in again would cost as
    much as computing it. A copy of a workspace, pickled or deep, is an empty one.

    Args:
        recorder: The recorder of graphs; None is torch.cuda's.
        num_tasks: Graphs are kept for so many tasks, such as the members of a mixture.
    """

    def __init__(self, recorder: Recorder | None = None, num_tasks: int = 1) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._others: dict[int, Workspace] = {}
        self.num_tasks = num_tasks
        self.graphs = GraphCache(recorder, CAPACITY * num_tasks)

    def __reduce__(self) -> tuple[Any, ...]:
        return Workspace, (None, self.num_tasks)

    def of_part(self, index: int) -> Workspace:
        """Returns the workspace of a rollout's index-th part; the first part has this one."""
        return self if index == 0 else self._others.setdefault(index, Workspace())

    def empty(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Returns the named buffer in a shape, as `like` in dtype and device; its contents are arbitrary."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.numel() < size
            or (buffer.dtype, buffer.device) != (like.dtype, like.device)
        ):
            # Not of inference mode, even if a validation is the first to ask: others will write into it.
            with torch.inference_mode(False):
                buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(*shape)
