"""What a meta-step holds and what it takes, measured in a process of its own: `measure` starts one.

A process's heap keeps what earlier work has left in it, so that the peak of one meta-step can be told only
where nothing else has run.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from l2l_lightning.data.images import Images
from l2l_lightning.errors import L2LError
from l2l_lightning.reproduce.autograd_graph import autograd_graph, unrolled_window
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import Rollout
from l2l_lightning.rules.base import UpdateRule
from l2l_lightning.tasks import Quadratic, Task

Mode = Literal["ours", "unrolled, first order", "unrolled, second order"]
MODES: tuple[Mode, ...] = ("ours", "unrolled, first order", "unrolled, second order")
"""The ways to find a window's meta-gradient: without a graph, or through the one that autograd holds."""

_TIMEOUT = 3600
_NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Lets glibc give every large tensor pages of its own. By default it soon takes them from the heap, where an
unrolled window leaves holes of a third of its size, more or fewer from run to run."""


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


class NotMeasuredError(L2LError, RuntimeError):
    """A meta-step could not be measured here; the message says why."""


def held_bytes(rule: UpdateRule, coordinates: int, unroll: int) -> dict[str, int]:
    """Returns the bytes that a window without a graph holds for n coordinates, all in float32.

        states [T+1, *state_shape, n], gradients [T+1, n], cotangents [T, n]

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM
        >>> held_bytes(CoordinatewiseLSTM(num_layers=2, hidden_size=20), coordinates=10, unroll=5)
        {'states': 19200, 'gradients': 240, 'cotangents': 200}
    """
    state = rule.init_state(coordinates)
    theta = coordinates * 4
    return {
        "states": (unroll + 1) * state.numel() * state.element_size(),
        "gradients": (unroll + 1) * theta,
        "cotangents": unroll * theta,
    }


def available_bytes() -> int:
    """Returns the memory that the system could still give, or all there is where the system does not tell."""
    try:
        return 1024 * _number("/proc/meminfo", "MemAvailable:")
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: str, name: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(step: MetaStep) -> dict[str, int]:
    """Runs a meta-step in a fresh process, which must be able to import the task's and the rule's classes.

    Returns:
        "peak_bytes", the most that was resident during it beyond what was before it; "operations" and
        "edges" of the graph behind its meta-loss; "graph_bytes", what that graph has saved.

    Raises:
        NotMeasuredError: The process was killed, as one is that takes more memory than there is, or failed.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM
        >>> step = MetaStep(Quadratic(), CoordinatewiseLSTM(), None, seed=0, mode="ours", unroll=5)
        >>> measure(step)["operations"]
        7
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=pickle.dumps(step),
            capture_output=True,
            check=False,
            timeout=_TIMEOUT,
            env={**os.environ, **_NO_HOLES},
        )
    except subprocess.TimeoutExpired as error:
        raise NotMeasuredError(f"it took more than {_TIMEOUT} seconds") from error
    if done.returncode < 0:
        raise NotMeasuredError(f"its process was killed by {signal.Signals(-done.returncode).name}")
    if done.returncode > 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise NotMeasuredError(f"its process failed: {lines[-1] if lines else 'it says nothing'}")
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])  # libraries may have printed before
    return measured


def main() -> None:
    """Is the measured process: reads a pickled MetaStep, and prints what `measure` returns as JSON."""
    step: MetaStep = pickle.load(sys.stdin.buffer)  # from `measure`, its parent
    # Kernels are compiled and libraries initialised on a problem that leaves no memory behind.
    warm_up = MetaStep(Quadratic(dim=2), step.rule, None, step.seed, step.mode, unroll=1)
    torch.autograd.backward(warm_up.meta_loss())
    before = _restart_peak()
    meta_loss = step.meta_loss()
    # Before the backward, which frees the graph; the count's own objects do not show in the peak.
    graph = autograd_graph(meta_loss)
    torch.autograd.backward(meta_loss)
    measured = {
        "peak_bytes": _peak() - before,
        "operations": len(graph.operations),
        "edges": len(graph.edges),
        "graph_bytes": graph.saved_bytes,
    }
    print(json.dumps(measured))


def _restart_peak() -> int:
    """Lowers the peak to what is resident now, where the system can, and returns it."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak() -> int:
    """Returns the most bytes of this process that were resident."""
    if sys.platform == "linux":
        # Not ru_maxrss, which a process takes over from the one that started it.
        return 1024 * _number("/proc/self/status", "VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    main()
