"""What the benchmarks share: where a number was measured, how work is timed, a plain table, strict JSON.

Needs torch alone, so that it runs on a machine where nothing else is installed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

COMMIT_VARIABLE = "L2L_COMMIT"
"""Names the commit where the benchmark runs from a copy without git."""


def origin(device: str) -> dict[str, Any]:
    """What the numbers of one run depend on: device, versions, commit, date; null for what is not there."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "commit": os.environ.get(COMMIT_VARIABLE)
        or _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    lines = result.stdout.strip().splitlines()
    return lines[0] if result.returncode == 0 and lines else None


def time_ms(run: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of one call after warming up: the median and the .2 and .8 quantiles.

    On a GPU by CUDA events, with the L2 cache flushed before every call: the flush takes the GPU longer than
    a launch takes the CPU, so that the launch's overhead stays out of the figure.
    """
    if device.startswith("cuda"):
        from triton.testing import do_bench

        median, low, high = do_bench(run, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
    else:
        run()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        median, low, high = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
    return {"ms": median, "ms_p20": low, "ms_p80": high}


def copy_gb_per_s(device: str) -> float:
    """Bytes that a large copy reads and writes, in 10⁹ a second: what memory allows."""
    source = torch.ones((2**30 if device.startswith("cuda") else 2**28) // 4, device=device)
    copy = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return 1e-6 * moved / time_ms(lambda: copy.copy_(source), device)["ms"]


def start_table(columns: Sequence[str]) -> Callable[[Sequence[object]], None]:
    """Prints a heading and returns what prints a row, as soon as it is there, under it."""
    widths = [max(len(column), 8) for column in columns]

    def print_row(cells: Sequence[object]) -> None:
        pairs = zip(cells, widths, strict=True)
        print("  ".join(str(cell).rjust(width) for cell, width in pairs), flush=True)

    print_row(columns)
    return print_row


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Writes strict JSON, whole or not at all; nothing if no path was asked for.

    Raises:
        ValueError: A number is not finite: JSON has no NaN.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
