"""Memory and time of a meta-step, by the number of coordinates and what a window keeps of the states (CPU).

    python benchmarks/large_optimizees.py --json FILE

A meta-step is a window of `unroll` inner steps of the 2x20 LSTM and its meta-gradient. The optimizee is
½‖θ‖², which costs next to nothing, so that what is seen is the rule's. Each size and each way of keeping
states is measured in a process of its own. Where a meta-step does not fit in the memory that is available,
its memory is computed from what it holds, and its time from the largest size that was measured; such rows
say so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import speed_tables
import torch
from measuring import print_table, start_log, write_json
from scaling import available_bytes

from l2l_lightning import CoordinatewiseLSTM, Optimizees, Rollout, Task
from l2l_lightning.provenance import origin
from l2l_lightning.rollout.history import CHUNK_BYTES, CHUNK_MULTIPLE

COORDINATES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
STATE = 80
"""Numbers of a coordinate's state: h and c of two layers of 20 units."""
MARGIN = 0.85
"""Share of the available memory that a measured meta-step may take by the formula."""
TIMED_COORDINATES = 3_000_000
"""Enough for one timed meta-step; smaller optimizees have more, up to nine."""


class Way(NamedTuple):
    """What a window keeps of the states."""

    name: str
    checkpoint_every: int | None
    history_dtype: str


class Sphere(Task):
    """f(θ) = ½‖θ‖², whose gradient is θ itself."""

    def __init__(self, dim: int) -> None:
        self.num_coordinates = dim

    def init(self, generator):
        """θ0 ~ N(0, I)."""
        return torch.randn(self.num_coordinates, generator=generator)

    def loss(self, theta, batch):
        """½‖θ‖²."""
        return 0.5 * theta.square().sum()

    def losses_and_grads(self, thetas, batches):
        """Without autograd."""
        return 0.5 * torch.linalg.vector_norm(thetas, dim=1).square(), thetas

    def config(self):
        """Its size."""
        return {"dim": self.num_coordinates}


def ways(unroll: int) -> list[Way]:
    """Full histories, every fifth state, and the window's first state alone; each in float32 and bfloat16."""
    found = []
    for name, every in (("full", None), ("every 5", 5), ("first only", unroll)):
        found += [Way(f"{name}, {dtype}", every, dtype) for dtype in ("float32", "bfloat16")]
    return found


