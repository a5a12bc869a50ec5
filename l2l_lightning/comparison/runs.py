"""Finished runs, read from their folders and lined up in one comparison; nothing is evaluated again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from l2l_lightning.comparison.curves_file import read_curves
from l2l_lightning.comparison.result import LEARNED, Comparison, Result
from l2l_lightning.comparison.settings import differing, plain, short_text
from l2l_lightning.errors import ResultsError
from l2l_lightning.tables import Column, FittingTable

SAME = ("task", "horizon", "num_optimizees", "data_source", "seed", "dtype")
"""Entries of summary.json that decide which optimizees and minibatches the optimizers met."""

LONGEST_LABEL = 48
"""Characters of settings that a label may have; beyond it a run is called by its folder."""


@dataclass(frozen=True)
class Run:
    """A finished run: what its folder says of the comparison that it ended with."""

    folder: Path
    summary: dict[str, Any]
    """summary.json."""
    results: dict[str, Result]
    """What summary.json and curves.csv say of every optimizer, by name."""
    settings: dict[str, Any]
    """The run's options, nested; {} where the folder says nothing of them."""

    @property
    def learned(self) -> str:
        """The name of its learned optimizer."""
        return str(self.summary.get("reference", LEARNED))

    @property
    def first_losses(self) -> Tensor:
        """The losses [K] at θ0, which tell whether two runs met the same optimizees."""
        return self.results[self.learned].losses[0]


def read_run(folder: Path | str) -> Run:
    """Reads a finished run's folder, or another one that a comparison was written to.

    Raises:
        ResultsError: The folder holds no finished comparison, or a file in it is damaged; the message says
            which.

    Example:
        >>> read_run("runs/quadratic/20300131-120000").learned  # doctest: +SKIP
        'learned'
    """
    folder = Path(folder)
    path = folder / "summary.json"
    if not path.is_file():
        raise ResultsError(f"{folder} {_what_it_is(folder)}")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if missing := [name for name in SAME if name not in summary]:
            raise ValueError(f"it has no {', '.join(missing)}")
        entries = dict(summary["optimizers"])
        losses = read_curves(folder / "curves.csv").losses
        results = {name: _result(losses.pop(name, None), entry) for name, entry in entries.items()}
        size = (summary["horizon"], summary["num_optimizees"])
        if losses or any(result.losses.shape != size for result in results.values()):
            raise ValueError("curves.csv beside it is of another comparison")
    except ResultsError:
        raise
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ResultsError(f"{path} is not a comparison's summary, or is damaged: {error}") from error
    settings = summary.get("settings") or _options(folder / "config.yaml")
    run = Run(folder, summary, results, settings if isinstance(settings, dict) else {})
    if run.learned not in results:
        raise ResultsError(f"{folder} has no learned optimizer among {', '.join(results)}")
    return run


def _result(losses: Tensor | None, entry: dict[str, Any]) -> Result:
    if losses is None:
        raise ValueError("curves.csv beside it is of another comparison")
    rate, setting = entry["learning_rate"], entry.get("setting", {})
    setting = {str(name): float(value) for name, value in setting.items()}
    return Result(losses, float(entry["seconds"]), None if rate is None else float(rate), setting)


def _what_it_is(folder: Path) -> str:
    """Says why a folder without summary.json is not a finished run."""
    if folder.is_file():
        return "is a file, not a run's folder (a checkpoint is compared with --ckpt_path)"
    if not folder.is_dir():
        return "does not exist: give the folders of finished runs"
    if members := sorted(str(path.parent) for path in folder.glob("member-*/summary.json")):
        return f"is a run on a mixture: name one member's folder, such as {members[0]}"
    if (folder / "config.yaml").is_file():
        return f"is a run that has not come to its comparison: finish it with fit --run_folder {folder}"
    return "is not the folder of a finished run: there is no summary.json in it"


