"""Tasks and rules as plain values, and back: what a checkpoint stores instead of a pickled object."""

from __future__ import annotations

import importlib
from typing import Any, Protocol


class Configurable(Protocol):
    """A class whose constructor arguments can be written down."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""


def class_config(instance: Configurable) -> dict[str, Any]:
    """{"class_path", "init_args"}: jsonargparse's form of an object."""
    cls = type(instance)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": instance.config()}


def from_class_config(config: dict[str, Any], base: type) -> Any:
    """The object that `class_config` described.

    Raises:
        ValueError: The class is not one of `base`'s.
    """
    module, _, name = config["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{config['class_path']} is not a {base.__name__}")
    return cls(**config.get("init_args", {}))
