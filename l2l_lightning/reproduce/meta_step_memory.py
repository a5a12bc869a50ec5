"""What a meta-step holds and what it takes, measured in a process of its own: `measure` starts one.

A process's heap keeps what earlier work has left in it, so that the peak of one meta-step can be told only
where nothing else has run.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from l2l_lightning.data.images import Images
from l2l_lightning.reproduce.autograd_graph import autograd_graph, unrolled_window
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import Rollout
from l2l_lightning.rules.base import UpdateRule
from l2l_lightning.tasks import Quadratic, Task

Mode = Literal["ours", "unrolled, first order", "unrolled, second order"]
MODES: tuple[Mode, ...] = ("ours", "unrolled, first order", "unrolled, second order")
"""The ways to find a window's meta-gradient: without a graph, or through the one that autograd holds."""

_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class MetaStep:
    """A window of T steps from θ0 on, and its meta-gradient; on the CPU."""

    task: Task
    rule: UpdateRule
    images: Images | None
    seed: int
    mode: Mode
    unroll: int

    def meta_loss(self) -> Tensor:
        """Runs the forward half on one optimizee; the result holds what the backward needs, no more."""
        optimizees = Optimizees(self.task, self.images, self.seed, "train", indices=[0])
        if self.mode == "ours":
            return Rollout(self.rule, optimizees).window(self.unroll).meta_loss
        return unrolled_window(self.rule, optimizees, self.unroll, self.mode == "unrolled, second order")


def held_bytes(rule: UpdateRule, coordinates: int, unroll: int) -> dict[str, int]:
    """Returns the bytes that a window without a graph holds for n coordinates, all in float32.

        states [T+1, *state_shape, n], gradients [T+1, n], cotangents [T, n]

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM
        >>> held_bytes(CoordinatewiseLSTM(num_layers=2, hidden_size=20), coordinates=10, unroll=5)
        {'states': 19200, 'gradients': 240, 'cotangents': 200}
    """
    states = (unroll + 1) * rule.init_state(coordinates).nbytes
    return {
        "states": states,
        "gradients": (unroll + 1) * coordinates * 4,
        "cotangents": unroll * coordinates * 4,
    }


def measure(step: MetaStep) -> dict[str, int]:
    """Runs a meta-step in a fresh process.

    Returns:
        "peak_bytes", the most that was resident during it beyond what was before it; "operations" and
        "edges" of the graph behind its meta-loss; "graph_bytes", what that graph has saved.

    Raises:
        RuntimeError: The process was killed, as one is that takes more memory than there is, or the step
            failed.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM
        >>> step = MetaStep(Quadratic(), CoordinatewiseLSTM(), None, seed=0, mode="ours", unroll=5)
        >>> measure(step)["operations"]
        7
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure_here, step).result()


def _measure_here(step: MetaStep) -> dict[str, int]:
    if sys.platform == "linux":
        # Should memory run out, it is this process that the system ends.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        # glibc gives every large tensor pages of its own. By default it soon takes them from the heap, where
        # an unrolled window leaves holes of a third of its size, more or fewer from run to run.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    # Kernels are compiled and libraries initialised on a problem that leaves no memory behind.
    torch.autograd.backward(replace(step, task=Quadratic(dim=2), images=None, unroll=1).meta_loss())
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is resident now
    before, meta_loss = _peak(), step.meta_loss()
    # Before the backward, which frees the graph; the count's own objects do not show in the peak.
    graph = autograd_graph(meta_loss)
    torch.autograd.backward(meta_loss)
    return {
        "peak_bytes": _peak() - before,
        "operations": len(graph.operations),
        "edges": len(graph.edges),
        "graph_bytes": graph.saved_bytes,
    }


def _peak() -> int:
    """Returns the most bytes of this process that were resident."""
    if sys.platform == "linux":
        # Not ru_maxrss, which a process takes over from the one that started it.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
