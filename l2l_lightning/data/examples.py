"""Pairs of inputs and targets, of any shape, that minibatches are drawn from by index."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from l2l_lightning.errors import DataError

Tree = Any
"""A tensor, or nested tuples, lists and dicts of tensors."""


class Examples(ABC):
    """M examples, pairs of an input and a target, each of one shape.

    A minibatch's indices are drawn from an optimizee's generator, on the CPU; `gather` turns them into
    inputs and targets, on the examples' device. The same indices give the same numbers wherever the examples
    are kept.
    """

    source: str
    """Where they came from, for the record: "MNIST at ROOT (…)", "own data: TensorDataset (…)"."""

    num_classes: int | None
    """C, where targets are classes 0 to C - 1 (of text, symbols); None where that is not known."""

    @abstractmethod
    def __len__(self) -> int:
        """M."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where `gather` takes indices, and gives minibatches."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory that they take on a device which they can be moved to, in bytes."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Examples:
        """Returns the same examples on another device, or themselves if they stay where they are."""

    @abstractmethod
    def gather(self, indices: Tensor) -> tuple[Tree, Tree]:
        """Returns the inputs and targets [*indices.shape, …] of the examples at indices on their device."""

    def select(self, indices: Tensor, source: str | None = None) -> Examples:
        """Returns the examples at indices [n] as a set of their own; `source`, if given, is what it says.

        Raises:
            DataError: They overlap, so that a selection would share what another has (text).
        """
        raise DataError(f"{type(self).__name__} cannot be divided: give train, validation and test")

    def prefetch(self, indices: Tensor) -> None:
        """Begins to load what `gather` is going to be asked for, indices[0], indices[1] and on."""
        return  # what is kept needs no loading

    def sample_indices(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draws a minibatch's indices [batch_size] with replacement, as DeepMind's code does."""
        return torch.randint(len(self), (batch_size,), generator=generator)


@dataclass(frozen=True, eq=False)
class TensorExamples(Examples):
    """Examples that are kept as tensors on one device and indexed there.

    Args:
        inputs: Tensors [M, …] of any shape and dtype: one, or a tuple, list or dict of them.
        targets: The same of what is to be predicted.
        source: Where they came from, for the record.
        num_classes: C, where targets are classes 0 to C - 1; None where that is not known.

    Raises:
        ValueError: There is no tensor, or two differ in M.

    Example:
        >>> images = TensorExamples(torch.rand(6, 3, 8, 8), torch.arange(6) % 3, "six random images", 3)
        >>> inputs, targets = images.gather(torch.tensor([[0, 5], [5, 1]]))
        >>> inputs.shape, targets.tolist()
        (torch.Size([2, 2, 3, 8, 8]), [[0, 2], [2, 1]])
    """

    inputs: Tree
    targets: Tree
    source: str
    num_classes: int | None = None

    def __post_init__(self) -> None:
        leaves = tree_leaves((self.inputs, self.targets))
        shapes = [list(leaf.shape) for leaf in leaves]
        if not leaves or [] in shapes or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(f"inputs and targets must be tensors [M, …] of one M, got the shapes {shapes}")

    def __len__(self) -> int:
        return self._size

    @functools.cached_property
    def _size(self) -> int:
        return len(tree_leaves(self.inputs)[0])

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the tensors are."""
        device: torch.device = tree_leaves(self.inputs)[0].device
        return device

    @property
    def nbytes(self) -> int:
        """The tensors' bytes."""
        return sum(leaf.nbytes for leaf in tree_leaves((self.inputs, self.targets)))

    def to(self, device: torch.device | str) -> Self:
        """Returns the same examples on another device."""
        return self._with(*self._mapped(lambda leaf: leaf.to(device)))

    def select(self, indices: Tensor, source: str | None = None) -> Self:
        """Returns the examples at indices [n] as a set of their own."""
        return self._with(*self._mapped(lambda leaf: leaf[indices]), source)

    def gather(self, indices: Tensor) -> tuple[Tree, Tree]:
        """Returns the inputs and targets [*indices.shape, …] of the examples at indices."""
        flat = indices.flatten()
        inputs, targets = self.inputs, self.targets
        # Tensors alone are the common case, and a walk through trees takes time at every step.
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            return _rows(inputs, indices, flat), _rows(targets, indices, flat)
        return self._mapped(lambda whole: _rows(whole, indices, flat))

    def of_classes(self, classes: Sequence[int]) -> Self:
        """Returns the examples of some classes, relabelled 0, 1, … in the order in which these are given.

        Raises:
            ValueError: No classes, one of them twice, or one that no example is of.
            TypeError: The targets are not classes, [M] whole numbers.

        Example:
            >>> digits = TensorExamples(torch.rand(6, 2), torch.tensor([7, 3, 1, 3, 7, 9]), "random digits")
            >>> digits.of_classes([7, 3]).targets.tolist()
            [0, 1, 1, 0]
        """
        labels = self.targets
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            raise TypeError(f"the targets of {self.source} are not classes, [M] whole numbers")
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"classes must name one class at least, and none twice, got {list(classes)}")
        is_of = labels[:, None] == torch.tensor(classes, device=labels.device)  # [M, classes]
        if absent := [c for c, found in zip(classes, is_of.any(0).tolist(), strict=True) if not found]:
            raise ValueError(f"{self.source} has no example of the classes {absent}")
        chosen = self.select(is_of.any(1).nonzero().flatten())
        names = f"{self.source}, classes {', '.join(map(str, classes))}"
        relabelled = is_of[is_of.any(1)].to(labels.dtype).argmax(1).to(labels.dtype)
        return chosen._with(chosen.inputs, relabelled, names, len(classes))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> tuple[Tree, Tree]:
        return tree_map(function, self.inputs), tree_map(function, self.targets)

    def _with(
        self, inputs: Tree, targets: Tree, source: str | None = None, num_classes: int | None = None
    ) -> Self:
        # By position: a subclass may have other names for them.
        return type(self)(inputs, targets, source or self.source, num_classes or self.num_classes)


def _rows(whole: Tensor, indices: Tensor, flat: Tensor) -> Tensor:
    if whole.ndim == 1:
        return whole[indices]
    # index_select copies whole rows; plain indexing takes twice as long.
    return whole.index_select(0, flat).view(*indices.shape, *whole.shape[1:])
