"""Runs `fit` once in peace, then again and again with SIGKILL at random moments; prints what came of it.

A script of its own: its processes are forked, which is quick, but safe only where no thread has been started.

    python killed_fits.py FOLDER KILLS SEED
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import l2l_lightning.cli.lightning_cli  # noqa: F401 - here, or every fork would first import Lightning
from l2l_lightning.cli import main

OPTIONS = [
    "--data.num_rollouts=24",
    "--model.horizon=12",
    "--model.unroll=5",
    "--model.num_tasks=2",
    "--model.num_validation_optimizees=2",
    "--trainer.val_check_interval=4",
    "--trainer.log_every_n_steps=3",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--latest.every_n_meta_steps=1",
    "--comparison.num_optimizees=2",
    "--comparison.num_tuning_optimizees=2",
    "--comparison.baselines=[sgd]",
    "--wandb=off",
]


def start(arguments, log):
    """Runs `fit` in a forked process; returns its id."""
    child = os.fork()
    if child:
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        main(["fit", *arguments])
    except BaseException:  # an exit, too: nothing may return into the parent's program
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def newest(root):
    """The checkpoint to go on from, if there is one."""
    return next(iter(root.glob("*/2*/checkpoints/last.ckpt")), None)


def run_in_peace(root):
    """One run; returns its seconds."""
    began = time.monotonic()
    _, status = os.waitpid(start([*OPTIONS, f"--trainer.default_root_dir={root}"], root / "log"), 0)
    assert status == 0, (root / "log").read_text()
    return time.monotonic() - began


def run_killed(root, seconds, draw):
    """The same run, killed at a random moment each time it is started, until one comes through; the kills."""
    for kills in range(1000):
        checkpoint = newest(root)
        # One that is killed before its first checkpoint is started anew.
        again = [f"--ckpt_path={checkpoint}"] if checkpoint else OPTIONS
        child = start([*again, f"--trainer.default_root_dir={root}"], root / "log")
        deadline = time.monotonic() + draw.uniform(0.1, 0.6) * seconds
        status = None
        while time.monotonic() < deadline and status is None:
            finished, code = os.waitpid(child, os.WNOHANG)
            status = code if finished else None
            time.sleep(0.001)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            continue
        assert status == 0, (root / "log").read_text()
        return kills
    raise AssertionError("it never came through")


def fresh(folder):
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    folder, wanted, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(seed)
    seconds = run_in_peace(fresh(folder / "peace"))
    kills = []
    while sum(kills) < wanted:
        kills.append(run_killed(fresh(folder / f"killed-{len(kills)}"), seconds, draw))
    print(json.dumps({"seconds": seconds, "kills": kills}))
