"""Objects and functions by their dotted paths: what a checkpoint stores instead of a pickled object."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Configurable:
    """An object that its class and its constructor's arguments describe: a task or a rule."""

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values: the attributes of the same names.

        Functions become their dotted paths. A class that keeps an argument in another way overrides this.

        Raises:
            TypeError: An argument is not kept.
        """
        _, *parameters = inspect.signature(type(self).__init__).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind not in VARIADIC]
        if lost := [name for name in names if not hasattr(self, name)]:
            raise TypeError(
                f"{type(self).__name__} does not keep its arguments {', '.join(lost)} as attributes of these "
                "names, and so cannot be written down: keep them, or override config()"
            )
        values = {name: getattr(self, name) for name in names}
        return {name: dotted_path(value) if callable(value) else value for name, value in values.items()}

    def __repr__(self) -> str:
        """Says the class, and the arguments that are not at their defaults."""
        try:
            parameters = inspect.signature(type(self).__init__).parameters
            given = [
                f"{name}={value!r}"
                for name, value in self.config().items()
                if name not in parameters or not _is_plainly(value, parameters[name].default)
            ]
        except Exception:  # a class of the user's that keeps none, or arrays; or not constructed yet
            return f"{type(self).__name__}(…)"
        return f"{type(self).__name__}({', '.join(given)})"


def _is_plainly(value: Any, default: Any) -> bool:
    """Whether a value is the default, of which a tuple may have become a list."""
    return bool((list(default) if isinstance(default, tuple) else default) == value)


def class_config(instance: Configurable) -> dict[str, Any]:
    """Returns {"class_path", "init_args"}, jsonargparse's form of an object."""
    return {"class_path": dotted_path(type(instance)), "init_args": instance.config()}


def from_class_config(config: dict[str, Any], base: type) -> Any:
    """Builds the object that `class_config` described. It imports what the description names.

    Raises:
        ValueError: There is no such class, or it is not one of `base`'s.
        TypeError: The class takes other arguments.
    """
    path = str(config.get("class_path"))
    try:
        cls = _imported(path)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"there is no class {path}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{path} is not a {base.__name__}")
    return cls(**config.get("init_args", {}))


def dotted_path(target: Any) -> str:
    """Returns the path that `resolve` takes, "package.module.name"; of what has none, a description.

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
    """Returns the callable itself, or the one that a dotted path names.

    Raises:
        ValueError: Nothing can be imported under that path; the message names the argument.
        TypeError: It is not callable.
    """
    if isinstance(target, str):
        path = target
        try:
            target = _imported(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{argument}={path!r} cannot be imported ({error}). It must be the dotted path of something "
                "at a module's top level: a lambda, a nested function or an object has none."
            ) from error
    if not callable(target):
        raise TypeError(f"{argument} must be callable or the dotted path of a callable, got {target!r}")
    return target


def _imported(path: str) -> Any:
    if not is_dotted_path(path):
        raise ValueError("it is no dotted path")  # before anything is imported
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def is_dotted_path(text: str) -> bool:
    """Tells whether a text is a path of Python names: nothing else may be handed to an import.

    Example:
        >>> [is_dotted_path(text) for text in ("torch.nn.Linear", "./evil", "evil./x", "evil-er.x")]
        [True, False, False, False]
    """
    return all(part.isidentifier() for part in text.split("."))


def without_kernel_options(config: Any) -> Any:
    """A configuration without what differs from machine to machine: a rule's kernel backend and precision.

    Example:
        >>> without_kernel_options({"rules": {"conv": {"init_args": {"p": 10.0, "backend": "cpu"}}}})
        {'rules': {'conv': {'init_args': {'p': 10.0}}}}
    """
    if isinstance(config, dict):
        kept = {key: value for key, value in config.items() if key not in ("backend", "precision")}
        return {key: without_kernel_options(value) for key, value in kept.items()}
    return config
