"""Meta-steps a second of one process and of several, one thread each, and the share of communication (CPU).

    python benchmarks/devices.py [--processes 2] [--meta-steps 40] [--repetitions 3] [--json FILE]

Every row is a `Trainer.fit` in processes of its own, each kept on one core: one process with k tasks, one
with all N·k, N separate ones with k tasks each (the most that the machine gives), and N with k tasks under
`ddp`. From these, in one run and interleaved:

- weak scaling: the rate of N processes over that of one, at k tasks for each; and over that of separate ones;
- strong scaling: the rate of N processes over that of one that has all N·k tasks.

Communication is every all-reduce, from the call to the result: DDP's of the meta-gradient (in a hook that
does what DDP does; as the meta-gradient is ready all at once, there is nothing that it could overlap with)
and those of logged values. It includes waiting for the slowest process; "transfer" is an all-reduce of the
meta-gradient's size when nobody has to be waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import speed_tables
import torch
from lightning.pytorch import Callback, Trainer
from measuring import print_table, start_log, write_json
from torch import distributed

from l2l_lightning import MNISTMLP, CoordinatewiseLSTM, MetaData, MetaLearner, Quadratic
from l2l_lightning.provenance import origin
from l2l_lightning.rules import ZeroShot
from l2l_lightning.tasks import SmallProblem, Task

UNROLL = 20
WARM_UP = 5
"""Meta-steps that are not counted."""
TASKS = {"mnist": 1, "quadratic": 8, "zero-shot": 4}
"""k: optimizees of each process; of "zero-shot", whose meta-steps are whole rollouts, pairs of them."""


class Arrangement(NamedTuple):
    """How many processes, whether they communicate, and the tasks of each."""

    name: str
    processes: int
    ddp: bool
    num_tasks: int


def arrangements(processes: int, num_tasks: int) -> list[Arrangement]:
    """The four that are compared."""
    return [
        Arrangement("one", 1, False, num_tasks),
        Arrangement("one, all tasks", 1, False, processes * num_tasks),
        Arrangement("separate", processes, False, num_tasks),
        Arrangement("ddp", processes, True, num_tasks),
    ]


class Stopwatch(Callback):
    """Times meta-steps, and within them every all-reduce."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.communication: list[float] = []
        self._seconds = 0.0

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """From here on every all-reduce is timed."""
        if not distributed.is_initialized():
            return
        all_reduce = distributed.all_reduce

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            work = all_reduce(*arguments, **options)
            self._seconds += time.perf_counter() - start
            return work

        def hook(_, bucket):  # without annotations: DDP would want more than strings
            timed(bucket.buffer().div_(trainer.world_size))
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        distributed.all_reduce = timed
        trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_batch_end(self, *_: Any) -> None:
        """A meta-step is done."""
        self.ends.append(time.perf_counter())
        self.communication.append(self._seconds)
        self._seconds = 0.0


def transfer_seconds(size: int) -> float:
    """An all-reduce of so many numbers, right after another: no process has to be waited for."""
    values, times = torch.zeros(size), []
    for _ in range(100):
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(values)
        times.append(time.perf_counter() - start)
    return median(times)


def work(problem: str, num_tasks: int, meta_steps: int, ddp: bool, folder: Path) -> None:
    """One process's part: fits, and writes down what its stopwatch says."""
    if problem == "zero-shot":
        task: Task = SmallProblem("image_perceptron")
        options = {"horizon": UNROLL, "estimator": "evolution", "loss_weights": "held_out"}
        model = MetaLearner(task, ZeroShot(), num_tasks=num_tasks, **options)
    else:
        task, rule = MNISTMLP() if problem == "mnist" else Quadratic(), CoordinatewiseLSTM()
        model = MetaLearner(task, rule, horizon=5 * UNROLL, unroll=UNROLL, num_tasks=num_tasks)
    stopwatch = Stopwatch()
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]) if ddp else 1,
        strategy="ddp" if ddp else "auto",
        max_steps=WARM_UP + meta_steps,
        limit_val_batches=0,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[stopwatch],
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=MetaData(num_rollouts=WARM_UP + meta_steps))
    seconds = [later - earlier for earlier, later in pairwise(stopwatch.ends[WARM_UP - 1 :])]
    measured = {
        "seconds": median(seconds),
        "communication": sum(stopwatch.communication[WARM_UP:]) / sum(seconds),
        "transfer": transfer_seconds(sum(p.numel() for p in model.parameters())) if ddp else 0.0,
    }
    (folder / f"{os.getpid()}.json").write_text(json.dumps(measured))
    if ddp:
        distributed.destroy_process_group()


