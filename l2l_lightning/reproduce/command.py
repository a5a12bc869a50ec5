"""`python -m l2l_lightning reproduce NAME… | all`."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from l2l_lightning.errors import CommandLineError, DataCorruptedError, DataNotFoundError
from l2l_lightning.files import write_json
from l2l_lightning.reproduce.bench import Bench, Request, Train, Tune
from l2l_lightning.reproduce.convergence import (
    EpochsExperiment,
    MNISTExperiment,
    QuadraticExperiment,
    TransferExperiment,
)
from l2l_lightning.reproduce.experiment import Experiment
from l2l_lightning.reproduce.generalise import GeneraliseExperiment
from l2l_lightning.reproduce.preprocessing import PreprocessingExperiment
from l2l_lightning.reproduce.progress import Countdown
from l2l_lightning.reproduce.report import write_experiment, write_report
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.reproduce.unrolling import GraphExperiment

EXPERIMENTS: dict[str, type[Experiment]] = {
    experiment.name: experiment
    for experiment in (
        QuadraticExperiment,
        MNISTExperiment,
        EpochsExperiment,
        TransferExperiment,
        GraphExperiment,
        PreprocessingExperiment,
        GeneraliseExperiment,
    )
}
"""Every experiment by name, in the order in which `all` runs them."""


class OutFolderError(CommandLineError):
    """The folder holds a reproduction with other settings; the message names them."""


def reproduce(names: Sequence[str], settings: Settings) -> Path:
    """Runs experiments, one folder each, and writes REPORT.md; returns its path.

    What an earlier call has finished is not repeated, and what it had begun goes on where it was.

    Args:
        names: Of EXPERIMENTS, or "all".
        settings: How to run them.

    Raises:
        OutFolderError: settings.out holds results of other settings.
        DataNotFoundError: The data is not where the settings say.
        NotShippedError: from_pretrained, and the package lacks a rule.
        MetaTrainingError: A meta-training collapsed.
    """
    chosen = [name for name in EXPERIMENTS if name in names or "all" in names]
    bench = Bench(settings)
    _check_folder(bench)
    experiments = {name: EXPERIMENTS[name]() for name in chosen}
    for experiment in experiments.values():
        for dataset in experiment.data(bench):
            bench.splits(dataset)  # what is missing shows now rather than in an hour
    for name in [name for name in experiments if (bench.out / name / "results.json").is_file()]:
        print(f"{name}: done before")
        del experiments[name]
    requests = {name: experiment.requests(bench) for name, experiment in experiments.items()}
    total = sum(
        sum(map(bench.seconds, requests[name])) + experiment.seconds
        for name, experiment in experiments.items()
    )
    with Countdown(total) as countdown:
        for name, experiment in experiments.items():
            started = time.perf_counter()
            for request in requests[name]:
                with countdown.work(bench.seconds(request), f"{name}: {_text(request)}") as report:
                    bench.answer(request, report)
            folder = bench.out / name
            folder.mkdir(parents=True, exist_ok=True)
            with countdown.work(experiment.seconds, f"{name}: ") as report:
                outcome = experiment.outcome(bench, folder, report)
            write_experiment(experiment, outcome, bench, folder, time.perf_counter() - started)
            write_report(bench.out, list(EXPERIMENTS))
            print(f"{name}: done")
    return write_report(bench.out, list(EXPERIMENTS))


def _check_folder(bench: Bench) -> None:
    """Refuses to mix results of different settings in one folder."""
    path = bench.out / "settings.json"
    ours = {key: value for key, value in asdict(bench.settings).items() if key not in ("out",)}
    ours["data"] = bench.source("mnist")
    del ours["data_root"], ours["smiles_root"]
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if different:
            what = ", ".join(f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}" for key in different)
            raise OutFolderError(
                f"{bench.out} holds a reproduction with {what}: name another folder with --out"
            )
    write_json(path, ours)


def _text(request: Request) -> str:
    match request:
        case Train(rule):
            return f"meta-training {rule}, "
        case Tune(task, horizons):
            return f"{task.describe()}, {max(horizons)} steps, "
        case _:
            return ""


def main(names: Sequence[str], settings: Settings) -> None:
    """Runs the command on what `arguments.parse` gave."""
    # Lightning's remarks on its set-up, once for every meta-training.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    try:
        path = reproduce(names, settings)
    except (DataNotFoundError, DataCorruptedError) as error:
        raise CommandLineError(f"{error} (here --data-root and --smiles-root name the folders)") from error
    except KeyboardInterrupt:
        raise CommandLineError("interrupted: the same command goes on from here") from None
    print(f"Report: {path}")
