"""Time and memory of one meta-training step against peers, in one run on one machine.

    python benchmarks/meta_step.py [--unroll 20 100] [--threads 1 all] [--jax-python PATH] [--json FILE]
    python benchmarks/meta_step.py --instruction-set avx2 [--threads all] [--json FILE]
    python benchmarks/meta_step.py --device cuda [--threads all] [--json FILE]

The peers: jax, a strong one; plain, PyTorch as it is commonly written, torch.nn.LSTMCell unrolled; autograd,
the same with a cell that was written for speed. Every program gets the same φ, θ0, minibatches and cores, and
runs in a process of its own, so that its peak memory is its own: all that was resident, and what its work
took beyond its imports (on a GPU, the device's). A ratio is the peer's time over ours, and is given only if
meta-loss and meta-gradient agree. On the CPU the tables of scaling.py follow.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import speed_tables
from measuring import print_table, start_log, write_json
from peers.harness import N, make_problem
from scaling import measure_scaling

from l2l_lightning.provenance import origin

PROGRAMS = Path(__file__).with_name("peers")

TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}
"""Largest relative difference of the first meta-loss and meta-gradient: on the CPU float32 sums in other
orders; on a GPU also matrix products that round their operands to TF32's 11 bits."""

INSTRUCTION_SETS = {
    "avx2": {
        "L2L_KERNELS_TARGET": "x86-64-v3",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}
"""What holds all programs to the instructions of a processor other than this one."""

LIMIT_S = 3600.0
"""The most seconds of one program, unless told otherwise."""

TARGETS = {"cpu": {"plain": 4.0, "jax": 2.0}, "cuda": {"plain": 20.0, "jax": 3.0}}
"""The least ratios that are asked for, by device."""


class Program(NamedTuple):
    """One of the measured programs and what it is run with."""

    name: str
    python: str
    script: str
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def programs(device: str, jax_python: str | None) -> list[Program]:
    """Ours first, then its peers, those that are asked about first: time may run out."""
    ours = Program("ours", sys.executable, "ours.py")
    plain = Program("plain", sys.executable, "plain_unroll.py")
    # Without preallocation its peak is what it uses.
    environment = (("JAX_PLATFORMS", device), ("XLA_PYTHON_CLIENT_PREALLOCATE", "false"))
    jax = Program("jax", jax_python or "", "jax_scan.py", (), environment)
    if device == "cpu":
        peers = [jax, plain, Program("autograd", sys.executable, "autograd_unroll.py")]
    else:
        # On a GPU JAX multiplies float32 in TF32 unless told, which may differ by more than the tolerance.
        exact = (*environment, ("JAX_DEFAULT_MATMUL_PRECISION", "highest"))
        eager = ours._replace(name="ours_eager", arguments=("--no-cuda-graphs",))
        peers = [plain, jax._replace(name="jax_float32", environment=exact), eager]
    return [ours, *(peer for peer in peers if jax_python or peer.script != jax.script)]


def measure(program: Program, problem: Path, device: str, threads: int, limit_s: float) -> dict:
    """A program on the first `threads` cores that this process may use: its report, loss and gradient."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    output = problem.with_name(f"{program.name}.npz")
    command = [program.python, str(PROGRAMS / program.script), "--problem", str(problem)]
    try:
        result = subprocess.run(
            [*command, "--output", str(output), "--device", device, *program.arguments],
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "MKL_NUM_THREADS": str(threads),
                **dict(program.environment),
            },
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # limits XLA's thread pool, too
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"more than --limit-s {limit_s:g}"}
    if result.returncode != 0:
        return {"failure": f"exit status {result.returncode}"}
    with np.load(output) as first:
        return {**json.loads(result.stdout.splitlines()[-1]), **first}


def disagreement(a: dict, b: dict) -> float:
    """The larger relative difference of two programs' first meta-losses and meta-gradients, or NaN."""
    differences = [np.linalg.norm(a[key] - b[key]) / np.linalg.norm(b[key]) for key in ("loss", "gradient")]
    return float(np.max(differences))  # Python's max would drop a NaN


def compare(reports: dict[str, dict], device: str) -> dict:
    """Times, memory and ratios of programs on one problem; no ratio to one that failed or disagrees."""
    ran = {name: report for name, report in reports.items() if "failure" not in report}
    row = {
        "ms": {name: round(report["ms"], 3) for name, report in ran.items()},
        "ratio": {},
        "disagreement": {},
        "peak_mib": {name: round(report["peak_mib"]) for name, report in ran.items()},
        "working_mib": {name: round(report["working_mib"]) for name, report in ran.items()},
        "device_mib": {name: round(r["device_mib"], 1) for name, r in ran.items() if r["device_mib"]},
        "failures": {name: r["failure"] for name, r in reports.items() if "failure" in r},
        "meets_target": {},
    }
    if "ours" not in ran:
        return row
    for name, report in ran.items():
        if name == "ours":
            continue
        difference = disagreement(ran["ours"], report)
        row["disagreement"][name] = difference if np.isfinite(difference) else None
        if difference < TOLERANCE[device]:
            ratio = row["ratio"][name] = round(report["ms"] / ran["ours"]["ms"], 3)
            if least := TARGETS.get(device, {}).get(name.removesuffix("_float32")):
                row["meets_target"][name] = ratio >= least
    return row


def meta_step_ns(num_tasks: int, unroll: int, threads: int) -> float:
    """Nanoseconds that our meta-step takes for a coordinate and inner step."""
    [ours] = [program for program in programs("cpu", None) if program.name == "ours"]
    with tempfile.TemporaryDirectory() as directory:
        problem = Path(directory) / "problem.npz"
        make_problem(problem, unroll, num_tasks, reps=5 if num_tasks * unroll <= 500 else 3)
        report = measure(ours, problem, "cpu", threads, LIMIT_S)
    return 1e6 * report["ms"] / (N * num_tasks * unroll)


def number_of_threads(text: str) -> int:
    """A number, or "all" for every core that this process may use."""
    return len(os.sched_getaffinity(0)) if text == "all" else int(text)


def main() -> None:
    """Measures every combination of threads, window and number of tasks; prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=list(TOLERANCE), default="cpu")
    parser.add_argument("--unroll", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--num-tasks", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=number_of_threads, nargs="+", help='numbers, or "all"')
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument(
        "--instruction-set",
        choices=INSTRUCTION_SETS,
        help="hold all programs to it; default: the machine's own",
    )
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="the most seconds of one program")
    parser.add_argument("--jax-python", default=sys.executable, help="an interpreter that has jax")
    parser.add_argument("--scaling", action=argparse.BooleanOptionalAction, help="default: on the CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ |= INSTRUCTION_SETS.get(args.instruction_set, {})
    all_threads = number_of_threads("all")
    args.threads = args.threads or sorted({1, all_threads})
    args.scaling = args.device == "cpu" if args.scaling is None else args.scaling

    has_jax = args.jax_python != sys.executable or importlib.util.find_spec("jax")
    if not has_jax:
        print("jax is not installed: no ratio to it (pip install jax, or --jax-python)")
    measured = programs(args.device, args.jax_python if has_jax else None)
    names = [program.name for program in measured]

    print(f"One meta-step on {args.device}: 15,910 coordinates per task, 2x20 LSTM, batch 128")
    columns = ["threads", "unroll", "tasks", "ours ms", *(f"{name}/ours" for name in names[1:])]
    kinds = ["peak_mib", "working_mib"] if args.device == "cpu" else ["device_mib"]
    order = ", ".join(names)
    columns += [f"{kind.replace('_mib', ' MiB')}: {order}" for kind in kinds]
    print_row = start_log(columns)

    document = {"origin": origin(args.device) | {"jax": None}, "tolerance": TOLERANCE[args.device]}
    document["instruction_set"] = args.instruction_set or "the machine's own"
    document["targets"] = TARGETS.get(args.device, {})
    document["rows"] = rows = []
    for threads in args.threads:
        for unroll in args.unroll:
            for num_tasks in args.num_tasks:
                with tempfile.TemporaryDirectory() as directory:
                    problem = Path(directory) / "problem.npz"
                    make_problem(problem, unroll, num_tasks, args.reps)
                    reports: dict[str, dict] = {}
                    row: dict[str, Any] = {"threads": threads, "unroll": unroll, "num_tasks": num_tasks}
                    rows.append(row)
                    for program in measured:
                        report = measure(program, problem, args.device, threads, args.limit_s)
                        reports[program.name] = report
                        if program.script == "jax_scan.py":
                            document["origin"]["jax"] = report.get("version")
                        row |= compare(reports, args.device)
                        write_json(args.json, document)  # what comes next may be cut short
                cells = [threads, unroll, num_tasks, row["ms"].get("ours", "-")]
                cells += [row["ratio"].get(name, "-") for name in names[1:]]
                cells += [", ".join(str(row[kind].get(name, "-")) for name in names) for kind in kinds]
                print_row(cells)
                for name, failure in row["failures"].items():
                    print(f"{name} failed: {failure}", flush=True)
                for name in row["disagreement"].keys() - row["ratio"].keys():
                    print(f"{name} disagrees by {row['disagreement'][name]}: no ratio", flush=True)
    print_table(speed_tables.meta_step(document))
    print_table(speed_tables.meta_step_memory(document))
    if args.scaling:
        document["scaling"] = measure_scaling(all_threads, partial(meta_step_ns, threads=all_threads))
        write_json(args.json, document)
    # JAX may be unable to run on this device, or to agree in TF32; the others must.
    needed = [name for name in names[1:] if not name.startswith("jax")]
    if not all(name in row["ratio"] for row in rows for name in needed):
        raise SystemExit("a program failed or disagrees: see above")


if __name__ == "__main__":
    main()
