"""Minibatches that differ in shape, and so cannot be stacked: of variable lengths, or a last smaller one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from l2l_lightning.tasks.base import Batch, Separate, Task


@dataclass(frozen=True)
class Uneven:
    """The minibatches of evaluations that differ in shape, on the device."""

    evaluations: list[Batch]
    """One per evaluation: [K, …], or Separate where those of K optimizees differ, too."""


def select(batches: Batch, chosen: Tensor) -> Batch:
    """Returns one evaluation's minibatches of some of the K optimizees."""
    if isinstance(batches, Separate):
        return Separate(batches[k] for k in chosen.tolist())
    return tree_map(lambda leaf: leaf[chosen.to(leaf.device)], batches)


def check_batches(task: Task, batches: Sequence[Batch]) -> bool:
    """Checks minibatches that could not be stacked; whether they have the same shapes.

    Raises:
        TypeError: One holds something else than tensors.
        ValueError: Two differ in structure.
    """
    shapes, first = set(), tree_flatten(batches[0])[1]
    for batch in batches:
        leaves, structure = tree_flatten(batch)
        if other := [leaf for leaf in leaves if not isinstance(leaf, Tensor)]:
            raise TypeError(
                f"a minibatch of {task.describe()} must hold tensors, in tuples, lists and dicts, and holds "
                f"{type(other[0]).__name__}: packed sequences, for one, are padded ones and their lengths"
            )
        if structure != first:
            raise ValueError(
                f"two minibatches of {task.describe()} differ in structure: {first} and {structure}"
            )
        shapes.add(tuple(leaf.shape for leaf in leaves))
    return len(shapes) == 1
