"""Whole tensors are put together from the shards of several processes, and cut into them again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """A cut of a tensor, or of what earlier cuts have left of it, into a shard for each process of a group.

    As `torch.chunk` does it, but that shards at the end may have no rows: 5 rows are 2, 2, 1 and 0 of them.

    Args:
        dim: Along which dimension.
        size: Its length before the cut.
        shards: Into how many.
        index: Which of them this process holds: its rank in the group.
        group: The `ProcessGroup` that holds all of them.

    Example:
        >>> [Cut(dim=0, size=5, shards=4, index=0, group=None).length(index) for index in range(4)]
        [2, 2, 1, 0]
    """

    dim: int
    size: int
    shards: int
    index: int
    group: Any

    def start(self, index: int) -> int:
        """Returns where a shard begins."""
        return min(index * math.ceil(self.size / self.shards), self.size)

    def length(self, index: int) -> int:
        """Returns the length of a shard along the dimension."""
        return self.start(index + 1) - self.start(index)


def shard_of(whole: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """Returns this process's shard of a whole tensor, as a view."""
    for cut in cuts:
        whole = whole.narrow(cut.dim, cut.start(cut.index), cut.length(cut.index))
    return whole


def gathered(shards: Sequence[Tensor], cuts: Sequence[Sequence[Cut]]) -> list[Tensor]:
    """Returns the whole tensors of which this process holds these shards, by one collective for each group.

    Every process must call it with its shards of the same tensors, in the same order.

    Args:
        shards: What this process holds of each tensor, all of one dtype and on one device.
        cuts: How each was cut, first to last; () where the shard is the whole tensor.
    """
    tensors, left = list(shards), [list(some) for some in cuts]
    while any(left):
        group = next(some[-1].group for some in left if some)
        chosen = [i for i, some in enumerate(left) if some and some[-1].group == group]
        joined = _joined([tensors[i] for i in chosen], [left[i].pop() for i in chosen])
        for i, tensor in zip(chosen, joined, strict=True):
            tensors[i] = tensor
    return tensors


def _joined(shards: list[Tensor], cuts: list[Cut]) -> list[Tensor]:
    """Returns what the shards of each tensor's last cut make together; all cuts are of one group."""
    shapes = [  # of every process's shards
        [
            (*shard.shape[: cut.dim], cut.length(index), *shard.shape[cut.dim + 1 :])
            for shard, cut in zip(shards, cuts, strict=True)
        ]
        for index in range(cuts[0].shards)
    ]
    sizes = [[math.prod(shape) for shape in some] for some in shapes]
    # As long as the longest, as a collective's parts are of one length.
    sent = shards[0].new_zeros(max(sum(some) for some in sizes))
    torch.cat([shard.reshape(-1) for shard in shards], out=sent[: sum(shard.numel() for shard in shards)])
    received = [torch.empty_like(sent) for _ in sizes]
    torch.distributed.all_gather(received, sent, group=cuts[0].group)
    parts = [
        [part.view(shape) for part, shape in zip(torch.split(row[: sum(size)], size), some, strict=True)]
        for row, size, some in zip(received, sizes, shapes, strict=True)
    ]
    return [torch.cat(some, cut.dim) for some, cut in zip(zip(*parts, strict=True), cuts, strict=True)]
