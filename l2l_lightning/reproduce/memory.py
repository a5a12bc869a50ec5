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
from dataclasses import asdict, dataclass
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
"""How a window's meta-gradient is found: without a graph, or through the one that autograd holds."""

_ITSELF = Path("/proc/self")
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
        """The forward half, of one optimizee: with all that the backward will need, and no more."""
        optimizees = Optimizees(self.task, self.images, self.seed, "train", indices=[0])
        if self.mode == "ours":
            return Rollout(self.rule, optimizees).window(self.unroll).meta_loss
        return unrolled_window(self.rule, optimizees, self.unroll, self.mode == "unrolled, second order")


@dataclass(frozen=True)
class Measured:
    """What one meta-step was found to hold and to take."""

    peak_bytes: int
    """The most that was resident during it, beyond what was before it."""
    operations: int
    """Of the graph behind its meta-loss."""
    edges: int
    graph_bytes: int
    """What that graph has saved."""


class NotMeasuredError(L2LError, RuntimeError):
    """A meta-step could not be measured here; the message says why."""


def held_bytes(rule: UpdateRule, coordinates: int, unroll: int) -> dict[str, int]:
    """What a window without a graph holds, for n coordinates in θ's and φ's dtypes, float32 both.

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
    """Memory that the system could still give; all there is, where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure(step: MetaStep) -> Measured:
    """Runs a meta-step in a fresh process, which must be able to import the task's and the rule's classes.

    Raises:
        NotMeasuredError: The process was killed, as one is that takes more memory than there is, or failed.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM
        >>> step = MetaStep(Quadratic(), CoordinatewiseLSTM(), None, seed=0, mode="ours", unroll=5)
        >>> measure(step).operations
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
    # Libraries may have printed before.
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The measured process: reads a pickled MetaStep, prints a Measured as a line of JSON."""
    step: MetaStep = pickle.load(sys.stdin.buffer)  # from `measure`, its parent
    # Kernels are compiled and libraries initialised on a problem that leaves no memory behind.
    warm_up = MetaStep(Quadratic(dim=2), step.rule, None, step.seed, step.mode, unroll=1)
    torch.autograd.backward(warm_up.meta_loss())
    before = _restart_peak()
    meta_loss = step.meta_loss()
    # Before the backward, which frees the graph; the count's own objects do not show in the peak.
    graph = autograd_graph(meta_loss)
    torch.autograd.backward(meta_loss)
    peak_bytes = _peak() - before
    measured = Measured(peak_bytes, len(graph.operations), len(graph.edges), graph.saved_bytes)
    print(json.dumps(asdict(measured)))


def _restart_peak() -> int:
    """Lowers the peak to what is resident now, where the system can, and returns it."""
    if sys.platform == "linux":
        (_ITSELF / "clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak() -> int:
    """The most of this process that was resident, in bytes."""
    if sys.platform == "linux":
        # Not ru_maxrss, which a process takes over from the one that started it.
        lines = (_ITSELF / "status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    main()
