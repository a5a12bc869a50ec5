"""Makes a rule that ships with the package, and its card, from a run of `fit --config mnist`.

    python benchmarks/make_pretrained.py RUN --checkpoint CHECKPOINT --name lstm-mnist --data-root FOLDER

RUN is the run's folder: its summary and curves give the card's headline, on full MNIST's test images. The
figures on the subset that the package ships, which a test repeats, and on other networks are measured here.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import torch

from l2l_lightning import MetaLearner, Optimizees, pretrained, run_rule
from l2l_lightning.baselines import final_losses
from l2l_lightning.data import load_images
from l2l_lightning.data.images import Images
from l2l_lightning.evaluation import Interval
from l2l_lightning.provenance import commit
from l2l_lightning.rules import UpdateRule
from l2l_lightning.tasks import MNISTMLP

TRANSFER = [
    (MNISTMLP(), 200),
    (MNISTMLP(), 1000),
    (MNISTMLP([40]), 100),
    (MNISTMLP([20, 20]), 100),
    (MNISTMLP(activation="tanh"), 100),
    (MNISTMLP(activation="relu"), 100),
    (MNISTMLP(activation="elu"), 100),
]


def measure(rule: UpdateRule, task: MNISTMLP, images: Images, horizon: int, num_optimizees: int) -> dict:
    """Final loss and sum of the first 100 losses on test optimizees of seed 0."""
    optimizees = Optimizees(task, images, 0, "test", range(num_optimizees))
    losses = run_rule(rule, optimizees, horizon)
    return {
        "task": task.describe(),
        "data": images.source,
        "seed": 0,
        "num_optimizees": num_optimizees,
        "horizon": horizon,
        "final_loss": Interval.of(final_losses(losses)).as_json(),
        "sum_of_100_losses": Interval.of(losses[:100].sum(0)).as_json(),
        "not_finite": int((~losses.isfinite()).any(0).sum()),
    }


def learning_curve(path: Path) -> list[float]:
    """The learned optimizer's mean loss at every step."""
    losses = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["optimizer"] == "learned":
                losses[int(row["step"])].append(float(row["loss"]))
    return [round(sum(losses[step]) / len(losses[step]), 5) for step in sorted(losses)]


def main() -> None:
    """Writes the weights and the card into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data-root", required=True, help="folder of all of MNIST")
    args = parser.parse_args()
    summary = json.loads((args.run / "summary.json").read_text(encoding="utf-8"))
    model = MetaLearner.from_checkpoint(args.checkpoint)
    full, subset = (load_images("mnist", root).test for root in (args.data_root, None))
    full = type(full)(full.pixels, full.labels, "MNIST, the 10,000 test images")
    card = {
        "rule": {"class": type(model.rule).__name__, **model.rule.config()},
        "meta_training": {
            "preset": "mnist",
            "settings": model.settings(),
            "data": "MNIST, the first 50,000 training images",
            **{key: summary[key] for key in ("seed", "commit", "device", "versions")},
            "meta_step": torch.load(args.checkpoint, weights_only=True)["global_step"],
        },
        "headline": {
            "data": full.source,
            **{key: summary[key] for key in ("task", "horizon", "num_optimizees", "seed", "optimizers")},
            "learning_curve": learning_curve(args.run / "curves.csv"),
        },
        "subset": measure(model.rule, MNISTMLP(), subset, 100, 32),
        "transfer": [measure(model.rule, task, full, horizon, 16) for task, horizon in TRANSFER],
        "measured_at": commit(),
    }
    folder = Path(pretrained.__file__).parent
    pretrained.save(model.rule, folder / f"{args.name}.safetensors")
    (folder / f"{args.name}.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
