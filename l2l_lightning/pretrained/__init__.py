"""Reads and writes trained rules, the package's and your own, as files of plain numbers.

A rule is a safetensors file: φ's tensors and, as text, the rule's class, its constructor's arguments and a
digest of all. Loading it executes nothing but this package and, if you say that you trust it, the class that
is named. Beside each of the package's own lies a card: what it was trained on, what it
does, where it fails. The rules in `experiments/` have none: they are an ablation's settings and early
snapshots, for `reproduce`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as as_safetensors

from l2l_lightning.class_paths import class_config, from_class_config, is_dotted_path, without_backend
from l2l_lightning.errors import WeightsError
from l2l_lightning.files import write_atomically
from l2l_lightning.rules import (
    CoordinatewiseLSTM,
    CorrectedDirection,
    CorrectedStepSize,
    Grouped,
    RNNprop,
    Rule,
    ZeroShot,
)
from l2l_lightning.trust import foreign_references

FORMAT = "l2l_lightning rule, version 2"
"""A file says that it has this format; one of another format is refused."""

FORMAT_WITHOUT_DIGEST = "l2l_lightning rule, version 1"
"""An older version of this program wrote this format, which is read with a warning."""

RULES: dict[str, type[Rule]] = {
    rule.__name__: rule
    for rule in (CoordinatewiseLSTM, CorrectedDirection, CorrectedStepSize, Grouped, RNNprop, ZeroShot)
}
"""The package's own rules, which a file names in short: a name in it is looked up here, and not imported."""

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Returns the names of the rules that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def card(name: str) -> dict[str, Any]:
    """Returns the card of one of the package's rules: its training, results, transfer and learning curve.

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


def load(name: str | Path, trust: Sequence[str] = ()) -> Rule:
    """Returns a trained rule on the CPU: one of the package's by its name, or a file's by its path.

    Args:
        name: "lstm-mnist", or a path that ends in .safetensors.
        trust: Modules of yours, such as "my_rules", that may be imported if the file names one of their
            classes. Nothing but this package is imported without.

    Raises:
        WeightsError: There is no such rule or file; or the file is no safetensors file or of another format,
            names a class that is not trusted or cannot be made, or has a tensor too many, too few, of another
            shape or dtype, or a number that is not finite, or not the digest that it was saved with.

    Example:
        >>> rule = load("lstm-mnist")
        >>> rule.spec.hidden_size
        20
    """
    path = Path(name) if str(name).endswith(".safetensors") else _package_file(str(name), ".safetensors")
    if not os.path.isfile(path):  # a pipe would never end; Path.is_file raises where a name is too long
        raise WeightsError(f"{path} cannot be read as safetensors: there is no such file")
    # Whatever the caller computes with: a file's numbers are what they are.
    with torch.inference_mode(False), torch.device("cpu"):
        return _load(path, trust)


def _load(path: Path, trust: Sequence[str]) -> Rule:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    # The last: a device, a damaged length or an unknown dtype.
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error
    rule = _make_rule(path, metadata, trust)
    _check(path, tensors, rule.state_dict())
    _check_digest(path, tensors, metadata)
    rule.load_state_dict(tensors, assign=True)
    return rule


def save(rule: Rule, path: str | Path) -> None:
    """Writes a rule so that `load(path)` gives it back; an interruption leaves the old file or the new one.

    A rule of yours is named by its class's dotted path, and loaded where its module is trusted.

    Raises:
        ValueError: The path does not end in .safetensors, φ is not in float32, the rule's class has no dotted
            path, or its `config()` is not of plain values.
        TypeError: rule is no Rule.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a Rule, got {rule!r}")
    tensors = {key: value.detach().cpu().contiguous() for key, value in rule.state_dict().items()}
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in tensors.values()):
        raise ValueError("rule must be in float32 to be saved: rule.float()")
    config = class_config(rule)
    name = type(rule).__name__
    if RULES.get(name) is not type(rule):
        name = config["class_path"]
        if not is_dotted_path(name):
            raise ValueError(f"rule must be of a class at a module's top level, which {name} is not")
    try:
        # Which machine runs it is not the rule's.
        text = json.dumps(without_backend(config["init_args"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"rule.config() must be of plain values: {error}") from error
    metadata = {"format": FORMAT, "rule": name, "config": text}
    metadata["sha256"] = _digest(tensors, metadata)
    write_atomically(path, _in_order(as_safetensors(tensors, metadata)))


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Returns the SHA-256 of a file's texts, but for the digest itself, and of its tensors, each by name."""
    shapes = {key: [str(value.dtype), *value.shape] for key, value in tensors.items()}
    texts = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps([texts, shapes], sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _in_order(content: bytes) -> bytes:
    """Sorts a safetensors file's texts, which are written in any order, so that one rule is one file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


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


def _make_rule(path: Path, metadata: dict[str, str], trust: Sequence[str]) -> Rule:
    """Makes the rule that a file describes, without its weights."""
    if metadata.get("format") not in (FORMAT, FORMAT_WITHOUT_DIGEST):
        raise WeightsError(f"{path} says it is {metadata.get('format')!r}, not {FORMAT!r}")
    name = metadata.get("rule", "")
    try:
        arguments = json.loads(metadata["config"])
        ours = RULES.get(name)
        config = {"class_path": name if ours is None else f"{ours.__module__}.{name}", "init_args": arguments}
        if foreign := foreign_references(config, trust):
            raise WeightsError(
                f"{path} holds a {name!r}, not one of {', '.join(RULES)} alone: it names "
                f"{', '.join(foreign)}. If you trust its module: load(path, trust=[...])"
            )
        if ours is not None:
            with torch.device("meta"):
                return ours(**arguments)
        with torch.random.fork_rng(devices=[]):  # drawing φ, which is then replaced, must not be noticed
            rule: Rule = from_class_config(config, Rule)
        return rule
    except WeightsError:
        raise
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} describes no {name}: {error}") from error


def _check_digest(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    if "sha256" not in metadata:
        if metadata["format"] != FORMAT_WITHOUT_DIGEST:
            raise WeightsError(f"{path} lacks its digest: it is damaged, or was rewritten by another program")
        warnings.warn(
            f"{path} was written by an older version of this program, without a digest: whether a number in "
            "it has changed since cannot be told; saving the rule anew adds one",
            stacklevel=3,
        )
    elif metadata["sha256"] != _digest(tensors, metadata):
        raise WeightsError(f"{path} is damaged: its contents do not have the digest that it was saved with")


def _check(path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if missing := expected.keys() - found.keys():
        raise WeightsError(f"{path} lacks {', '.join(sorted(missing))}")
    if left_over := found.keys() - expected.keys():
        raise WeightsError(f"{path} has tensors that the rule has not: {', '.join(sorted(left_over))}")
    for key, tensor in found.items():
        dtype = torch.float32 if expected[key].is_floating_point() else expected[key].dtype
        for what, ours in (("shape", expected[key].shape), ("dtype", dtype)):
            if (theirs := getattr(tensor, what)) != ours:
                raise WeightsError(f"{path}: the {what} of {key} is {theirs}, not {ours}")
        if not tensor.isfinite().all():
            raise WeightsError(f"{path}: {key} holds a number that is not finite")
