"""Random numbers from the global streams: whether any were drawn, and how they are made to repeat."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class TorchStreams:
    """Where torch's global random streams are, on the CPU and on a device.

    Example:
        >>> before = TorchStreams(torch.device("cpu"))
        >>> _ = torch.rand(1)
        >>> before.moved()
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._states = [(generator, generator.get_state()) for generator in _generators(device)]

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        return any(not torch.equal(generator.get_state(), state) for generator, state in self._states)

    def seed(self, seed: int) -> None:
        """Has them draw what they would after torch.manual_seed(seed)."""
        # Not torch.manual_seed, which would seed other devices too, and leave them so.
        for generator, _ in self._states:
            generator.manual_seed(seed)

    def restore(self) -> None:
        """Puts them back to where they were."""
        for generator, state in self._states:
            generator.set_state(state)


class OtherStreams:
    """Where the global random streams of Python and NumPy are, which take longer to put back than torch's."""

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        return random.getstate() != self._python or not all(
            map(np.array_equal, np.random.get_state(), self._numpy)  # noqa: NPY002
        )

    def seed(self, seed: int) -> None:
        """Seeds them, NumPy's with the last 32 bits."""
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002

    def restore(self) -> None:
        """Puts them back to where they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


@contextmanager
def seeded(seed: int, device: torch.device, torch_alone: bool = False) -> Iterator[None]:
    """Within this context the global streams start from a seed; after it they are where they were.

    Args:
        seed: In [0, 2⁶³).
        device: Where random numbers are drawn, besides the CPU.
        torch_alone: Leave out Python's and NumPy's streams.

    Example:
        >>> with seeded(3, torch.device("cpu")):
        ...     drawn = torch.rand(2)
        >>> bool((drawn == torch.rand(2, generator=torch.Generator().manual_seed(3))).all())
        True
    """
    streams: list[TorchStreams | OtherStreams] = [TorchStreams(device)]
    if not torch_alone:
        streams.append(OtherStreams())
    try:
        for stream in streams:
            stream.seed(seed)
        yield
    finally:
        for stream in streams:
            stream.restore()


def _generators(device: torch.device) -> list[torch.Generator]:
    """Returns torch's generators of what is drawn on the CPU and on a device."""
    generators = [torch.default_generator]
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators
