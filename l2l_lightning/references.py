"""Functions by their dotted paths: how a checkpoint or a command line names the user's code."""

from __future__ import annotations

import importlib
from typing import Any

from l2l_lightning.class_paths import is_dotted_path


def dotted_path(target: Any) -> str:
    """The path that `resolve` takes, "package.module.name"; a description of what has none.

    Example:
        >>> from statistics import mean
        >>> dotted_path(mean), resolve("statistics.mean", "f") is mean
        ('statistics.mean', True)
    """
    try:
        return f"{target.__module__}.{target.__qualname__}"
    except AttributeError:  # an object that is not a function or a class
        return " ".join(repr(target).split())


def resolve(target: Any, argument: str) -> Any:
    """The callable itself, or the one that a dotted path names.

    Raises:
        ValueError: Nothing can be imported under that path; the message names the argument.
        TypeError: It is not callable.
    """
    if isinstance(target, str):
        path, (module, _, name) = target, target.rpartition(".")
        try:
            if not is_dotted_path(path):
                raise ValueError("it is no dotted path")  # before anything is imported
            target = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{argument}={path!r} cannot be imported ({error}). It must be the dotted path of something "
                "at a module's top level: a lambda, a nested function or an object has none."
            ) from error
    if not callable(target):
        raise TypeError(f"{argument} must be callable or the dotted path of a callable, got {target!r}")
    return target