def measure(problem: str, arrangement: Arrangement, meta_steps: int) -> dict[str, float]:
    """Means over the processes of an arrangement: a meta-step's seconds, share of communication, transfer."""
    cores = sorted(os.sched_getaffinity(0))[: arrangement.processes]
    with tempfile.TemporaryDirectory() as folder:
        script = [__file__, f"--work={folder}", f"--problem={problem}", f"--meta-steps={meta_steps}"]
        script.append(f"--num-tasks={arrangement.num_tasks}")
        if arrangement.ddp:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(cores)}"]
            programs = [([*torchrun, *script, "--ddp"], cores)]
        else:
            programs = [(script, [core]) for core in cores]
        started = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", "CORES": json.dumps(theirs)},
                stdout=subprocess.DEVNULL,
            )
            for arguments, theirs in programs
        ]
        codes = [program.wait() for program in started]
        if any(codes):
            raise SystemExit(f"{arrangement} failed: see above")
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    assert len(found) == arrangement.processes
    return {key: sum(process[key] for process in found) / len(found) for key in found[0]}


def scaling(rates: dict[str, float], processes: int) -> dict[str, float]:
    """Ratios of meta-steps a second; at best 1 for the weak ones, the number of processes for the strong."""
    return {
        "weak": round(rates["ddp"] / rates["one"], 3),
        "weak_against_separate": round(rates["ddp"] / rates["separate"], 3),
        "strong": round(rates["ddp"] / rates["one, all tasks"], 3),
        "processes": processes,
    }


def main() -> None:
    """Measures every problem and arrangement; prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--meta-steps", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--problem", choices=list(TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--num-tasks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ddp", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        os.sched_setaffinity(0, {json.loads(os.environ["CORES"])[int(os.environ.get("LOCAL_RANK", 0))]})
        work(args.problem, args.num_tasks, args.meta_steps, args.ddp, args.work)
        return
    if args.processes > len(os.sched_getaffinity(0)):
        parser.error(f"--processes {args.processes} need as many cores")

    document: dict[str, Any] = {"origin": origin("cpu"), "unroll": UNROLL, "rows": [], "scaling": {}}
    for problem, num_tasks in TASKS.items():
        print(f"{problem}, windows of {UNROLL} steps, one thread a process")
        rows = []
        compared = arrangements(args.processes, num_tasks)
        runs = [
            {arrangement: measure(problem, arrangement, args.meta_steps) for arrangement in compared}
            for _ in range(args.repetitions)
        ]
        print_row = start_log(
            ["processes", "arrangement   ", "tasks each", "meta-steps/s", "communication", "transfer ms"]
        )
        for arrangement in compared:
            of_runs = {key: [run[arrangement][key] for run in runs] for key in runs[0][arrangement]}
            row = {
                "problem": problem,
                **arrangement._asdict(),
                "meta_steps_per_s": round(1 / median(of_runs["seconds"]), 3),
                "meta_steps_per_s_of_each": [round(1 / seconds, 3) for seconds in of_runs["seconds"]],
                "communication": round(median(of_runs["communication"]), 4),
                "transfer_ms": round(1e3 * median(of_runs["transfer"]), 3),
            }
            rows.append(row)
            shown = ("processes", "name", "num_tasks", "meta_steps_per_s", "communication", "transfer_ms")
            print_row([row[key] for key in shown])
        rates = {row["name"]: row["meta_steps_per_s"] for row in rows}
        document["rows"] += rows
        document["scaling"][problem] = found = scaling(rates, args.processes)
        print(", ".join(f"{name} {value}" for name, value in found.items()), end="\n\n")
        write_json(args.json, document)
    print_table(speed_tables.processes(document))


if __name__ == "__main__":
    main()
