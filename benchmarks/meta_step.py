"""Time and memory of one meta-training step against peers, in one run on one machine.

    python benchmarks/meta_step.py [--unroll 20 100] [--threads 1] [--jax-python PATH] [--json FILE]

Every program gets the same φ, θ0, minibatches and cores, and runs in a process of its own, so that its peak
resident memory is its own. A ratio is given only if meta-loss and meta-gradient agree.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peers.harness import make_problem
from rich.console import Console
from rich.table import Table

PROGRAMS = Path(__file__).with_name("peers")

TOLERANCE = 1e-3
"""Largest relative difference of the first meta-loss and meta-gradient (float32 sums in other orders)."""


def measure(python: str, script: Path, problem: Path, threads: int) -> dict:
    """One program on the first `threads` cores that this process may use: its report, loss and gradient."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    output = problem.with_name(f"{script.stem}.npz")
    result = subprocess.run(
        [python, str(script), "--problem", str(problem), "--output", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),  # limits XLA's thread pool, too
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    with np.load(output) as first:
        return {**json.loads(result.stdout.splitlines()[-1]), **first}


def disagreement(a: dict, b: dict) -> float:
    """The larger relative difference of two programs' first meta-losses and meta-gradients."""
    return max(
        float(np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name])) for name in ("loss", "gradient")
    )


def machine(jax_version: str | None) -> dict:
    """What the numbers depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    git = ["git", "-C", str(PROGRAMS), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "jax": jax_version,
        "commit": commit or None,
    }


def main() -> None:
    """Measures every combination of threads, window and number of tasks; prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unroll", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--num-tasks", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--jax-python", default=sys.executable, help="an interpreter that has jax")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()

    peers = {"autograd": (sys.executable, PROGRAMS / "autograd_unroll.py")}
    if args.jax_python != sys.executable or importlib.util.find_spec("jax"):
        peers = {"jax": (args.jax_python, PROGRAMS / "jax_scan.py"), **peers}
    else:
        console.print("jax is not installed: no ratio to it (pip install jax, or --jax-python)")

    table = Table(title="One meta-step: 15,910 coordinates per task, 2x20 LSTM, batch 128")
    columns = ["threads", "unroll", "tasks", "ours\nms"]
    columns += [f"{name}\n/ ours" for name in peers] + [f"{name}\nMiB" for name in ("ours", *peers)]
    for column in columns:
        table.add_column(column, justify="right")

    rows, jax_version = [], None
    for threads in args.threads:
        for unroll in args.unroll:
            for num_tasks in args.num_tasks:
                with tempfile.TemporaryDirectory() as directory:
                    problem = Path(directory) / "problem.npz"
                    make_problem(problem, unroll, num_tasks, args.reps)
                    ours = measure(sys.executable, PROGRAMS / "ours.py", problem, threads)
                    reports = {name: measure(*peer, problem, threads) for name, peer in peers.items()}
                jax_version = reports.get("jax", {}).get("version")
                ratio = {}
                for name, report in reports.items():
                    if (difference := disagreement(ours, report)) < TOLERANCE:
                        ratio[name] = round(report["ms"] / ours["ms"], 3)
                    else:
                        console.print(
                            f"[red]{name} disagrees by {difference:.1e} at unroll {unroll}: no ratio"
                        )
                memory = {name: round(r["peak_mib"]) for name, r in {"ours": ours, **reports}.items()}
                row = {
                    "threads": threads,
                    "unroll": unroll,
                    "num_tasks": num_tasks,
                    "ours_ms": round(ours["ms"], 1),
                    "ratio": ratio,
                    "peak_mib": memory,
                }
                rows.append(row)
                ratios = [f"{ratio[name]:.2f}" if name in ratio else "-" for name in peers]
                cells = [threads, unroll, num_tasks, row["ours_ms"], *ratios, *memory.values()]
                table.add_row(*map(str, cells))
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(jax_version), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
