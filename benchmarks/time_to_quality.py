"""How long meta-training on MNIST takes until the learned rule's sum of losses is below tuned Adam's.

    python benchmarks/time_to_quality.py [--device cuda] [--budget-s 45] [--data-root FOLDER] [--json FILE]

The recipe is that of the preset `mnist`, in a plain loop and scaled to a budget of seconds: windows of 20
steps for its first tenth, whole rollouts for the rest, Adam on φ with a cosine rate, clipping, averaged φ.
The clock counts meta-training alone, neither tuning nor evaluation, nor what is compiled and recorded on
first use: a window of each length is thrown away before it starts.
Both optimizers run on the same validation optimizees; Adam's learning rate and βs are tuned on others.

The plain implementation (peers/plain_unroll.py: torch.nn.LSTMCell, unrolled, autograd) is given the same
meta-steps: a few of each window length are timed at the end, and what it would have taken is their sum.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import quality_tables
import torch
from measuring import print_table, start_log, write_json

from l2l_lightning.comparison.baselines import BASELINES, run_baseline
from l2l_lightning.comparison.tuning import tune
from l2l_lightning.data import load_images
from l2l_lightning.provenance import origin
from l2l_lightning.rollout.optimizees import Optimizees, derive_generator
from l2l_lightning.rollout.rollout import Rollout, Workspace, run_rule
from l2l_lightning.rules import CoordinatewiseLSTM
from l2l_lightning.tasks import MNISTMLP

# As l2l_lightning/configs/mnist.yaml has them.
SHORT_WINDOW, SHORT_SHARE = 20, 0.1
PLAIN_REPETITIONS = 3
NUM_TASKS, LEARNING_RATE, WARMUP_STEPS, CLIP, AVERAGING = 2, 0.005, 10, 1.0, 0.98


class Clock:
    """Seconds of meta-training: it stands still while anything else is done."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Runs on."""
        self._started = time.perf_counter()

    def read(self) -> float:
        """The seconds so far, all that the device has yet to do included."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return self.seconds + time.perf_counter() - (self._started or 0.0)

    def stop(self) -> None:
        """Stands still."""
        self.seconds = self.read()


def plain_seconds(rule: CoordinatewiseLSTM, optimizees: Optimizees, steps: Counter[int]) -> float:
    """What the plain implementation takes for as many meta-steps of each window length, [length] to count."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    import plain_unroll

    images = optimizees.images
    problem = {
        "images": images.pixels.cpu().numpy(),
        "labels": images.labels.cpu().numpy(),
        "theta": optimizees.theta.cpu().numpy(),
        "phi": rule.phi().detach().cpu().numpy(),
    }
    device = optimizees.device
    meta_step = plain_unroll.prepare(problem, argparse.Namespace(device=device))
    total = 0.0
    for length, count in sorted(steps.items()):
        seconds = []
        for _ in range(PLAIN_REPETITIONS + 1):
            indices = optimizees.draw(length + 1).cpu().numpy()
            start = time.perf_counter()
            meta_step(indices)  # ends with a number on the host
            seconds.append(time.perf_counter() - start)
        total += count * statistics.median(seconds[1:])
    return total


