"""Data of the user's own: Datasets, tensors, a function that returns them or a folder, as disjoint splits."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from l2l_lightning.class_paths import dotted_path, is_dotted_path, resolve
from l2l_lightning.data.class_folders import class_folders, split_folders
from l2l_lightning.data.examples import Examples, TensorExamples
from l2l_lightning.data.loaded import LoadedExamples, check_items, size_of, stacked
from l2l_lightning.data.splits import Splits, sixths
from l2l_lightning.errors import DataError, DataNotFoundError

NAMES = Splits._fields

FROM_PYTHON = "from_python"
"""What a checkpoint has in place of data that it cannot name: a mapping of this to a description."""

GIB = 2**30

# Any, not the classes: the command line, where it is a text, would list all of their subclasses.
OwnData = str | Any
"""One split, or all: a map-style Dataset of pairs (input, target); tensors or arrays (inputs, targets),
[M, …] each; Examples; a function without arguments that returns one of these; its dotted path; or a folder of
class folders of images. A dict is what a checkpoint has in place of what only Python can give."""

_KINDS = (
    "a map-style torch Dataset of pairs (input, target), a pair (inputs, targets) of tensors, Examples, a "
    "function that returns one of these, its dotted path or a folder of images in class folders"
)


def check_own(**given: Any) -> None:
    """Raises TypeError or ValueError for data that is of none of the kinds that OwnData has, by its name."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, dict) and value.keys() == {FROM_PYTHON}:
            raise ValueError(
                f"{name} was given from Python ({value[FROM_PYTHON]}), and a checkpoint cannot rebuild it: "
                f"give it again, --data.{name} or MetaData({name}=…)"
            )
        if isinstance(value, str | Path):
            _check_path(name, value)
        elif not _is_function(value):
            _check_kind(name, value)
    if given and "train" not in given:
        raise ValueError(f"{' and '.join(given)} cannot be given without train")
    for (name, value), (other, later) in itertools.combinations(given.items(), 2):
        if value is later or (isinstance(value, str) and value == later):
            raise ValueError(f"{name} and {other} are the same data, and must be disjoint")


def _check_kind(name: str, value: Any) -> None:
    """Raises TypeError for what is neither Examples nor can be made some."""
    if isinstance(value, IterableDataset):
        raise TypeError(
            f"{name} is an IterableDataset, whose items have no indices to draw minibatches by: pass a "
            "map-style Dataset, or let ModuleTask's `sample` draw"
        )
    if isinstance(value, DataLoader):
        raise TypeError(f"{name} is a DataLoader, and minibatches are drawn here: pass its dataset")
    if not (isinstance(value, Examples | Splits) or _is_pair(value) or _is_map_style(value)):
        raise TypeError(f"{name} must be {_KINDS}, got {type(value).__name__}")


def _check_path(name: str, value: str | Path) -> None:
    if Path(value).expanduser().is_dir():
        return
    if not (isinstance(value, str) and "." in value and is_dotted_path(value)):
        raise ValueError(
            f"{name}={str(value)!r} is neither a folder nor the dotted path of a function without arguments, "
            "such as my_data.train"
        )
    resolve(value, name)


def recorded(value: OwnData) -> str | dict[str, str] | None:
    """Returns what a checkpoint keeps: a function's dotted path, a folder, or FROM_PYTHON."""
    if value is None:
        return None
    if isinstance(value, str | Path):
        folder = Path(value).expanduser()
        return str(folder.resolve()) if folder.is_dir() else str(value)
    if _is_function(value):
        path = dotted_path(value)
        module, _, name = path.rpartition(".")
        # A method or a nested function could not be found again.
        return path if getattr(sys.modules.get(module), name, None) is value else {FROM_PYTHON: path}
    return {FROM_PYTHON: _described(value)}


def load_own(
    given: Mapping[str, OwnData],
    image_size: Sequence[int] | None = None,
    memory_limit: float = 4.0,
    num_workers: int = 2,
) -> Splits[Examples]:
    """Loads what was given as train, validation and test.

    What is missing of validation and test is a sixth of train each, by a fixed permutation; their source says
    so.

    Args:
        given: OwnData by the names of the splits, which has passed `check_own`.
        image_size: H and W, which images of folders are resized to.
        memory_limit: GiB that a Dataset's items may take to be kept in memory; others are loaded as
            minibatches ask for them.
        num_workers: Processes that load.

    Raises:
        DataNotFoundError: A folder has no class folders.
        DataError: A function cannot be called, or what was given is not M pairs of one shape, the same at
            every call.
    """
    found = {
        name: _found(name, value, image_size) for name in NAMES if (value := given.get(name)) is not None
    }
    for name, one in found.items():
        if isinstance(one.data, Splits | _Folders) and len(found) > 1:
            raise DataError(
                f"{name}={one.described} holds train, validation and test all by itself: give it as train "
                "alone, or a part of it"
            )
    whole = found["train"].data
    if isinstance(whole, Splits):
        return whole
    if isinstance(whole, _Folders):
        found = {name: _of_folder(folder, image_size) for name, folder in whole.splits.items()}
    _check_classes(found)
    sizes = {name: _size(f"{name} ({one.described})", one.data) for name, one in found.items()}
    missing = [name for name in NAMES if name not in found]
    parts = sixths(sizes["train"], len(missing))
    if not all(map(len, parts)):
        raise DataError(
            f"train has {sizes['train']} examples, too few for sixths of them to be {' and '.join(missing)}: "
            f"give {' and '.join(missing)}, too"
        )
    counts = {name: sizes[name] if name in found else len(parts[1]) for name in NAMES}
    counts["train"] = len(parts[0])
    source = _source(found, counts, missing)
    limit = memory_limit * GIB
    examples = {name: _examples(name, one, source, limit, num_workers) for name, one in found.items()}
    if missing:
        train = examples["train"]
        divided = zip(("train", *missing), parts, strict=True)
        examples |= {name: train.select(indices, source) for name, indices in divided}
    return Splits(*(examples[name] for name in NAMES))


