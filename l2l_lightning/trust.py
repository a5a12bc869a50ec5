"""What a file may name: the package's own rules and tasks, torch's modules and losses, and what is trusted.

A file may name code. What it names is looked up among what it may name, and compared by what it is: a dotted
path can reach everything that a module has imported (`torch.nn.os.system`), so that how it is spelled says
nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import yaml

from l2l_lightning import rules, tasks
from l2l_lightning.class_paths import is_dotted_path
from l2l_lightning.errors import CheckpointError

PATHS = ("default_root_dir", "dirpath", "filename", "save_dir", "dir", "name", "version", "start_from")
BY_PATTERN = ("rules",)
"""Options whose texts name a folder or a file, or whose mappings' keys are patterns of tensors' names
(`Grouped`), and never code."""


@functools.cache
def _own() -> frozenset[str]:
    """What a file may name of its own accord: the package's rules and tasks, torch's modules and losses.

    All paths of all of them, and no others: a path that is not one of these is not followed.
    """
    functional = torch.nn.functional
    kinds = (rules.Rule, tasks.Task, torch.nn.Module)
    found: set[str] = set()
    for module in (rules, tasks, torch.nn, functional):
        for name, target in vars(module).items():
            if isinstance(target, type):
                belongs = issubclass(target, kinds)
            else:
                defined_there = isinstance(target, FunctionType) and target.__module__ == functional.__name__
                belongs = defined_there or isinstance(target, BuiltinFunctionType)
            if belongs and not name.startswith("_"):
                found |= {f"{module.__name__}.{name}", f"{target.__module__}.{target.__qualname__}"}
    return frozenset(found)


def foreign_references(config: Any, trust: Sequence[str] = ()) -> list[str]:
    """What a file's configuration names, or could be read as naming, that it may not, sorted.

    It may name the package's rules and tasks, torch's modules and losses, and what is trusted. Texts are read
    as jsonargparse may read them: as the path of a class or a function, or as YAML that holds one.

    Args:
        config: Nested lists and dicts of plain values.
        trust: Modules of the user's, with all that is defined in them, or single functions and classes, by
            their dotted paths. They are imported where that is needed to tell what a path stands for.

    Example:
        >>> config = {"class_path": "l2l_lightning.tasks.FunctionTask", "init_args": {"f": "mine.f"}}
        >>> foreign_references(config)
        ['mine.f']
    """
    found: set[str] = set()
    seen: dict[int, Any] = {}
    rest = [config]
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            content = parsed(part)
            if isinstance(content, dict | list):
                rest.append(content)
            elif "." in part and is_dotted_path(part.partition(".")[0]) and not may_name(part, trust):
                found.add(part)
        elif id(part) in seen:  # YAML and pickle can repeat a part many times over, and within itself
            continue
        elif isinstance(part, list | tuple):
            rest += part
        elif isinstance(part, dict):
            rest += part
            for key, value in part.items():
                if key in BY_PATTERN and isinstance(value, dict):
                    rest += value.values()
                elif not (key in PATHS and isinstance(value, str)):
                    rest.append(value)
            if "class_path" in part and not may_name(part["class_path"], trust):
                found.add(
                    part["class_path"] if isinstance(part["class_path"], str) else "a class without a name"
                )
        seen[id(part)] = part
    return sorted(found)


def foreign_modules(config: Any, trust: Sequence[str] = ()) -> list[str]:
    """The modules of what a configuration may not name of its own accord: what --trust would have to say.

    Example:
        >>> foreign_modules({"task": {"init_args": {"f": "my_problem.rosenbrock"}}})
        ['my_problem']
    """
    found = {path.rpartition(".")[0].partition(".<")[0] for path in foreign_references(config, trust)}
    return sorted(found - {""})


def refuse_foreign(path: object, config: Any, trust: Sequence[str]) -> None:
    """Raises CheckpointError if a file's configuration names code that it may not and that is not trusted."""
    if foreign := foreign_references(config, trust):
        modules = foreign_modules(config, trust)
        raise CheckpointError(
            f"{path} names {', '.join(foreign)}: code that is not this package's, and that is not imported "
            f"on a file's word. If you trust it: --trust {','.join(modules)}, in Python trust={modules}"
        )


def parsed(text: str) -> Any:
    """A text as jsonargparse reads it: a list or a mapping may be written as YAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: an impossible date
        return text


def may_name(path: Any, trust: Sequence[str]) -> bool:
    """Whether a file may name what a dotted path stands for: the package's or torch's own, or trusted."""
    if not isinstance(path, str):
        return False
    if path in _own() or path in trust:
        return True
    modules = [module for module in trust if path.startswith(f"{module}.")]
    return bool(modules) and is_dotted_path(path) and _is_defined_in(path, modules)


def _is_defined_in(path: str, modules: Sequence[str]) -> bool:
    """Whether what a path inside a trusted module stands for is defined in one, or does not exist."""
    for module in modules:
        target: Any = None
        names = path.split(".")
        known = module.count(".") + 1
        try:
            target = importlib.import_module(module)
            for end in range(known, len(names)):
                if not hasattr(target, names[end]):
                    importlib.import_module(".".join(names[: end + 1]))  # a part of a trusted package
                target = getattr(target, names[end])
        except (ImportError, AttributeError):
            continue
        home = target.__name__ if inspect.ismodule(target) else getattr(target, "__module__", None)
        if not any(home == trusted or str(home).startswith(f"{trusted}.") for trusted in modules):
            return False
    return True
