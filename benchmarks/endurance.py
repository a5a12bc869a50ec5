"""Whether memory grows over a long meta-training: resident memory and objects every 100 meta-steps (CPU).

    python benchmarks/endurance.py --json FILE

The command line's own `fit` on small quadratics: its trainer, callbacks, CSV log and checkpoints, with a
validation every 100 meta-steps, but neither Weights & Biases nor the final comparison. What is looked at is
the growth after a warm-up, by least squares.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import speed_tables
import torch
from lightning.pytorch import Callback
from measuring import print_table, start_log, write_json

from l2l_lightning.cli import presets
from l2l_lightning.cli.lightning_cli import MetaLearningCLI
from l2l_lightning.provenance import origin

EVERY = 100
"""Meta-steps between two samples, and between two validations."""
UNROLL, WINDOWS = 5, 4
"""Inner steps of a window, and windows of a rollout."""
WARM_UP = 0.25
"""The part of the run that the slopes leave out: allocators and caches fill up at first."""


class Sample(NamedTuple):
    """What was there after so many meta-steps."""

    meta_steps: int
    rss_kib: int
    objects: int
    tensors: int


class Sampler(Callback):
    """Looks at the process before the validation that follows."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._print_row = start_log(["meta-steps", "RSS KiB   ", "objects", "tensors"])

    def on_train_batch_end(self, trainer, *_):
        """Takes and prints a sample."""
        if trainer.global_step % EVERY:
            return
        gc.collect()  # what is unreachable is no growth
        objects = gc.get_objects()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
        others = len(objects) - len(self.samples)
        sample = Sample(trainer.global_step, resident_kib(), others, tensors)
        self.samples.append(sample)
        if trainer.global_step % (5 * EVERY) == 0:
            self._print_row(sample)


def resident_kib() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def slope(samples: list[Sample], name: str) -> float:
    """Growth for 1,000 meta-steps, by least squares."""
    rows = torch.tensor([[s.meta_steps / 1000, getattr(s, name)] for s in samples], dtype=torch.float64)
    steps, values = (rows - rows.mean(0)).T
    return float(steps @ values / (steps @ steps))


def run(meta_steps: int, folder: str) -> list[Sample]:
    """A meta-training of this length, as `fit` does it."""
    options = {
        "config": presets()["quadratic"],
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": folder,
        "trainer.val_check_interval": EVERY,
        "trainer.enable_progress_bar": "false",
        "data.num_rollouts": meta_steps // WINDOWS,
        "model.horizon": UNROLL * WINDOWS,
        "model.unroll": UNROLL,
        "model.num_tasks": 4,
        "model.num_validation_optimizees": 4,
        # It is to run to its end, whatever it learns.
        "early_stopping.patience": meta_steps,
        "collapse.start_patience": meta_steps,
        "collapse.patience": meta_steps,
    }
    cli = MetaLearningCLI.build([f"--{name}={value}" for name, value in options.items()], run=False)
    sampler = Sampler()
    cli.trainer.callbacks.append(sampler)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return sampler.samples


def main() -> None:
    """Runs, prints the slopes, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        samples = run(args.meta_steps, folder)
    seconds = time.perf_counter() - begun
    late = [sample for sample in samples if sample.meta_steps > WARM_UP * args.meta_steps]
    slopes = {name: round(slope(late, name), 3) for name in ("rss_kib", "objects", "tensors")}
    print(f"After the first {WARM_UP:.0%}, what grows for 1,000 meta-steps; {seconds:.0f} s in all")
    document = {
        "origin": origin("cpu"),
        "meta_steps": args.meta_steps,
        "seconds": round(seconds, 1),
        "warm_up": WARM_UP,
        "growth_per_1000_meta_steps": slopes,
        "samples": [sample._asdict() for sample in samples],
    }
    print_table(speed_tables.growth(document))
    write_json(args.json, document)


if __name__ == "__main__":
    main()
