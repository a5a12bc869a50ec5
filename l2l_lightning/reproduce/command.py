"""`python -m l2l_lightning reproduce NAME… | all`."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from l2l_lightning.errors import DataCorruptedError, DataNotFoundError, ReproductionError
from l2l_lightning.files import write_json
from l2l_lightning.reproduce.curves import (
    EpochsExperiment,
    MNISTExperiment,
    QuadraticExperiment,
    TransferExperiment,
)
from l2l_lightning.reproduce.experiment import Experiment
from l2l_lightning.reproduce.generalise import GeneraliseExperiment
from l2l_lightning.reproduce.graph_experiment import GraphExperiment
from l2l_lightning.reproduce.preprocessing import PreprocessingExperiment
from l2l_lightning.reproduce.progress import ProgressBar
from l2l_lightning.reproduce.report import write_experiment, write_report
from l2l_lightning.reproduce.result_store import ResultStore
from l2l_lightning.reproduce.settings import Settings

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


def reproduce(names: Sequence[str], settings: Settings) -> Path:
    """Runs experiments, one folder each, and writes REPORT.md; returns its path.

    What an earlier call has finished is not repeated, and what it had begun goes on where it was.

    Args:
        names: Of EXPERIMENTS, or "all".
        settings: How to run them.

    Raises:
        ReproductionError: settings.out holds results of other settings.
        DataNotFoundError: The data is not where the settings say.
        WeightsError: from_pretrained, and the package lacks a rule.
        MetaTrainingError: A meta-training collapsed.
    """
    store = ResultStore(settings)
    _check_folder(store)
    experiments = [kind() for name, kind in EXPERIMENTS.items() if name in names or "all" in names]
    for experiment in experiments:
        for dataset in experiment.data(store):
            store.splits(dataset)  # what is missing shows now rather than in an hour
    for experiment in list(experiments):
        if (store.out / experiment.name / "results.json").is_file():
            print(f"{experiment.name}: done before")
            experiments.remove(experiment)
    requests = {experiment.name: experiment.requests(store) for experiment in experiments}
    with ProgressBar(sum(map(len, requests.values())) + len(experiments)) as progress:
        for experiment in experiments:
            name, folder = experiment.name, store.out / experiment.name
            store.report = lambda text, name=name: progress.report(f"{name}: {text}")  # type: ignore[misc]
            started = time.perf_counter()
            for request in requests[name]:
                store.losses(request)
                progress.count()
            folder.mkdir(parents=True, exist_ok=True)
            outcome = experiment.outcome(store, folder)
            write_experiment(experiment, outcome, store, folder, time.perf_counter() - started)
            write_report(store.out, list(EXPERIMENTS))
            progress.count()
            print(f"{name}: done")
    return write_report(store.out, list(EXPERIMENTS))


def _check_folder(store: ResultStore) -> None:
    """Refuses to mix results of different settings in one folder."""
    path = store.out / "settings.json"
    ours = asdict(store.settings) | {"data": store.source("mnist")}
    for name in ("out", "data_root", "smiles_root"):
        del ours[name]
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if different:
            what = ", ".join(f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}" for key in different)
            raise ReproductionError(
                f"{store.out} holds a reproduction with {what}: name another folder with --out"
            )
    write_json(path, ours)


def main(names: Sequence[str], settings: Settings) -> None:
    """Runs the command on what `arguments.parse` gave."""
    # Lightning's remarks on its set-up, once for every meta-training.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    try:
        path = reproduce(names, settings)
    except (DataNotFoundError, DataCorruptedError) as error:
        hint = "here --data-root and --smiles-root name the folders"
        raise type(error)(f"{error} ({hint})") from error
    except KeyboardInterrupt:
        raise ReproductionError("interrupted: the same command goes on from here") from None
    print(f"Report: {path}")
