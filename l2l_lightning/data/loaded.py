"""Examples of a torch Dataset: kept as tensors where they fit in memory, or loaded minibatch by minibatch."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from l2l_lightning.data.examples import Examples, Tree
from l2l_lightning.errors import DataError

CHUNK = 256
"""`stacked` loads this many items at a time, and if there are no more of them, in its own process."""

COMPARED = 8
"""This many items are loaded twice, to see whether they are the same."""


class LoadedExamples(Examples):
    """Examples of a map-style torch Dataset that a DataLoader loads as minibatches ask for them.

    Minibatches come on the CPU. What is to be gathered next is loaded ahead, by worker processes; it is the
    same whether or not it was, and what `TensorExamples` of the stacked items would give.

    Args:
        dataset: Pairs (input, target) by index, of tensors, arrays, numbers, or nested tuples, lists and
            dicts of them, each of one shape.
        source: Where they came from, for the record.
        num_classes: C, where targets are classes 0 to C - 1; None where that is not known.
        num_workers: Processes that load ahead; with 0 minibatches are loaded when they are gathered.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> pairs = TensorDataset(torch.arange(12.0).view(4, 3), torch.arange(4))
        >>> examples = LoadedExamples(pairs, "four rows", num_workers=0)
        >>> examples.gather(torch.tensor([3, 1]))[1]
        tensor([3, 1])
    """

    device = torch.device("cpu")
    nbytes = 0

    def __init__(
        self, dataset: Dataset[Any], source: str, num_classes: int | None = None, num_workers: int = 2
    ) -> None:
        self.dataset = dataset
        self.source = source
        self.num_classes = num_classes
        self.num_workers = num_workers
        self._rows: list[list[int]] = []
        self._loader: DataLoader[Any] | None = None
        self._coming: Iterator[Any] = iter(())
        self._expected: deque[list[int]] = deque()

    def __len__(self) -> int:
        return size_of(self.dataset)

    def to(self, device: torch.device | str) -> LoadedExamples:
        """Returns themselves: they stay where their Dataset has them."""
        return self

    def select(self, indices: Tensor, source: str | None = None) -> LoadedExamples:
        """Returns the examples at indices [n] as a set of their own."""
        part = Subset(self.dataset, indices.tolist())
        return LoadedExamples(part, source or self.source, self.num_classes, self.num_workers)

    def prefetch(self, indices: Tensor) -> None:
        """Begins to load the minibatches at indices [..., B], in their order."""
        if self._loader is None:
            # Each minibatch of B is a unit of work, so that one evaluation's K of them are loaded side by
            # side. With a generator of its own it does not draw from the global stream.
            self._loader = DataLoader(
                self.dataset,
                batch_sampler=self._rows,
                num_workers=self.num_workers,
                persistent_workers=self.num_workers > 0,
                generator=torch.Generator(),
            )
        self._rows[:] = indices.reshape(-1, indices.shape[-1]).tolist()
        self._expected = deque(self._rows)
        self._coming = iter(self._loader)

    def gather(self, indices: Tensor) -> tuple[Tree, Tree]:
        """Returns the inputs and targets [*indices.shape, …] of the examples at indices [..., B].

        Raises:
            DataError: An item cannot be loaded, or is of another shape than the others.
        """
        try:
            rows = [self._load(row) for row in indices.reshape(-1, indices.shape[-1]).tolist()]
        except Exception as error:  # whatever a Dataset's code raises
            self._expected.clear()
            refuse_item(self.source, error)

        def stack(*leaves: Tensor) -> Tensor:
            if len({leaf.shape for leaf in leaves}) > 1:
                refuse_item(self.source, RuntimeError("stack expects each tensor to be equal size"))
            return torch.stack(leaves).view(*indices.shape, *leaves[0].shape[1:])

        inputs, targets = tree_map(stack, *rows)
        return inputs, targets

    def _load(self, row: list[int]) -> Tree:
        if self._expected and self._expected[0] == row:
            self._expected.popleft()
            return next(self._coming)
        return default_collate([self.dataset[index] for index in row])


def size_of(dataset: Any) -> int:
    """The number of a map-style Dataset's items."""
    size: int = len(dataset)
    return size


def refuse_item(source: str, error: Exception) -> NoReturn:
    """Raises the DataError that says, in one line, what is wrong with an item of a Dataset."""
    # A worker process sends its error with a traceback, which ends with "package.Kind: message".
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1].strip() if "worker process" in lines[0] else lines[0].strip()
    if "equal size" in reason:
        reason = (
            f"{reason}: items must be of one shape, so pad or crop them in the Dataset, as a collate_fn "
            "would (images of a folder: --data.image_size)"
        )
    raise DataError(f"an item of {source} cannot be used: {reason}") from error


def check_items(dataset: Any, source: str) -> int:
    """Loads some items of a map-style Dataset, and returns what all would take in memory, in bytes.

    Raises:
        DataError: They cannot be loaded, are not pairs of tensors or numbers, or differ from call to call.
    """
    size = size_of(dataset)
    item = _loaded(source, lambda: dataset[0])
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise DataError(
            f"the items of {source} must be pairs (input, target), each a tensor or a nested tuple, list or "
            f"dict of tensors, got {_kind(item)}"
        )
    for index in range(min(size, COMPARED)):
        first, again = (_loaded(source, functools.partial(_item, dataset, index)) for _ in range(2))
        if other := [leaf for leaf in tree_leaves(first) if not isinstance(leaf, Tensor)]:
            raise DataError(f"the items of {source} must hold tensors or numbers, got {_kind(other[0])}")
        leaves = zip(tree_leaves(first), tree_leaves(again), strict=False)
        if not all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in leaves):
            raise DataError(
                f"item {index} of {source} is another one at every call, and a run would not repeat: leave "
                "out what is random in it (a transform that augments), or draw it in a task's `batch`"
            )
    nbytes: int = size * sum(leaf.nbytes for leaf in tree_leaves(first))  # of the same shape as all
    return nbytes


def _item(dataset: Any, index: int) -> Tree:
    return default_collate([dataset[index]])


def stacked(dataset: Any, source: str, num_workers: int) -> tuple[Tree, Tree]:
    """Loads all items of a map-style Dataset and stacks them, inputs [M, …] and targets [M, …].

    Raises:
        DataError: One cannot be loaded, or is of another shape than the first.
    """
    size = size_of(dataset)
    workers = num_workers if size > CHUNK else 0
    loader = DataLoader(dataset, batch_size=CHUNK, num_workers=workers, generator=torch.Generator())
    whole: list[Tensor] = []
    structure: Any = None
    start = 0
    chunks = iter(loader)
    while start < size:
        leaves, structure = tree_flatten(tuple(_loaded(source, lambda: next(chunks))))
        # Filled chunk by chunk: putting chunks together in the end would take twice the memory.
        whole = whole or [leaf.new_empty(size, *leaf.shape[1:]) for leaf in leaves]
        for all_of, leaf in zip(whole, leaves, strict=True):
            if leaf.shape[1:] != all_of.shape[1:]:
                refuse_item(source, RuntimeError("stack expects each tensor to be equal size"))
            all_of[start : start + len(leaf)] = leaf
        start += CHUNK
    inputs, targets = tree_unflatten(whole, structure)
    return inputs, targets


def _loaded(source: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever a Dataset's code raises
        refuse_item(source, error)


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
