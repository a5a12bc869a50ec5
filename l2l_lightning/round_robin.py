"""Taking turns in a shuffled order: an equal share for each, without the noise of independent draws."""

from __future__ import annotations

import functools
import hashlib

import torch


def turn(index: int, count: int, name: str) -> int:
    """Which of `count` is the `index`-th to come: every stretch of `count` turns has each of them once.

    The order of a stretch depends on the name and the stretch alone, so that a run resumed, or a process
    among several, finds the same one.

    Example:
        >>> sorted(turn(index, 3, "horizon") for index in range(3))
        [0, 1, 2]
    """
    stretch, position = divmod(index, count)
    return _order(stretch, count, name)[position]


@functools.lru_cache
def _order(stretch: int, count: int, name: str) -> list[int]:
    digest = hashlib.sha256(f"{name} {stretch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.randperm(count, generator=generator).tolist()
