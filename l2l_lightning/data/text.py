"""A text file as examples: windows of characters or bytes, the next of which are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2l_lightning.checks import check_choice, check_whole_numbers
from l2l_lightning.data.examples import Examples
from l2l_lightning.data.splits import Splits
from l2l_lightning.errors import DataCorruptedError, DataNotFoundError

TextSymbols = Literal["characters", "bytes"]

UNKNOWN = 0
"""The symbol of any character that the training part does not have."""


@dataclass(frozen=True, eq=False)
class TextWindows(Examples):
    """All windows of L + 1 symbols of a text: inputs are the first L of them, targets the last L.

    Args:
        symbols: The text, [n] whole numbers below num_classes.
        length: L.
        source: Where it came from, for the record.
        num_classes: V, the number of symbols.
        vocabulary: The characters of symbols 1 to V - 1 (0 is any other); None where symbols are bytes.

    Example:
        >>> text = TextWindows(torch.tensor([3, 1, 2, 1]), length=2, source="four symbols", num_classes=4)
        >>> len(text), text.gather(torch.tensor([1]))
        (2, (tensor([[1, 2]]), tensor([[2, 1]])))
    """

    symbols: Tensor
    length: int
    source: str
    num_classes: int
    vocabulary: str | None = None

    def __len__(self) -> int:
        return len(self.symbols) - self.length

    @property
    def device(self) -> torch.device:
        """Where the text is."""
        return self.symbols.device

    @property
    def nbytes(self) -> int:
        """The text's bytes."""
        return self.symbols.nbytes

    def to(self, device: torch.device | str) -> TextWindows:
        """Returns the same windows on another device."""
        return replace(self, symbols=self.symbols.to(device))

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of the windows that begin at indices, [*indices.shape, L] int64 each."""
        positions = indices.unsqueeze(-1) + torch.arange(self.length + 1, device=indices.device)
        windows = self.symbols[positions].long()
        return windows[..., :-1], windows[..., 1:]


def load_text(path: str | Path, length: int = 64, symbols: TextSymbols = "characters") -> Splits[TextWindows]:
    """Reads a text file: train is its first 80%, validation the next 10% and test the last.

    Characters are numbered from 1 on in the order of their code points, those of the training part alone: 0
    is any character that only the other parts have. So there are V = 1 + characters symbols; of bytes, 256.

    Args:
        path: The file; for characters, in UTF-8.
        length: L, the symbols of an input.
        symbols: "characters" or "bytes".

    Raises:
        DataNotFoundError: There is no such file, or it may not be read.
        DataCorruptedError: It is not UTF-8, or a part is shorter than L + 1 symbols.
        ValueError: length < 1, or no such kind of symbols.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (path := Path(folder, "text")).write_text(10 * "to be or not to be ")
        ...     splits = load_text(path, length=8)
        >>> splits.train.vocabulary, splits.train.num_classes, [len(part) for part in splits]
        (' benort', 8, [144, 11, 11])
    """
    check_whole_numbers(1, 10**6, text_length=length)
    check_choice(("characters", "bytes"), text_symbols=symbols)
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataNotFoundError(f"{path} cannot be read (--data.text): {error.strerror}") from error
    if symbols == "bytes":
        numbers = np.frombuffer(content, np.uint8)
    else:
        try:
            numbers = np.frombuffer(content.decode("utf-8-sig").encode("utf-32-le"), np.uint32)
        except UnicodeDecodeError as error:
            raise DataCorruptedError(
                f"{path} (--data.text) is not UTF-8 at byte {error.start}: --data.text_symbols bytes reads "
                "any file"
            ) from error
    ends = [len(numbers) * 8 // 10, len(numbers) * 9 // 10]
    parts = np.split(numbers, ends)
    if (shortest := min(map(len, parts))) <= length:
        raise DataCorruptedError(
            f"{path} (--data.text) is too short: its parts of 80%, 10% and 10% need {length + 1} {symbols} "
            f"each (--data.text_length {length}), and one has {shortest}"
        )
    source = f"text at {path} ({len(numbers):,} {symbols}"
    if symbols == "bytes":
        whole = [torch.from_numpy(part.copy()) for part in parts]
        return Splits(*(TextWindows(part, length, f"{source})", 256) for part in whole))
    known = np.unique(parts[0])
    whole = [torch.from_numpy(_numbered(part, known)) for part in parts]
    unknown = sum(int((part == UNKNOWN).sum()) for part in whole)
    source += f", {len(known)} different ones in its training part; {unknown:,} others stand for 'unknown')"
    vocabulary = "".join(map(chr, known))
    return Splits(*(TextWindows(part, length, source, 1 + len(known), vocabulary) for part in whole))


def _numbered(characters: npt.NDArray[Any], known: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Returns the position of each character among those known, counted from 1, or UNKNOWN."""
    position = np.searchsorted(known, characters)
    found = known[np.minimum(position, len(known) - 1)] == characters
    return np.where(found, position + 1, UNKNOWN).astype(np.int32)
