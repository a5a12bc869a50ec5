"""What a run is called: its preset, and the task and rule that it has in place of the preset's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from l2l_lightning.configs import DEFAULT_PRESET

_TIME = re.compile(r"\d{8}-\d{6}(-\d+)?")
"""What a run's folder is called (`run_folder.new_run_folder`); the folder around it has the run's name."""

_TASK = ("task", "task.f", "task.module", "task.dataset")


def run_name(origin: str | None, options: Mapping[str, str]) -> str:
    """Returns the name of a run, which its folder and W&B show.

    Args:
        origin: The preset, or the path of the file of options or checkpoint that it begins with; None is the
            default preset, which a task of the user's leaves nothing of but numbers.
        options: What was typed, by option.

    Example:
        >>> run_name("mnist", {})
        'mnist'
        >>> run_name("mnist", {"--model.rule": "l2l_lightning.rules.RNNprop"})
        'mnist-rnnprop'
        >>> run_name(None, {"--model.task": "FunctionTask", "--model.task.f": "my_problem.rosenbrock"})
        'rosenbrock'
    """
    task, rule = list(_words(options, _TASK)), list(_words(options, ["rule"]))
    if len(task) > 1:  # what a general class was told to take says more than its name
        task = task[1:]
    begin = [_origin(Path(origin))] if origin else [] if task else [DEFAULT_PRESET]
    return "-".join([*begin, *task, *rule])


def _words(options: Mapping[str, str], names: Iterable[str]) -> Iterable[str]:
    for name in names:
        typed = options.get(f"--model.{name}", options.get(f"--model.{name.replace('.', '.init_args.')}", ""))
        named = re.search(r"class_path\W+([\w.]+)", typed)
        word = re.sub(r"\W", "", (named[1] if named else typed).rpartition(".")[2]).lower()[:30]
        if word:
            yield word


def _origin(path: Path) -> str:
    """A preset's or file's name; of a file in a run's folder the run's."""
    folders = (folder.parent.name for folder in path.absolute().parents if _TIME.fullmatch(folder.name))
    return next(folders, path.stem)
