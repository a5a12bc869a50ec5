"""Reads, writes and shares trained rules, the package's and your own, as files of plain numbers.

A rule is a safetensors file: φ's tensors and, as text, the rule's class, its constructor's arguments and a
digest of all. Loading it executes nothing but this package and, if you say that you trust it, the class that
is named. Beside it may lie a card, the JSON file of the same name: what it was trained on, what it does,
where it fails. All of the package's own have one, but for the rules in `experiments/`, which are an
ablation's settings and early snapshots, for `reproduce`. A repository of the Hugging Face Hub holds one rule
and its card.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as as_safetensors

from l2l_lightning.class_paths import class_config, from_class_config, is_dotted_path, without_kernel_options
from l2l_lightning.errors import WeightsError
from l2l_lightning.files import write_atomically, write_json
from l2l_lightning.pretrained import hub
from l2l_lightning.pretrained.model_card import model_card
from l2l_lightning.program import program
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


def card(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Returns what is known of a trained rule: its training, results, and where it fails.

    Args:
        name: As for `load`.
        revision: As for `load`.

    Raises:
        WeightsError: There is no such rule, or it has no card, or none that is a JSON object.
        HubError: As for `load`.

    Example:
        >>> card("lstm-mnist")["meta_training"]["seed"]
        0
    """
    path = _path(name, ".json", revision)
    if not os.path.isfile(path):
        raise WeightsError(f"{name} has no card: there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"the card of {name} is not a JSON object: {error}") from error
    return content


def load(name: str | Path, trust: Sequence[str] = (), revision: str | None = None) -> Rule:
    """Returns a trained rule on the CPU: one of the package's, a file's, or one of the Hugging Face Hub.

    What ends in .safetensors is a file's path, whatever slashes it has; another text with one slash is a
    repository of the hub, also where there is a folder of that name.

    Args:
        name: "lstm-mnist", "FOLDER/rule.safetensors", or "USER/REPOSITORY", which is fetched once and found
            in the hub's cache from then on, without a network too.
        trust: Modules of yours, such as "my_rules", that may be imported if the file names one of their
            classes. Nothing but this package is imported without.
        revision: A branch, a tag or a commit of the repository; None is its main branch.

    Raises:
        WeightsError: There is no such rule or file; or the file is no safetensors file or of another format,
            names a class that is not trusted or cannot be made, or has a tensor too many, too few, of another
            shape or dtype, or a number that is not finite, or not the digest that it was saved with.
        HubError: There is no such repository or revision, it is none of a rule, the hub refuses, or it cannot
            be reached and the rule is not in the cache.
        MissingPackageError: A rule of the hub's needs the package huggingface_hub.
        ValueError: There is a revision of what is no repository.

    Example:
        >>> rule = load("lstm-mnist")
        >>> rule.spec.hidden_size
        20
    """
    path = _path(name, ".safetensors", revision)
    if not os.path.isfile(path):  # a pipe would never end; Path.is_file raises where a name is too long
        raise WeightsError(f"{path} cannot be read as safetensors: there is no such file")
    # Whatever the caller computes with: a file's numbers are what they are.
    with torch.inference_mode(False), torch.device("cpu"):
        return _load(path, trust)


def _path(name: str | Path, suffix: str, revision: str | None) -> Path:
    """Returns where a rule's file of a suffix is, or would be."""
    if isinstance(name, str) and hub.is_repository(name):
        return hub.fetch(name, hub.WEIGHTS if suffix == ".safetensors" else hub.CARD, revision)
    if revision is not None:
        raise ValueError(f"revision must be None where the rule is not the hub's, got {revision!r}")
    if str(name).endswith(".safetensors"):
        return Path(name).with_suffix(suffix)
    if str(name).endswith(".ckpt"):
        raise WeightsError(
            f"{name} is a checkpoint, which holds a rule and its training: `{program()} export {name} "
            "rule.safetensors` writes the rule's own file"
        )
    return _package_file(str(name), suffix)


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


def save(rule: Rule, path: str | Path, card: Mapping[str, Any] | None = None) -> None:
    """Writes a rule so that `load(path)` gives it back; an interruption leaves the old file or the new one.

    A rule of yours is named by its class's dotted path, and loaded where its module is trusted.

    Args:
        rule: What is written.
        path: Where; it ends in .safetensors.
        card: What is to be known of the rule, as plain values: it becomes the JSON file beside it.

    Raises:
        ValueError: The path does not end in .safetensors, φ is not in float32, the rule's class has no dotted
            path, or its `config()` or the card is not of plain values.
        TypeError: rule is no Rule.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    content = _content(rule)
    if card is not None:  # first, as it can fail: no rule has another one's card
        write_json(path.with_suffix(".json"), dict(card))
    write_atomically(path, content)


def push_to_hub(
    rule: Rule,
    repository: str,
    card: Mapping[str, Any] | None = None,
    private: bool | None = None,
    message: str = "Upload a rule",
) -> str:
    """Uploads a rule to the Hugging Face Hub, where `load(repository)` finds it; returns the commit's URL.

    A commit has the weights, the card as JSON, and a README.md of both, which the hub shows; nothing in it is
    code. Who uploads, and where to, is as the hub's own variables and `hf auth login` say (HF_TOKEN,
    HF_ENDPOINT).

    Args:
        rule: What is uploaded.
        repository: "USER/REPOSITORY"; it is made if it is not there, and else gets another commit.
        card: What is to be known of the rule, such as `card("rule.safetensors")`.
        private: Whether a repository that is made is private; None is the user's own default.
        message: The commit's.

    Raises:
        HubError: The hub cannot be reached, or refuses.
        MissingPackageError: It needs the package huggingface_hub.
        ValueError: repository is no such name; or as for `save`.
        TypeError: As for `save`.

    Example:
        >>> push_to_hub(load("zero-shot"), "USER/my-rule", card("zero-shot"))  # doctest: +SKIP
    """
    if not hub.is_repository(str(repository)):
        raise ValueError(f"repository must be of the form 'USER/REPOSITORY', got {repository!r}")
    described = {"rule": {"class": type(rule).__name__}, **(card or {})}
    files = {
        hub.WEIGHTS: _content(rule),
        hub.CARD: json.dumps(described, indent=2, allow_nan=False, ensure_ascii=False).encode(),
        "README.md": model_card(repository, described, type(rule) in RULES.values()).encode(),
    }
    return hub.upload(repository, files, private, message)


def _content(rule: Rule) -> bytes:
    """Returns what a rule's file holds."""
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
        text = json.dumps(without_kernel_options(config["init_args"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"rule.config() must be of plain values: {error}") from error
    metadata = {"format": FORMAT, "rule": name, "config": text}
    metadata["sha256"] = _digest(tensors, metadata)
    return _in_order(as_safetensors(tensors, metadata))


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
            f"there is no rule {name!r}: choose one of {', '.join(names())}, a path that ends in "
            ".safetensors, or 'USER/REPOSITORY' on the Hugging Face Hub"
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
