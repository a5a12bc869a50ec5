"""Makes the rules "zero-shot" and "zero-shot-free", with their cards, from runs of the preset `zero_shot`.

    python -m l2l_lightning fit --config zero_shot --seed_everything 0        # and other seeds
    python benchmarks/make_zero_shot.py RUN_FOLDER ...

Of several runs the one whose best validation is best is taken, on small problems that no rollout was of, and
on which nothing is reported. "zero-shot-free" has the same φ, and goes without T.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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
    scores = {folder: best_checkpoint(folder) for folder in args.runs}
    score, path = min(scores.values())
    model, checkpoint = MetaLearner.from_checkpoint(path), checkpoints.read(path)
    assert isinstance(model.rule, ZeroShot)
    section = checkpoint["l2l_lightning"]
    training = {
        "preset": "zero_shot",
        "settings": model.settings(),
        "num_rollouts": section["data"]["num_rollouts"],
        "seed": model.seed,
        "data": "small problems; of images the training parts of digits and of the embedded MNIST subset",
        "meta_steps": section["meta_steps"],
        "best_meta_step": checkpoint["global_step"],
        "log_held_out_loss": score,
        "log_held_out_loss_of_all_seeds": sorted(found for found, _ in scores.values()),
        "seconds": None,
        "commit": commit(),
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "start_from": None,
    }
    peers = baselines(args.out)
    package = Path(pretrained.__file__).parent
    for name, free in (("zero-shot", False), ("zero-shot-free", True)):
        rule = ZeroShot(orthogonal=model.rule.orthogonal, horizon_free=free)
        rule.load_state_dict(model.rule.state_dict())
        card = {
            "rule": {"class": "ZeroShot", **rule.config()},
            "meta_training": training
            | (
                {"note": "trained as zero-shot, where T was known; its φ was not fitted anew"} if free else {}
            ),
            "headline": headline(rule, peers),
            "repeatable": measure(rule, MNISTMLP()),
            "known_failures": [unmoved()],
            "generalisation": [],
            "measured_at": commit(),
        }
        pretrained.save(rule, package / f"{name}.safetensors")
        write_json(package / f"{name}.json", card)


if __name__ == "__main__":
    main()
