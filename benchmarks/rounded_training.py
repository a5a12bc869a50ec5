"""Whether a rule that is meta-trained with products rounded to bfloat16 is as good: MNIST, short trainings.

    python benchmarks/rounded_training.py [--seeds 3] [--json FILE]

From each seed's φ a rule is trained in float32, with precision "bf16", and in float32 from a φ that differs
by 10⁻⁴ of itself: how far apart trainings end that differ by nearly nothing. All meet the same networks and
minibatches, in windows of 20 of 100 steps, and are validated on the same ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import speed_tables
import torch
from measuring import print_table, write_json

from l2l_lightning import MNISTMLP, CoordinatewiseLSTM, Optimizees, run_rule
from l2l_lightning.comparison.statistics import mean_and_half_width, paired_difference, sum_losses
from l2l_lightning.data import load_images
from l2l_lightning.provenance import origin
from l2l_lightning.rollout.rollout import Rollout

LEARNING_RATE, HORIZON, UNROLL = 5e-3, 100, 20
PERTURBATION = 1e-4
TRAININGS = {"float32": (None, 0.0), "bf16": ("bf16", 0.0), "float32, φ beside it": (None, PERTURBATION)}
"""A rule's precision, and how far its first φ is from the seed's."""


def train(seed: int, rollouts: int, precision: Any, perturbation: float) -> CoordinatewiseLSTM:
    """A rule that has been meta-trained on so many rollouts."""
    torch.manual_seed(seed)
    rule, task, images = CoordinatewiseLSTM(precision=precision), MNISTMLP(), load_images("mnist").train
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.mul_(1 + perturbation * torch.randn(parameter.shape))
    adam = torch.optim.Adam(rule.parameters(), lr=LEARNING_RATE)
    for index in range(rollouts):
        rollout = Rollout(rule, Optimizees(task, images, seed, "train", [index]))
        for _ in range(HORIZON // UNROLL):
            adam.zero_grad()
            torch.autograd.backward(rollout.window(UNROLL).meta_loss)
            torch.nn.utils.clip_grad_norm_(rule.parameters(), 1.0)
            adam.step()
    return rule


def measure(seed: int, rollouts: int, number: int) -> dict[str, Any]:
    """Sums of losses on validation optimizees after each training, and the differences to float32's."""
    sums = {}
    for name, settings in TRAININGS.items():
        ones = Optimizees(MNISTMLP(), load_images("mnist").validation, seed, "validation", range(number))
        sums[name] = sum_losses(run_rule(train(seed, rollouts, *settings), ones, HORIZON))
    means = {name: mean_and_half_width(values) for name, values in sums.items()}
    return {
        "seed": seed,
        "sum_of_losses": {name: {"mean": float(m), "half_width": float(w)} for name, (m, w) in means.items()},
        "difference": {
            name: paired_difference(values, sums["float32"])._asdict()
            for name, values in sums.items()
            if name != "float32"
        },
    }


def main() -> None:
    """Prints the table of trainings, and writes the JSON asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=30)
    parser.add_argument("--optimizees", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    document: dict[str, Any] = {"origin": origin("cpu"), "meta_steps": args.rollouts * HORIZON // UNROLL}
    document |= {"optimizees": args.optimizees, "rows": []}
    for seed in range(args.seeds):
        document["rows"].append(measure(seed, args.rollouts, args.optimizees))
        write_json(args.json, document)
    print_table(speed_tables.rounded_training(document))


if __name__ == "__main__":
    main()
