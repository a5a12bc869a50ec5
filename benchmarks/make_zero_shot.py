"""Makes the rules "zero-shot", "zero-shot-free" and "zero-shot-elementwise", with their cards, from runs.

    python -m l2l_lightning fit --config zero_shot --seed_everything 0        # and other seeds
    python -m l2l_lightning fit --config zero_shot --model.rule.init_args.orthogonal false
    python benchmarks/make_zero_shot.py RUN_FOLDER ...

Of all checkpoints the one is taken whose mean log held-out loss is least on small problems that no rollout
and no validation was of, at three horizons, and on which nothing is reported: a run's own validation, eleven
problems of 300 steps, is too small to choose by. "zero-shot-free" has the φ of "zero-shot", and goes without
T; "zero-shot-elementwise" is of the runs without orthogonalisation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from make_pretrained import measure, unmoved

from l2l_lightning import MetaLearner, Optimizees, pretrained, run_rule
from l2l_lightning.comparison.baselines import BASELINES
from l2l_lightning.comparison.statistics import summary
from l2l_lightning.data import load_images
from l2l_lightning.files import write_json
from l2l_lightning.provenance import commit, origin
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.rules import ZeroShot
from l2l_lightning.tasks import MNISTMLP, SmallProblem
from l2l_lightning.tasks.small.families import FAMILIES
from l2l_lightning.training import checkpoints

SELECTION_SEED = 10**8
"""The first of the problems that a checkpoint is chosen by."""
SELECTION = 2, (100, 300, 1000), 2
"""Problems of each family, horizons, and optimizees of each problem."""


def log_held_out_loss(rule: ZeroShot) -> float:
    """Returns the mean log held-out loss on the problems that a checkpoint is chosen by."""
    problems, horizons, optimizees = SELECTION
    found = []
    for family in FAMILIES:
        for seed in range(SELECTION_SEED, SELECTION_SEED + problems):
            for horizon in horizons:
                ones = Optimizees(SmallProblem(family, seed), None, 0, "validation", range(optimizees))
                run_rule(rule, ones, horizon)
                found.append(ones.held_out_losses(None).nan_to_num(nan=torch.inf).clamp(1e-8, 1e8).log())
    return float(torch.stack(found).mean())


def baselines(out: Path) -> dict[str, Any]:
    """Returns the tuned baselines on the headline's task, with the images of the package."""
    store, found = ResultStore(Settings(out=str(out))), {}
    for name in BASELINES:
        request = Request(MNISTMLP(), name, 100, 32)
        tuned = store.baseline(request)
        found[name] = summary(store.losses(request)) | {"num_optimizees": 32}
        found[name] |= {"learning_rate": tuned.learning_rate, "setting": tuned.setting}
    return found


def headline(rule: ZeroShot, peers: dict[str, Any]) -> dict[str, Any]:
    """The rule and the tuned baselines on MNIST, 784-20-10, sigmoid, over 100 steps."""
    images = load_images("mnist").test
    losses = run_rule(rule, Optimizees(MNISTMLP(), images, 0, "test", range(32)), 100)
    return {
        "task": MNISTMLP().describe(),
        "data": images.source,
        "horizon": 100,
        "seed": 0,
        "optimizers": {"learned": summary(losses) | {"num_optimizees": 32}} | peers,
        "learning_curve": [round(loss, 5) for loss in losses.double().mean(1).tolist()],
    }


def main() -> None:
    """Writes weights and cards into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("zero_shot_card"), help="where searches are kept")
    args = parser.parse_args()
    runs = [min(Candidate.all_of(folder)) for folder in args.runs]
    peers = baselines(args.out)
    for names, orthogonal in ((("zero-shot", "zero-shot-free"), True), (("zero-shot-elementwise",), False)):
        if alike := [run for run in runs if run.rule.orthogonal == orthogonal]:
            for name in names:
                save(name, alike, peers)


class Candidate(NamedTuple):
    """A run's checkpoint."""

    score: float
    path: Path
    rule: ZeroShot

    @classmethod
    def all_of(cls, folder: Path) -> list[Candidate]:
        """Reads and scores the checkpoints of a run's folder."""
        found = []
        for path in sorted((folder / "checkpoints").glob("*.ckpt")):
            rule = MetaLearner.from_checkpoint(path).rule
            assert isinstance(rule, ZeroShot)
            found.append(cls(log_held_out_loss(rule), path, rule))
            print(f"{path}: {found[-1].score:.4f}")
        return found


def save(name: str, runs: Sequence[Candidate], peers: dict[str, Any]) -> None:
    """Writes weights and card of the best of several runs' candidates, of one rule, into the package."""
    best = min(runs)
    model, checkpoint = MetaLearner.from_checkpoint(best.path), checkpoints.read(best.path)
    section = checkpoint["l2l_lightning"]
    training = {
        "preset": "zero_shot",
        "settings": model.settings(),
        "num_rollouts": section["data"]["num_rollouts"],
        "seed": model.seed,
        "data": "small problems; of images the training parts of digits and of the embedded MNIST subset",
        "meta_steps": section["meta_steps"],
        "best_meta_step": checkpoint["global_step"],
        "log_held_out_loss": best.score,
        "log_held_out_loss_of_all_seeds": sorted(run.score for run in runs),
        "seconds": None,
        **origin("cpu"),
        "start_from": None,
    }
    free = name == "zero-shot-free"
    if free:
        training["note"] = "trained as zero-shot, where T was known; its φ was not fitted anew"
    rule = ZeroShot(**{**best.rule.config(), "horizon_free": free})
    rule.load_state_dict(best.rule.state_dict())
    card = {
        "rule": {"class": "ZeroShot", **rule.config()},
        "meta_training": training,
        "headline": headline(rule, peers),
        "repeatable": measure(rule, MNISTMLP()),
        "known_failures": [unmoved()],
        "generalisation": [],
        "measured_at": commit(),
    }
    package = Path(pretrained.__file__).parent
    pretrained.save(rule, package / f"{name}.safetensors")
    write_json(package / f"{name}.json", card)


if __name__ == "__main__":
    main()
