"""How the cost of a coordinate-step depends on the number of coordinates, the window and the tasks (CPU).

A coordinate-step is one coordinate's share of one inner step: its forward and its backward. `meta_step.py`
prints these tables after its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed_tables
import torch
from l2l_kernels import LSTMSpec, bptt, step_
from measuring import print_table, start_log, time_ms

COORDINATES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
COORDINATES_UNROLL = 2
"""As long as lets the states of 10⁷ coordinates fit in 16 GB of memory."""
UNROLLS = (5, 20, 100, 500)
TASKS = (1, 4, 16, 64)
TASKS_UNROLL = 20
FROM_COORDINATES = 100_000
"""Where the states of a window fill every cache: the cost is compared from here on."""


def kernel_ns(num_coordinates: int, unroll: int) -> float:
    """Nanoseconds of a coordinate-step in the two kernels alone: a window of `step_`, then `bptt`."""
    spec = LSTMSpec(num_layers=2, hidden_size=20)
    generator = torch.Generator().manual_seed(0)
    phi = torch.empty(spec.num_parameters).uniform_(-0.22, 0.22, generator=generator)
    grads = torch.empty(unroll, num_coordinates).normal_(std=0.01, generator=generator)
    theta, d_updates = torch.zeros(num_coordinates), grads.clone()
    history = torch.zeros(unroll + 1, *spec.state_shape, num_coordinates)

    def window() -> None:
        for t in range(unroll):
            step_(theta, grads[t], history[t], history[t + 1], phi, spec)
        bptt(grads, history, d_updates, None, phi, spec)

    return 1e6 * time_ms(window, "cpu")["ms"] / (num_coordinates * unroll)


def available_bytes() -> int:
    """Memory that may be taken without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def measure_scaling(threads: int, meta_step_ns: Callable[[int, int], float]) -> dict[str, Any]:
    """Prints the tables and returns them with the spread of each, largest over least.

    Args:
        threads: For the kernels alone.
        meta_step_ns: The cost in a whole meta-step on the MNIST network, from num_tasks and unroll.
    """
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []

    print(f"The two kernels alone, windows of {COORDINATES_UNROLL} steps, {threads} threads")
    print_row = start_log(["coordinates", "ns per coordinate-step"])
    for num_coordinates in COORDINATES:
        needed = 4 * 80 * num_coordinates * (COORDINATES_UNROLL + 2)
        if needed > available_bytes():
            print_row([f"{num_coordinates:,}", f"needs {needed / 2**30:.0f} GiB"])
            continue
        ns = kernel_ns(num_coordinates, COORDINATES_UNROLL)
        rows.append({"coordinates": num_coordinates, "unroll": COORDINATES_UNROLL, "kernel_ns": round(ns, 1)})
        print_row([f"{num_coordinates:,}", round(ns, 1)])

    print(f"A meta-step on the MNIST network (784-20-10), {threads} threads")
    print_row = start_log(["tasks", "unroll", "ns per coordinate-step"])
    for num_tasks, unroll in [(1, unroll) for unroll in UNROLLS] + [(k, TASKS_UNROLL) for k in TASKS[1:]]:
        ns = meta_step_ns(num_tasks, unroll)
        rows.append({"num_tasks": num_tasks, "unroll": unroll, "meta_step_ns": round(ns, 1)})
        print_row([num_tasks, unroll, round(ns, 1)])

    costs = {
        "coordinates": [r["kernel_ns"] for r in rows if r.get("coordinates", 0) >= FROM_COORDINATES],
        "unroll": [r["meta_step_ns"] for r in rows if r.get("num_tasks") == 1],
        "tasks": [r["meta_step_ns"] for r in rows if "num_tasks" in r and r["unroll"] == TASKS_UNROLL],
    }
    spread = {name: round(max(values) / min(values), 3) for name, values in costs.items() if values}
    found = {"threads": threads, "rows": rows, "spread": spread}
    print_table(speed_tables.scaling_kernels({"scaling": found}))
    print_table(speed_tables.scaling_meta_step({"scaling": found}))
    print(
        f"Largest over least cost (coordinates: from {FROM_COORDINATES:,} on):",
        ", ".join(f"{name} {value:.2f}" for name, value in spread.items()),
    )
    return found
