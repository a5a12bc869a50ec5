"""Records a function of tensors once and replays it: one launch instead of thousands (CUDA graphs).

A graph repeats its kernels on the addresses that they were recorded with. So the function runs on static
copies of its arguments, which are filled before every replay, and whatever else it touches must stay where it
is: its addresses belong to the key that a graph is kept under.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from l2l_lightning.errors import CaptureError
from l2l_lightning.rollout.uneven import Uneven
from l2l_lightning.tasks.base import Task

CAPACITY = 8
"""This many graphs are kept for each task, as for a few window lengths. Each holds memory of its own."""


class Graph(Protocol):
    """A recording of a function, as torch.cuda.CUDAGraph is one."""

    def replay(self) -> None:
        """Repeats the function's kernels on the buffers that they were recorded with."""


class Recorder:
    """Records with torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        # One on each device for all recordings: cuBLAS keeps a workspace for every stream it has seen.
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def why_not(self, device: torch.device) -> str | None:
        """Says why nothing can be recorded on a device; None if it can."""
        return None if device.type == "cuda" else f"they need a CUDA device, and θ is on {device}"

    def record(self, function: Callable[[], None], device: torch.device) -> Graph:
        """Calls the function three times and records the last call, which the device does not execute.

        Raises:
            CaptureError: The function cannot be recorded.
        """
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream), _no_autocast_cache():
                    return self._record(function, stream)
            finally:
                # What runs next, recorded or not, writes to the same buffers.
                torch.cuda.current_stream().wait_stream(stream)

    def _record(self, function: Callable[[], None], stream: torch.cuda.Stream) -> Graph:
        function()  # what compiles or allocates on first use must do so before the recording
        graph = torch.cuda.CUDAGraph()
        try:
            # A function that waits for the device cannot be recorded. Finding out like this leaves nothing
            # behind, which a recording that breaks off might.
            with _waiting_is_an_error():
                function()
            # Other threads' calls (NCCL's watchdog) don't concern this recording.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                function()
        except Exception as error:  # whatever the function or CUDA happens to raise
            self._streams.clear()
            raise CaptureError(str(error).partition("\n")[0]) from error
        return graph


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """While it lasts, an operation that makes the host wait for the device raises."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # The warning says that the mode misses some operations: the recording finds those.
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """While it lasts, autocast converts φ at every use: a graph would go on reading a stale conversion."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


class _Recorded:
    """A graph, and the static copies of the arguments that it was recorded with."""

    def __init__(
        self, recorder: Recorder, function: Callable[..., None], arguments: Sequence[Tensor]
    ) -> None:
        try:
            with torch.inference_mode(False):  # a graph may be replayed outside the mode it was recorded in
                self.static = [argument.clone() for argument in arguments]
        except torch.OutOfMemoryError as error:
            raise CaptureError(str(error).partition("\n")[0]) from error
        # The graph knows addresses only: keeping the function keeps what it refers to where it is.
        self.function = function
        self.graph = recorder.record(lambda: function(*self.static), arguments[0].device)

    def replay(self, arguments: Sequence[Tensor]) -> None:
        for static, argument in zip(self.static, arguments, strict=True):
            static.copy_(argument)
        self.graph.replay()


class GraphCache:
    """Runs functions through their graphs where they can be recorded, and keeps the graphs used last.

    Args:
        recorder: The recorder; None is torch.cuda's.
        capacity: How many graphs are kept at once.
    """

    def __init__(self, recorder: Recorder | None = None, capacity: int = CAPACITY) -> None:
        self.recorder = recorder or Recorder()
        self.capacity = capacity
        self._recorded: dict[Hashable, _Recorded] = {}  # the least recently used first
        self._refused: list[Task] = []

    def __len__(self) -> int:
        return len(self._recorded)

    def run(
        self,
        function: Callable[..., None],
        key: Hashable,
        carried: Sequence[Tensor],
        inputs: Sequence[Any],
        task: Task,
        cuda_graphs: bool | None,
    ) -> None:
        """Calls function(*carried, *inputs), through its graph or as it is.

        Args:
            function: The function, which updates `carried` in place and does not change `inputs`.
            key: All that determines what it does besides its arguments: the ids of objects that it refers
                to, and the addresses of their tensors.
            carried: Tensors of any shape that it updates.
            inputs: What it reads: tensors of any shape, on the device, if it is to be recorded.
            task: The task that messages name.
            cuda_graphs: True: through its graph. False: as it is. None: through its graph where there is a
                CUDA device, with a warning, once, if the task cannot be recorded.

        Raises:
            CaptureError: cuda_graphs is True, and there is no CUDA device or the task cannot be recorded.
        """
        device = carried[0].device
        check_available(cuda_graphs, device, self.recorder)
        refused = any(task is other for other in self._refused)
        if cuda_graphs is False or self.recorder.why_not(device) or (cuda_graphs is None and refused):
            function(*carried, *inputs)
            return
        arguments = [*carried, *inputs]
        try:
            _check_inputs(inputs, device)
            recorded = self._find(function, key, arguments)
        except CaptureError as error:
            message = f"{task.describe()} cannot be recorded as a CUDA graph ({error})"
            if cuda_graphs:
                raise CaptureError(
                    f"{message}: cuda_graphs (--model.cuda_graphs) must not be true"
                ) from error
            warnings.warn(
                f"{message} and runs without one; cuda_graphs=False (--model.cuda_graphs false) never tries",
                stacklevel=4,
            )
            self._refused.append(task)
            function(*carried, *inputs)
            return
        recorded.replay(arguments)
        for value, static in zip(carried, recorded.static, strict=False):
            value.copy_(static)

    def _find(self, function: Callable[..., None], key: Hashable, arguments: Sequence[Tensor]) -> _Recorded:
        signature = tuple((argument.shape, argument.dtype) for argument in arguments)
        device = arguments[0].device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = (key, signature, device, autocast)
        recorded = self._recorded.pop(key, None)
        if recorded is None:
            while len(self._recorded) >= self.capacity:
                del self._recorded[next(iter(self._recorded))]
            recorded = _Recorded(self.recorder, function, arguments)
        self._recorded[key] = recorded
        return recorded


def _check_inputs(inputs: Sequence[Any], device: torch.device) -> None:
    """Raises CaptureError for minibatches that a recording could not take."""
    if any(isinstance(value, Uneven) for value in inputs):
        raise CaptureError("its minibatches differ in shape from one evaluation to another")
    if any(value.device.type != device.type for value in inputs):
        raise CaptureError("its losses draw random numbers, from seeds that the host sets")


def check_available(cuda_graphs: bool | None, device: torch.device, recorder: Recorder | None = None) -> None:
    """Raises CaptureError if CUDA graphs are asked for (True) on a device that has none."""
    reason = (recorder or Recorder()).why_not(device)
    if cuda_graphs and reason:
        raise CaptureError(f"cuda_graphs (--model.cuda_graphs) must not be true here: {reason}")