def _options(path: Path) -> Any:
    """What a run's config.yaml holds; {} without one that can be read: it is only shown."""
    try:
        return plain(yaml.safe_load(path.read_text(encoding="utf-8"))) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def line_up(runs: Sequence[Run], *, paired: bool = True) -> Comparison:
    """Returns one comparison of several runs' learned optimizers and of their baselines.

    The first run is what all others are compared with, optimizee by optimizee. Runs are called by the
    settings in which they differ, or by their folders where those are the same or many. A baseline that has
    one learning rate and setting in all runs is shown once.

    Args:
        runs: The runs, the first one the reference.
        paired: Whether they must have run on the same optimizees; False shows them without differences.

    Raises:
        ResultsError: No run is given, a folder is given twice, or the runs are not on the same optimizees;
            the message says in what they differ.
    """
    if not runs:
        raise ResultsError("give the folder of at least one finished run")
    folders = [run.folder.resolve() for run in runs]
    if twice := [run.folder for run in runs if folders.count(run.folder.resolve()) > 1]:
        raise ResultsError(f"{twice[0]} is given twice")
    if paired:
        for run in runs[1:]:
            _check_paired(run, runs[0])
    labels = run_labels(runs)
    results = {label: run.results[run.learned] for label, run in zip(labels, runs, strict=True)}
    for name in _baselines(runs):
        results |= _baseline(name, runs, labels, paired)
    sizes = [result.losses.shape for result in results.values()]

    def joined(key: str) -> str:
        return " / ".join(dict.fromkeys(str(run.summary.get(key, "unknown")) for run in runs))

    return Comparison(
        task=joined("task"),
        horizon=max(steps for steps, _ in sizes),
        num_optimizees=max(number for _, number in sizes),
        data_source=joined("data_source"),
        seed=runs[0].summary["seed"],
        device=joined("device"),
        dtype=joined("dtype"),
        results=results,
        settings={
            label: {"folder": str(run.folder), "commit": run.summary.get("commit"), "settings": run.settings}
            for label, run in zip(labels, runs, strict=True)
        },
        learned=tuple(labels),
        paired=paired,
    )


def _check_paired(run: Run, first: Run) -> None:
    different = [
        f"{key} {run.summary[key]}, not {first.summary[key]}"
        for key in SAME
        if _without_path(run.summary[key]) != _without_path(first.summary[key])
    ]
    if not different and not torch.allclose(run.first_losses, first.first_losses, rtol=1e-4, equal_nan=True):
        different = ["other first losses"]
    if different:
        raise ResultsError(
            f"{run.folder} cannot be paired with {first.folder}: it has {'; '.join(different)} "
            "(--unpaired shows them side by side, without differences)"
        )


def _without_path(value: Any) -> Any:
    """A data source without the folder that it lay in: two machines may have it in two places."""
    return re.sub(r" at .* \(", " (", value) if isinstance(value, str) else value


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Returns the runs' names: the settings in which they differ, or their folders' ends that do."""
    if len(runs) == 1:
        return [runs[0].learned]
    labels = [short_text(settings) for settings in differing([run.settings for run in runs])]
    if not _are_distinct(labels) or not all(0 < len(label) <= LONGEST_LABEL for label in labels):
        paths = [run.folder.resolve().parts for run in runs]
        ends = (
            ["/".join(parts[-number:]) for parts in paths] for number in range(1, max(map(len, paths)) + 1)
        )
        labels = next(filter(_are_distinct, ends))
    baselines = _baselines(runs)
    return [f"run {label}" if label in baselines else label for label in labels]


def _are_distinct(labels: Sequence[str]) -> bool:
    return len(set(labels)) == len(labels)


def _baselines(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.results if name != run.learned))


def _baseline(name: str, runs: Sequence[Run], labels: Sequence[str], paired: bool) -> Mapping[str, Result]:
    """A baseline of the runs that have it: by its own name if it ran alike in all, else with each run's."""
    having = [(label, run) for label, run in zip(labels, runs, strict=True) if name in run.results]
    found = {label: run.results[name] for label, run in having}
    how = [(result.learning_rate, result.setting) for result in found.values()]
    if len(found) == 1 or (paired and all(other == how[0] for other in how)):
        return {name: next(iter(found.values()))}
    return {f"{name} ({label})": result for label, result in found.items()}


def runs_table(runs: Sequence[Run]) -> FittingTable:
    """Returns a table of the settings in which runs differ, a row each, and of their folders."""
    settings = differing([run.settings for run in runs])
    names = list(settings[0])
    rows = [
        [label, *(str(found[name]) for name in names), str(run.folder)]
        for label, found, run in zip(run_labels(runs), settings, runs, strict=True)
    ]
    columns = [Column("run"), *(Column(name) for name in names), Column("folder")]
    return FittingTable("Runs, and the settings in which they differ", columns, rows)
