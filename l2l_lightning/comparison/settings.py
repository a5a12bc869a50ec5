"""A run's settings as plain values: nested as in config.yaml, or by the names of their options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WHERE = (
    *("trainer.default_root_dir", "trainer.logger", "trainer.enable_progress_bar", "wandb"),
    *("run_folder", "trust", "ckpt_path", "out", "tuning_dir"),
)
"""Options that say where a run is written to or read from, not what it computes."""


def plain(value: Any) -> Any:
    """Returns what JSON can hold: numbers, texts, true, false, null, lists and mappings of them.

    A number that is not finite becomes its text, and so does any other object.

    Example:
        >>> plain({"rate": 0.1, "limit": float("inf"), "sizes": (20, 20), 3: None})
        {'rate': 0.1, 'limit': 'inf', 'sizes': [20, 20], '3': None}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return " ".join(str(value).split())


def computing(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings without those that say where a run is written to (WHERE).

    Among those may be the keys of somebody's logging service.

    Example:
        >>> computing({"trainer": {"logger": {"api_key": "…"}, "max_epochs": 1}, "wandb_tags": ["a"]})
        {'trainer': {'max_epochs': 1}}
    """
    kept = {name: value for name, value in settings.items() if not _says_where(f"{prefix}{name}")}
    if not prefix and isinstance(trainer := kept.get("trainer"), Mapping):
        kept["trainer"] = computing(trainer, "trainer.")
    return kept


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by the names of the options that set them; of an object, its class by its own.

    Example:
        >>> task = {"class_path": "l2l_lightning.tasks.Quadratic", "init_args": {"dim": 10}}
        >>> flat({"model": {"task": task, "horizon": 100}})
        {'model.task': 'l2l_lightning.tasks.Quadratic', 'model.task.dim': 10, 'model.horizon': 100}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "class_path" in value:
            found[name] = value["class_path"]
            for part in ("init_args", "dict_kwargs"):
                found |= flat(value.get(part) or {}, f"{name}.")
        elif isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns of several runs' nested settings those that are not the same in all; None where a run has none.

    Options that say where a run is written (WHERE) are left out.

    Example:
        >>> differing([{"model": {"unroll": 20, "horizon": 100}}, {"model": {"unroll": 50, "horizon": 100}}])
        [{'model.unroll': 20}, {'model.unroll': 50}]
    """
    runs = [flat(nested) for nested in settings]
    names = dict.fromkeys(name for run in runs for name in run)
    different = [
        name
        for name in names
        if not _says_where(name) and any(run.get(name) != runs[0].get(name) for run in runs)
    ]
    return [{name: run.get(name) for name in different} for run in runs]


def _says_where(name: str) -> bool:
    return any(name == where or name.startswith((f"{where}.", f"{where}_")) for where in WHERE)


def short_text(settings: Mapping[str, Any]) -> str:
    """Returns flat settings as a legend names them, by the shortest end of their names that tells them apart.

    Example:
        >>> short_text({"model.learning_rate": 0.003, "model.task": "l2l_lightning.tasks.Quadratic"})
        'learning_rate=0.003, task=Quadratic'
        >>> short_text({"model.task.dim": 10, "model.rule.dim": 4})
        'task.dim=10, rule.dim=4'
    """
    return ", ".join(
        f"{_short_name(name, settings)}={_short_value(value)}" for name, value in settings.items()
    )


def _short_name(name: str, others: Mapping[str, Any]) -> str:
    parts = name.split(".")
    for number in range(1, len(parts) + 1):
        end = ".".join(parts[-number:])
        if sum(f".{other}".endswith(f".{end}") for other in others) == 1:
            return "seed" if end == "seed_everything" else end
    return name


def _short_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_short_value, value))}]"
    if isinstance(value, str) and all(part.isidentifier() for part in value.split(".")):
        return value.rpartition(".")[2]  # a class or a function
    return str(value)