class _Folders(NamedTuple):
    """A folder with a folder of class folders for each of its splits."""

    splits: dict[str, Path]


class _Found(NamedTuple):
    """What was given as one split: Examples, (inputs, targets), a Dataset, all the splits, or _Folders."""

    data: Any
    described: str
    num_classes: int | None = None


def _found(name: str, value: Any, image_size: Sequence[int] | None) -> _Found:
    if isinstance(value, str | Path) and (folder := Path(value).expanduser()).is_dir():
        if splits := split_folders(folder):
            return _Found(_Folders(splits), str(folder))
        return _of_folder(folder, image_size)
    if isinstance(value, Path):
        raise DataNotFoundError(f"{name}={str(value)!r}: there is no such folder any more")
    if not (isinstance(value, str) or _is_function(value)):
        return _Found(value, _described(value))
    function = resolve(value, name)
    path = value if isinstance(value, str) else dotted_path(value)
    try:
        returned = function()
    except Exception as error:  # whatever code of the user's raises
        raise DataError(
            f"{name}={path} must be a function without arguments that returns the data, and raised "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    try:
        _check_kind(f"what {name}={path} returns", returned)
    except TypeError as error:
        raise DataError(str(error)) from error
    return _Found(returned, path)


def _of_folder(folder: Path, image_size: Sequence[int] | None) -> _Found:
    images = class_folders(folder, image_size)
    return _Found(images, f"class folders at {folder}", len(images.classes))


def _check_classes(found: Mapping[str, _Found]) -> None:
    """Raises DataError if folders of two splits have other classes: labels would mean other things."""
    classes = {name: one.data.classes for name, one in found.items() if one.num_classes is not None}
    for name, names in classes.items():
        if "train" in classes and names != classes["train"]:
            raise DataError(
                f"the class folders of {name} are {', '.join(names)}, and those of train are "
                f"{', '.join(classes['train'])}: they must be the same"
            )


def _source(found: Mapping[str, _Found], counts: Mapping[str, int], missing: Sequence[str]) -> str:
    described = ", ".join(dict.fromkeys(one.described for one in found.values()))
    sizes = " + ".join(f"{counts[name]:,}" for name in NAMES)
    taken = f"; {' and '.join(missing)} by a fixed permutation out of train" if missing else ""
    return f"own data: {described} ({sizes} examples{taken})"


def _examples(name: str, found: _Found, source: str, limit: float, num_workers: int) -> Examples:
    data = found.data
    if isinstance(data, Examples):
        return data
    if type(data) is TensorDataset and len(data.tensors) == 2:  # a subclass may do more than index
        data = data.tensors
    if _is_pair(data):
        inputs, targets = (tree_map(torch.as_tensor, part) for part in data)
        return TensorExamples(inputs, targets, source, found.num_classes)
    where = f"{name} ({found.described})"
    if check_items(data, where) > limit:
        return LoadedExamples(data, source, found.num_classes, num_workers)
    return TensorExamples(*stacked(data, where, num_workers), source, found.num_classes)


def _size(name: str, data: Any) -> int:
    """The number of examples of a split; a DataError if there are none, or tensors differ in theirs."""
    if not _is_pair(data):
        size = len(data) if isinstance(data, Examples) else size_of(data)
    else:
        shapes = [list(np.shape(leaf)) for leaf in tree_leaves(data)]
        if len({shape[0] if shape else None for shape in shapes}) > 1 or [] in shapes:
            raise DataError(f"{name} must be tensors [M, …] of one M, got the shapes {shapes}")
        size = shapes[0][0]
    if not size:
        raise DataError(f"{name} has no examples")
    return size


def _is_pair(value: Any) -> bool:
    """Whether a value is (inputs, targets), tensors, arrays or nested tuples, lists or dicts of them."""
    if not (isinstance(value, tuple | list) and len(value) == 2) or isinstance(value, Splits):
        return False
    parts = [tree_leaves(part) for part in value]
    return all(parts) and all(isinstance(leaf, Tensor | np.ndarray) for part in parts for leaf in part)


def _is_map_style(value: Any) -> bool:
    """Whether a value has items by index and a number of them; a list of pairs could be two tensors."""
    plain = isinstance(value, str | tuple | list | dict | Tensor | np.ndarray | type)
    return not plain and hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, Examples) and not _is_map_style(value)


def _described(value: Any) -> str:
    """What data that was given from Python is called, for the record."""
    if isinstance(value, Examples):
        return value.source
    if isinstance(value, Splits):
        return str(value.train.source)
    if isinstance(value, tuple | list):
        shapes = [", ".join(map(str, ["M", *np.shape(leaf)[1:]])) for leaf in tree_leaves(value)]
        return f"tensors {', '.join(f'[{shape}]' for shape in shapes)}"
    return type(value).__name__
