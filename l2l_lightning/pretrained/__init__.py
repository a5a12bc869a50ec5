"""Trained rules that come with the package, and rules of your own, as files of plain numbers.

A rule is a safetensors file: φ's tensors and, as text, the constructor's arguments. Loading it executes
nothing. Beside each of the package's own lies a card: what it was trained on, what it does, where it fails.
The rules in `experiments/` have none: they are an ablation's settings and early snapshots, for `reproduce`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from l2l_lightning.rules import CoordinatewiseLSTM, UpdateRule

FORMAT = "l2l_lightning rule, version 1"
"""What a file says that it is; a file of another format is refused."""

RULES: dict[str, type[UpdateRule]] = {"CoordinatewiseLSTM": CoordinatewiseLSTM}
"""What a file may hold: a name in it is looked up here, and never imported."""

_FOLDER = Path(__file__).parent


class WeightsError(ValueError):
    """A file of weights that cannot be loaded; the message names the file and what is wrong with it."""


def names() -> list[str]:
    """The rules that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def card(name: str) -> dict[str, Any]:
    """What is known of one of the package's rules: its training, results, transfer and learning curve.

    Raises:
        WeightsError: The package has no rule of this name, or it is one of an experiment's, without a card.

    Example:
        >>> card("lstm-mnist")["meta_training"]["seed"]
        0
    """
    path = _package_file(name, ".json")
    if not path.is_file():
        raise WeightsError(f"{name} has no card: it is a setting of an experiment, see its results")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def load(name: str | Path) -> UpdateRule:
    """A trained rule, on the CPU: one of the package's by its name, or a file by its path.

    Raises:
        WeightsError: There is no such rule or file; or the file is no safetensors file or of another format,
            or has a tensor too many, too few, of another shape or dtype, or a number that is not finite.

    Example:
        >>> rule = load("lstm-mnist")
        >>> rule.spec.hidden_size
        20
    """
    path = Path(name) if str(name).endswith(".safetensors") else _package_file(str(name), ".safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error
    rule = _make_rule(path, metadata)
    _check(path, tensors, rule.state_dict())
    rule.load_state_dict(tensors)
    return rule


def save(rule: UpdateRule, path: str | Path) -> None:
    """Writes a rule so that `load(path)` gives it back.

    Raises:
        ValueError: The path does not end in .safetensors, or the rule's class is not one that load knows.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    if RULES.get(type(rule).__name__) is not type(rule):
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {type(rule).__name__}")
    config = rule.config() | {"backend": None}  # which machine runs it is not the rule's
    metadata = {"format": FORMAT, "rule": type(rule).__name__, "config": json.dumps(config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in rule.state_dict().items()}, path, metadata
    )


def _package_file(name: str, suffix: str) -> Path:
    experiments = _FOLDER / "experiments"
    if name in {path.stem for path in experiments.glob("*.safetensors")}:
        return experiments / f"{name}{suffix}"
    if name not in names():
        raise WeightsError(
            f"there is no rule {name!r}: choose one of {', '.join(names())}, "
            "or a path that ends in .safetensors"
        )
    return _FOLDER / f"{name}{suffix}"


def _make_rule(path: Path, metadata: dict[str, str]) -> UpdateRule:
    """The rule that a file describes, with weights of its own."""
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path} says it is {metadata.get('format')!r}, not {FORMAT!r}")
    if metadata.get("rule") not in RULES:
        raise WeightsError(f"{path} holds a {metadata.get('rule')!r}, not one of {', '.join(RULES)}")
    try:
        return RULES[metadata["rule"]](**json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} describes no {metadata['rule']}: {error}") from error


def _check(path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if missing := expected.keys() - found.keys():
        raise WeightsError(f"{path} lacks {', '.join(sorted(missing))}")
    if left_over := found.keys() - expected.keys():
        raise WeightsError(f"{path} has tensors that the rule has not: {', '.join(sorted(left_over))}")
    for key, tensor in found.items():
        for what in ("shape", "dtype"):
            theirs, ours = getattr(tensor, what), getattr(expected[key], what)
            if theirs != ours:
                raise WeightsError(f"{path}: the {what} of {key} is {theirs}, not {ours}")
        if not tensor.isfinite().all():
            raise WeightsError(f"{path}: {key} holds a number that is not finite")