def main() -> None:
    """Tunes Adam, meta-trains for the budget, evaluates every so often; prints the curve, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-s", type=float, default=45, help="seconds of meta-training")
    parser.add_argument("--evaluations", type=int, default=20, help="how often within the budget")
    parser.add_argument("--optimizees", type=int, default=16, help="to evaluate on, and to tune on")
    parser.add_argument("--horizon", type=int, default=100)
    parser.add_argument("--data-root", help="folder of all of MNIST; default: the subset in the package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, horizon, seed = args.device, args.horizon, args.seed

    task = MNISTMLP()
    splits = load_images("mnist", args.data_root)
    train, validation = splits.train.to(device), splits.validation.to(device)

    def validation_optimizees() -> Optimizees:
        return Optimizees(task, validation, seed, "validation", range(args.optimizees), device)

    adam = tune(
        task,
        validation,
        [horizon],
        seed,
        num_optimizees=args.optimizees,
        baselines=[BASELINES["adam"]],
        device=device,
    )[horizon]["adam"]
    adam_losses = run_baseline(
        adam.baseline, adam.learning_rate, validation_optimizees(), horizon, setting=adam.setting
    )
    adam_sum = float(adam_losses.sum(0).mean())
    chosen = f"learning rate {adam.learning_rate:g} {adam.setting or ''}"
    print(f"tuned Adam ({chosen}): sum of {horizon} losses {adam_sum:.4g}")

    rule = CoordinatewiseLSTM()
    rule.reset_parameters(derive_generator(seed, "phi", 0))
    rule.to(device)
    average = copy.deepcopy(rule)
    parameters, averaged = list(rule.parameters()), list(average.parameters())
    meta_optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)

    document = {
        "origin": origin(device),
        "seed": seed,
        "data_source": splits.train.source,
        "budget_s": args.budget_s,
        "horizon": horizon,
        "optimizees": args.optimizees,
        "adam": {"learning_rate": adam.learning_rate, "setting": adam.setting, "sum_of_losses": adam_sum},
        "reached_s": None,
        "plain_s": None,
        "curve": [],
    }
    print_row = start_log(["seconds", "meta-steps", "sum of losses"])

    def evaluate(seconds: float, meta_step: int) -> None:
        """Adds a point to the curve; null for a sum that is not finite, which JSON cannot hold."""
        total = float(run_rule(average, validation_optimizees(), horizon).sum(0).mean())
        if document["reached_s"] is None and total < adam_sum:
            document["reached_s"] = seconds
        point = {"seconds": seconds, "meta_step": meta_step}
        document["curve"].append(point | {"sum_of_losses": total if math.isfinite(total) else None})
        print_row([f"{seconds:.1f}", meta_step, f"{total:.4g}"])
        write_json(args.json, document)

    workspace = Workspace()
    for window in (SHORT_WINDOW, horizon):
        first = Optimizees(task, train, seed, "train", range(NUM_TASKS), device)
        Rollout(rule, first, workspace).window(min(window, horizon)).meta_loss.backward()
    evaluate(0.0, 0)
    clock, rollout, num_rollouts, meta_step, skipped = Clock(device), None, 0, 0, 0
    steps: Counter[int] = Counter()  # meta-steps by window length, until Adam was reached
    clock.start()
    while (share := (seconds := clock.read()) / args.budget_s) < 1:
        if seconds >= args.budget_s / args.evaluations * len(document["curve"]):
            clock.stop()
            evaluate(seconds, meta_step)
            clock.start()
        if rollout is None or rollout.steps_done >= horizon:
            indices = range(num_rollouts * NUM_TASKS, (num_rollouts + 1) * NUM_TASKS)
            rollout = Rollout(rule, Optimizees(task, train, seed, "train", indices, device), workspace)
            num_rollouts += 1
        window = SHORT_WINDOW if share < SHORT_SHARE or rollout.steps_done else horizon
        window = min(window, horizon - rollout.steps_done)
        warmup = min(1.0, (meta_step + 1) / (WARMUP_STEPS + 1))
        meta_optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * share))
        meta_optimizer.zero_grad()
        rollout.window(window).meta_loss.backward()
        if document["reached_s"] is None:
            steps[window] += 1
        if torch.nn.utils.clip_grad_norm_(parameters, CLIP).isfinite():
            meta_optimizer.step()
            meta_step += 1
        else:  # it must not reach Adam's moments; and the rollout that gave it is lost
            rollout, skipped = None, skipped + 1
        with torch.no_grad():
            for mean, value in zip(averaged, parameters, strict=True):
                mean.lerp_(value, 1 - AVERAGING if meta_step > 1 else 1.0)
    clock.stop()
    document["skipped_meta_steps"] = skipped
    evaluate(clock.seconds, meta_step)
    reached = document["reached_s"]
    if not reached:
        print("tuned Adam was not reached" if reached is None else "below tuned Adam from the start")
        return
    indices = range(num_rollouts * NUM_TASKS, (num_rollouts + 1) * NUM_TASKS)
    plain = plain_seconds(rule, Optimizees(task, train, seed, "train", indices, device), steps)
    document["plain_s"] = plain
    write_json(args.json, document)
    print_table(quality_tables.time_to_quality(document))


if __name__ == "__main__":
    main()
