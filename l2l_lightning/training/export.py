"""A checkpoint's rule as a file to share, with a card of how it came about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2l_lightning import pretrained
from l2l_lightning.errors import CheckpointError, WeightsError
from l2l_lightning.provenance import commit, versions
from l2l_lightning.training import checkpoints
from l2l_lightning.training.meta_learner import SECTION, MetaLearner


def export_rule(
    checkpoint: str | Path, file: str | Path, trust: Sequence[str] = (), force: bool = False
) -> dict[str, Any]:
    """Writes a checkpoint's rule to a .safetensors file, and its card beside it; returns the card.

    φ is what a comparison takes: the average, where the run has kept one. The card has the run's settings,
    seed and data, and, for the checkpoint that the run was compared by, the comparison's results; folders
    of this machine are left out of it.

    Args:
        checkpoint: Path of a .ckpt file.
        file: Path that ends in .safetensors; the card is the .json file of the same name.
        trust: As for `MetaLearner.from_checkpoint`.
        force: Write over files that are there.

    Raises:
        CheckpointError: As `MetaLearner.from_checkpoint`.
        WeightsError: The file has another ending, or it or the card is there and force is False.

    Example:
        >>> export_rule("runs/mnist/RUN/checkpoints/best-2800.ckpt", "rule.safetensors")  # doctest: +SKIP
    """
    checkpoint, file = Path(checkpoint), Path(file)
    if file.suffix != ".safetensors":
        raise WeightsError(f"a rule's file (FILE) ends in .safetensors, got {file}")
    for path in (file, file.with_suffix(".json")):
        if path.exists() and not force:
            raise WeightsError(f"{path} is there already: give another FILE, or --force (force=True)")
    if checkpoint.is_dir():
        found = sorted([*checkpoint.glob("*.ckpt"), *checkpoint.glob("checkpoints/*.ckpt")])
        listed = f": {', '.join(map(str, found))}" if found else ", and there are none in it"
        raise CheckpointError(f"{checkpoint} is a folder: give one of its checkpoints{listed}")
    rule = MetaLearner.from_checkpoint(checkpoint, trust).rule
    content = checkpoints.read(checkpoint)
    section = content[SECTION]
    root, start = section["data"].get("root"), section.get("start_from")

    def without_root(source: str) -> str:
        return source.replace(f" at {root}", "") if root else source

    summary = _summary(checkpoint)
    training = {
        "settings": section["model"],
        "num_rollouts": section["data"].get("num_rollouts"),
        "seed": section["seed_everything"],
        "data": without_root(str(section.get("data_source"))),
        "meta_steps": section.get("meta_steps"),
        "best_meta_step": content.get("global_step"),
        "averaged": "current_model_state" in content,
        "start_from": start and (Path(start).name if start.endswith(".safetensors") else start),
        "commit": summary.get("commit"),
        "device": summary.get("device"),
        "versions": summary.get("versions"),
    }
    card = {"rule": {"class": type(rule).__name__, **rule.config()}, "meta_training": training}
    if summary:
        keys = ("task", "horizon", "seed", "num_optimizees", "optimizers")
        card["headline"] = {key: summary[key] for key in keys if key in summary}
        card["headline"]["data"] = without_root(str(summary.get("data_source")))
    card["exported_by"] = {"commit": commit(), "versions": versions()}
    pretrained.save(rule, file, card)
    return card


def _summary(checkpoint: Path) -> dict[str, Any]:
    """Returns the comparison that a run has ended with, if this is the checkpoint that it was made with.

    That is the best one by validation, or the last where a run has kept no best one.
    """
    folder = checkpoint.absolute().parent
    if [path.name for path in folder.glob("best-*.ckpt")] not in ([], [checkpoint.name]):
        return {}
    try:
        summary: dict[str, Any] = json.loads((folder.parent / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
