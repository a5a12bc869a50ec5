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
    """The object that `class_config` described. It imports what the description names.

    Raises:
        ValueError: There is no such class, or it is not one of `base`'s.
        TypeError: The class takes other arguments.
    """
    path = str(config.get("class_path"))
    module, _, name = path.rpartition(".")
    try:
        if not is_dotted_path(path):
            raise ValueError("it is no dotted path")  # before anything is imported
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"there is no class {path}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{path} is not a {base.__name__}")
    return cls(**config.get("init_args", {}))


def is_dotted_path(text: str) -> bool:
    """Whether a text is a path of Python names: nothing else may be handed to an import.

    Example:
        >>> [is_dotted_path(text) for text in ("torch.nn.Linear", "./evil", "evil./x", "evil-er.x")]
        [True, False, False, False]
    """
    return all(part.isidentifier() for part in text.split("."))


def without_backend(config: Any) -> Any:
    """A configuration without what differs from machine to machine, a rule's choice of kernel backend.

    Example:
        >>> without_backend({"rules": {"conv": {"init_args": {"p": 10.0, "backend": "cpu"}}}})
        {'rules': {'conv': {'init_args': {'p': 10.0}}}}
    """
    if isinstance(config, dict):
        return {key: without_backend(value) for key, value in config.items() if key != "backend"}
    return config
