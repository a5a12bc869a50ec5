"""What a resumed run takes from the configuration beside its checkpoint: plain values, and what is trusted.

Such a file is somebody's word. A value of a class's or of any type can be anything that Python can import
and call, so that options of those types are taken only where they hold none, or a name of Lightning's own.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from l2l_lightning.errors import CheckpointError
from l2l_lightning.trust import foreign_references, may_name, refuse_foreign

NOT_RESUMED = ("seed_everything", "model", "data", "ckpt_path", "weights_only", "trust")
"""What a resumed run takes from its checkpoint or from the command line."""

SECTIONS = ("trainer", "comparison", "checkpoint", "latest", "early_stopping", "averaging", "collapse")
SINGLE = (
    *("wandb", "wandb_project", "wandb_entity", "wandb_group", "wandb_name", "wandb_tags"),
    "run_folder",
)
"""Groups of options that it takes from the file, and options outside any group."""


OBJECTS: dict[str, tuple[str, ...]] = {
    "accelerator": ("auto", "gpu", *AcceleratorRegistry.available_accelerators()),
    "strategy": ("auto", *StrategyRegistry.available_strategies()),
    "profiler": ("simple", "advanced", "pytorch", "xla"),
    "logger": (),
    "callbacks": (),
    "plugins": (),
}
"""The trainer's options that take objects, with the names that Lightning has for some of them."""


def resumed_options(path: object, config: dict[str, Any], trust: Sequence[str] = ()) -> dict[str, Any]:
    """The part of a run's configuration that a run which goes on takes over: what is not the checkpoint's.

    Args:
        path: The file's, for the message.
        config: What is in it.
        trust: Modules, classes or functions that it may name (see `trust.foreign_references`).

    Raises:
        CheckpointError: It holds something else than plain values, by the option's name.

    Example:
        >>> resumed_options("config.yaml", {"trainer": {"max_epochs": 1}, "model": {"horizon": 100}})
        {'trainer': {'max_epochs': 1}}
    """
    config = {key: value for key, value in config.items() if key not in NOT_RESUMED}
    for section, option, value in _options(path, config):
        name = f"{section}.{option}" if section else option
        if section != "trainer" or option not in OBJECTS:
            if not _is_plain(value):
                _refuse(path, name, value)
        elif not (isinstance(value, str) and value in OBJECTS[option]) and not _is_trusted(value, trust):
            refuse_foreign(path, value, trust)
            _refuse(path, name, value)
    return config


def _options(path: object, config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(section, option, value) of each; refuses what jsonargparse would take apart or read a file for."""
    for key, value in config.items():
        if key in SINGLE:
            yield "", key, value
        elif key in SECTIONS and isinstance(value, dict):
            for option, inner in value.items():
                if not (isinstance(option, str) and option.isidentifier() and not option.startswith("_")):
                    _refuse(path, f"{key}.{option}", inner)
                yield key, option, inner
        else:
            _refuse(path, str(key), value)


def _is_plain(value: Any) -> bool:
    """A number, a text, true, false or nothing; a list, or a mapping to numbers (a time's minutes)."""
    if isinstance(value, dict):
        return all(isinstance(number, int | float) for number in value.values())
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, bool | int | float | str) for part in parts)


def _is_trusted(value: Any, trust: Sequence[str]) -> bool:
    """Whether an option that takes objects holds none, or trusted ones alone, each by its whole path."""
    if isinstance(value, list):
        return all(_is_trusted(part, trust) for part in value)
    if isinstance(value, dict):
        return "class_path" in value and not foreign_references(value, trust)
    return value is None or isinstance(value, bool) or may_name(value, trust)


def _refuse(path: object, option: str, value: Any) -> None:
    text = " ".join(reprlib.repr(value).split())  # not all of it: YAML can repeat a part without end
    raise CheckpointError(
        f"{path} has {option} = {text}, and of such a file a resumed run takes "
        "numbers, texts, true, false and lists of them, in the options of this program. Take it out and give "
        f"--{option} again, or, for a class, say that you trust its module: --trust MODULE"
    )
