"""Tasks and rules as plain values, and back: what a checkpoint stores instead of a pickled object."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

_REFERENCE = re.compile(r"[^\W\d]\w*\.[^/\\]+")
"""A text that something might import: it begins with a module's name and a dot, and is no path of a file."""


class Configurable(Protocol):
    """A class whose constructor arguments can be written down."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""


def class_config(instance: Configurable) -> dict[str, Any]:
    """{"class_path", "init_args"}: jsonargparse's form of an object."""
    cls = type(instance)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": instance.config()}


def from_class_config(config: dict[str, Any], base: type) -> Any:
    """The object that `class_config` described. It imports what the description names.

    Raises:
        ValueError: There is no such class, or it is not one of `base`'s.
        TypeError: The class takes other arguments.
    """
    module, _, name = str(config.get("class_path")).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"there is no class {config.get('class_path')}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{config['class_path']} is not a {base.__name__}")
    return cls(**config.get("init_args", {}))


def foreign_references(config: Any, allowed: Sequence[str]) -> list[str]:
    """What a configuration's texts could import that lies outside the allowed modules, sorted.

    Args:
        config: Nested lists and dicts of plain values.
        allowed: Modules, with all that is in them, or single functions and classes, by their dotted paths.

    Example:
        >>> config = {"class_path": "l2l_lightning.tasks.FunctionTask", "init_args": {"f": "mine.f"}}
        >>> foreign_references(config, ["l2l_lightning.tasks"])
        ['mine.f']
    """
    if isinstance(config, dict):
        config = [*config, *config.values()]
    if isinstance(config, list | tuple):
        return sorted({reference for part in config for reference in foreign_references(part, allowed)})
    if not isinstance(config, str) or not _REFERENCE.match(config):
        return []
    return [] if any(config == module or config.startswith(f"{module}.") for module in allowed) else [config]