def held_bytes(coordinates: int, unroll: int, way: Way) -> dict[str, int]:
    """What a meta-step holds at its fullest, counted.

    Example:
        >>> full = held_bytes(1, 20, Way("full", None, "float32"))
        >>> full == {"running state": 320, "kept states": 6720, "gradients": 84, "cotangents": 400, "θ": 4}
        True
    """
    rounded = way.history_dtype == "bfloat16"
    kept = unroll + 1 if way.checkpoint_every is None else -(-unroll // way.checkpoint_every)
    held = {
        "running state": 4 * STATE * coordinates,
        "kept states": (2 if rounded else 4) * STATE * coordinates * kept,
        "gradients": 4 * coordinates * (unroll + 1),
    }
    if way.checkpoint_every is None and not rounded:
        held["cotangents"] = 4 * coordinates * (unroll + STATE)  # of every update, and of the first state
    else:
        segment = min(way.checkpoint_every or unroll, unroll) + 1
        chunk = max(CHUNK_BYTES // (4 * STATE * segment) // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE
        # Its states, two states' cotangents, and of every step the update's cotangent and the gradient.
        held["chunk"] = 4 * min(chunk, coordinates) * (STATE * (segment + 2) + 2 * unroll)
    held["θ"] = 4 * coordinates
    return held


def run(coordinates: int, unroll: int, way: Way, threads: int) -> dict[str, float]:
    """Runs meta-steps in this process: MiB at its peak and beyond what the imports take, and seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM()
    options = {"checkpoint_every": way.checkpoint_every, "history_dtype": way.history_dtype}

    def start(dim: int) -> Rollout:
        return Rollout(rule, Optimizees(Sphere(dim), None, 0, "train", [0]), **options)

    def meta_step(rollout: Rollout) -> float:
        begun = time.perf_counter()
        rollout.window(unroll).meta_loss.backward()
        return time.perf_counter() - begun

    meta_step(start(dim=10))  # compiles kernels and initialises libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    imported = peak_bytes()
    rollout = start(coordinates)
    first = meta_step(rollout)  # touches its memory for the first time
    repetitions = min(9, max(1, TIMED_COORDINATES // coordinates))
    seconds = statistics.median(meta_step(rollout) for _ in range(repetitions))
    peak = peak_bytes()
    return {
        "peak_mib": peak / 2**20,
        "working_mib": (peak - imported) / 2**20,
        "seconds": seconds,
        "first_seconds": first,
    }


def peak_bytes() -> int:
    """The most of this process that was resident since the peak was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(coordinates: int, unroll: int, way: Way, threads: int) -> dict[str, float]:
    """`run` in a process of its own.

    Raises:
        RuntimeError: The process failed, or was killed for its memory.
    """
    arguments = ["--only", json.dumps([coordinates, unroll, list(way), threads])]
    result = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{coordinates:,} coordinates, {way.name}: exit status {result.returncode}")
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Measures every size and way that fits, computes the others; prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--coordinates", type=int, nargs="+", default=COORDINATES)
    parser.add_argument("--unroll", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--largest", type=int, help="compute sizes above this one, even where they would fit")
    parser.add_argument("--ways", nargs="+", help="their names; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the process that `measure` starts
    args = parser.parse_args()
    if args.only:
        coordinates, unroll, way, threads = json.loads(args.only)
        print(json.dumps(run(coordinates, unroll, Way(*way), threads)))
        return
    chosen = [way for way in ways(args.unroll) if args.ways is None or way.name in args.ways]
    if not chosen:
        parser.error(f"--ways: choose from {', '.join(way.name for way in ways(args.unroll))}")

    print(f"A meta-step of {args.unroll} steps, 2x20 LSTM, {args.threads} threads")
    columns = [
        "coordinates",
        "states kept        ",
        "MiB held",
        "measured MiB",
        "process MiB",
        "seconds",
        "ns",
    ]
    print_row = start_log(columns)
    document = {"origin": origin("cpu"), "unroll": args.unroll, "threads": args.threads}
    document["rows"] = rows = []
    nanoseconds: dict[str, float] = {}
    for coordinates in sorted(args.coordinates):
        for way in chosen:
            held = held_bytes(coordinates, args.unroll, way)
            held_mib = sum(held.values()) / 2**20
            row = {"coordinates": coordinates, **way._asdict(), "held_mib": round(held_mib, 1)}
            too_large = args.largest is not None and coordinates > args.largest
            steps = coordinates * args.unroll
            if too_large or sum(held.values()) > MARGIN * available_bytes():
                row |= {"computed": True, "seconds": None}
                if way.name in nanoseconds:
                    row["seconds"] = round(1e-9 * nanoseconds[way.name] * steps, 1)
                note = f"{row['seconds']:g} computed" if row["seconds"] else "-"
                print_row([f"{coordinates:,}", way.name, f"{held_mib:,.0f}", "computed", "-", note, "-"])
            else:
                measured = measure(coordinates, args.unroll, way, args.threads)
                nanoseconds[way.name] = 1e9 * measured["seconds"] / steps
                row |= {"computed": False, **{key: round(value, 4) for key, value in measured.items()}}
                row["ns_per_coordinate_step"] = round(nanoseconds[way.name], 1)
                cells = [f"{coordinates:,}", way.name, f"{held_mib:,.0f}", f"{measured['working_mib']:,.0f}"]
                cells += [f"{measured['peak_mib']:,.0f}", f"{measured['seconds']:.3f}"]
                print_row([*cells, f"{nanoseconds[way.name]:.0f}"])
            rows.append(row)
            write_json(args.json, document)
    print_table(speed_tables.large_optimizees(document))


if __name__ == "__main__":
    main()
