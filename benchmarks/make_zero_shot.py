"""Makes the rules "zero-shot", "zero-shot-free" and "zero-shot-elementwise", with their cards, from runs.

    python -m l2l_lightning fit --config zero_shot --seed_everything 0        # and other seeds
    python -m l2l_lightning fit --config zero_shot --model.rule.init_args.orthogonal false
    python benchmarks/make_zero_shot.py RUN_FOLDER ...

Of several runs the one whose best validation is best is taken, on small problems that no rollout was of, and
on which nothing is reported. "zero-shot-free" has the φ of "zero-shot", and goes without T;
"zero-shot-elementwise" is of the runs without orthogonalisation.
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
from l2l_lightning.provenance import commit, device_name, versions
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.rules import ZeroShot
from l2l_lightning.tasks import MNISTMLP
from l2l_lightning.training import checkpoints


def best_checkpoint(folder: Path) -> tuple[float, Path]:
    """Returns the best validation of a run, the mean log held-out loss, and its checkpoint."""
    [path] = (folder / "checkpoints").glob("best-*.ckpt")
    [state] = [
        state
        for key, state in checkpoints.read(path)["callbacks"].items()
        if key.startswith("ModelCheckpoint")
    ]
    return float(state["best_model_score"]), path


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
    runs = [Run.of(folder) for folder in args.runs]
    peers = baselines(args.out)
    for names, orthogonal in ((("zero-shot", "zero-shot-free"), True), (("zero-shot-elementwise",), False)):
        if alike := [run for run in runs if run.rule.orthogonal == orthogonal]:
            for name in names:
                save(name, alike, peers)


class Run(NamedTuple):
    """A run of the preset at its best validation."""

    score: float
    path: Path
    rule: ZeroShot

    @classmethod
    def of(cls, folder: Path) -> Run:
        """Reads a run's folder."""
        score, path = best_checkpoint(folder)
        rule = MetaLearner.from_checkpoint(path).rule
        assert isinstance(rule, ZeroShot)
        return cls(score, path, rule)


def save(name: str, runs: Sequence[Run], peers: dict[str, Any]) -> None:
    """Writes weights and card of the best of several runs of one rule into the package."""
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
        "commit": commit(),
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "start_from": None,
    }
    free = name == "zero-shot-free"
    if free:
        training["note"] = "trained as zero-shot, where T was known; its φ was not fitted anew"
    rule = ZeroShot(orthogonal=best.rule.orthogonal, horizon_free=free)
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
