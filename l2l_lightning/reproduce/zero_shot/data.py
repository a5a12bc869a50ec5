"""What problems draw from: finite data in three disjoint parts, of what installed packages hold."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pydoc_data.topics import topics
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from l2l_lightning.data import load_images

Rows = tuple[Tensor, ...]
"""Tensors of equal length: inputs and targets."""

HELD_OUT_BATCH = 512
"""Rows that are evaluated at once."""


@dataclass(frozen=True)
class Data:
    """Rows to train on, to tune on and to report on; none is in two of the three."""

    train: Rows
    validation: Rows
    test: Rows
    source: str
    """Where they come from, and a hash of them."""

    @classmethod
    def of(cls, name: str, train: Rows, validation: Rows, test: Rows) -> Data:
        """Adds a hash of all rows to the source's name."""
        digest = hashlib.sha256()
        for tensor in (*train, *validation, *test):
            digest.update(tensor.contiguous().numpy().tobytes())
        return cls(train, validation, test, f"{name} (SHA-256 {digest.hexdigest()[:12]})")

    @classmethod
    def split(cls, name: str, *tensors: Tensor) -> Data:
        """Splits rows at random, but always alike, into 2/3, 1/6 and 1/6; duplicates stay together.

        Example:
            >>> data = Data.split("numbers", torch.arange(12.0))
            >>> [len(part[0]) for part in (data.train, data.validation, data.test)]
            [8, 2, 2]
        """
        length = len(tensors[0])
        flat = torch.cat([tensor.double().reshape(length, -1) for tensor in tensors], 1)
        kind = torch.unique(flat, dim=0, return_inverse=True)[1]
        order = torch.from_numpy(np.random.PCG64(0).random_raw(int(kind.max()) + 1).argsort(kind="stable"))
        place, kinds = order.argsort()[kind], int(kind.max()) + 1
        sixth = kinds // 6
        chosen = (place < kinds - 2 * sixth, (place >= kinds - 2 * sixth) & (place < kinds - sixth))
        masks = (*chosen, place >= kinds - sixth)
        return cls.of(name, *(tuple(tensor[mask] for tensor in tensors) for mask in masks))

    def batches(self, size: int) -> Callable[[torch.Generator], Rows]:
        """Returns a function that draws `size` training rows with replacement."""
        length = len(self.train[0])

        def batch(generator: torch.Generator) -> Rows:
            chosen = torch.randint(length, (size,), generator=generator)
            return tuple(tensor.index_select(0, chosen) for tensor in self.train)

        return batch

    def held_out(self, part: Literal["validation", "test"]) -> list[Rows]:
        """Returns the rows of a part in minibatches of equal size, so that a mean over them is one over rows.

        As many as there are minibatches, less one, may be left out for that.
        """
        rows: Rows = getattr(self, part)
        count = -(-len(rows[0]) // HELD_OUT_BATCH)
        size = len(rows[0]) // count
        chunks = [torch.split(tensor[: count * size], size) for tensor in rows]
        return list(zip(*chunks, strict=True))


@functools.cache
def images(name: str) -> Data:
    """Pixels [M, D] and labels [M] of a data set of this package."""
    splits = load_images(name, root=None)
    rows = ((split.pixels, split.labels) for split in splits)
    return Data.of(splits.train.source, *rows)


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / values.std(0).clamp(min=1e-6)


@functools.cache
def table(name: str) -> Data:
    """A table of scikit-learn's: features [M, D] of mean 0 and deviation 1, and targets.

    Classes are [M]; the target of a regression is [M, 1], standardised.
    """
    from sklearn import datasets  # here, as it takes a second

    loaded: Any = getattr(datasets, f"load_{name}")()
    inputs, targets = _standardised(torch.from_numpy(loaded.data).float()), torch.from_numpy(loaded.target)
    targets = targets.long() if hasattr(loaded, "target_names") else _standardised(targets.float()[:, None])
    return Data.split(f"{name} of scikit-learn", inputs, targets)


@functools.cache
def picture(name: str, stride: int) -> Data:
    """A photograph of scikit-learn's: places [M, 2] in [−1, 1]² and colours [M, 3] in [0, 1]."""
    from sklearn.datasets import load_sample_image

    colours = torch.from_numpy(load_sample_image(f"{name}.jpg").copy())[::stride, ::stride].float() / 255
    axes = (torch.linspace(-1, 1, length) for length in colours.shape[:2])
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
    return Data.split(f"{name}.jpg of scikit-learn, every {stride}th pixel", places, colours.flatten(0, 1))


@functools.cache
def text(name: Literal["help", "code"]) -> tuple[tuple[bytes, bytes, bytes], str]:
    """A text in three parts of 80%, 10% and 10%, each paragraph in one of them only, and its source.

    "help" is the documentation of Python that `help()` shows (pydoc_data.topics), in ASCII; "code" is the
    source of Python's packages asyncio and email, as UTF-8. Both differ from version to version.
    """
    if name == "help":
        pages = [topics[key].encode("ascii", "replace") for key in sorted(topics)]
    else:
        folders = [resources.files(package) for package in ("asyncio", "email")]
        files = [file for folder in folders for file in folder.iterdir() if file.name.endswith(".py")]
        pages = [file.read_bytes() for file in sorted(files, key=lambda file: file.name)]
    paragraphs = dict.fromkeys(part for page in pages for part in page.strip().split(b"\n\n"))
    chosen: tuple[list[bytes], ...] = ([], [], [])
    for number, paragraph in enumerate(paragraphs):
        # In turns, as the parts should be about the same topics.
        chosen[{8: 1, 9: 2}.get(number % 10, 0)].append(paragraph)
    train, validation, test = (b"\n\n".join(part) for part in chosen)
    digest = hashlib.sha256(b"\0".join((train, validation, test))).hexdigest()[:12]
    return (train, validation, test), f"{name} of Python {platform.python_version()} (SHA-256 {digest})"


@functools.cache
def characters(name: Literal["help", "code"], context: int) -> Data:
    """Characters [M, context] and those that follow each, [M, context], as int64 below 128 or 256.

    Training pieces begin anywhere in the text; of those held out none overlap another, and there are as many
    as make 16,384 characters.
    """
    parts, source = text(name)
    rows = []
    for number, part in enumerate(parts):
        codes = torch.frombuffer(bytearray(part), dtype=torch.uint8).long()
        cut = codes.unfold(0, context + 1, context if number else 1)
        if number:
            cut = cut[torch.linspace(0, len(cut) - 1, 16384 // context).long()]
        rows.append((cut[:, :-1], cut[:, 1:]))
    return Data(rows[0], rows[1], rows[2], source)


@functools.cache
def words(vocabulary: int, context: int) -> Data:
    """Words [M] of Python's documentation and a neighbour of each, [M], at most `context` words away.

    They are numbered by frequency; the rarer ones, and all that are not among the training text's most
    frequent, are left out before neighbours are looked for.
    """
    parts, source = text("help")
    lists = [re.findall(rb"[a-z]+", part.lower()) for part in parts]
    numbers = {word: n for n, (word, _) in enumerate(Counter(lists[0]).most_common(vocabulary))}
    rows = []
    for found in lists:
        codes = torch.tensor([numbers[word] for word in found if word in numbers])
        pairs = [(codes[:-d], codes[d:]) for d in range(1, context + 1)]
        rows.append((torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])))
    return Data(rows[0], rows[1], rows[2], source)
