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
from l2l_lightning.progress import WorkProgress
from l2l_lightning.reproduce.art import ART
from l2l_lightning.reproduce.cifar import CIFAR_EXPERIMENT
from l2l_lightning.reproduce.curves import CURVES
from l2l_lightning.reproduce.experiment import Experiment
from l2l_lightning.reproduce.generalise import GENERALISE
from l2l_lightning.reproduce.graph_experiment import GRAPH
from l2l_lightning.reproduce.preprocessing import PREPROCESSING
from l2l_lightning.reproduce.report import write_experiment, write_report
from l2l_lightning.reproduce.result_store import REFERENCE_TASK, ResultStore
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.reproduce.zero_shot.experiment import ZERO_SHOT

EXPERIMENTS: dict[str, Experiment] = {
    **CURVES,
    "graph": GRAPH,
    "preprocessing": PREPROCESSING,
    "generalise": GENERALISE,
    "cifar": CIFAR_EXPERIMENT,
    "art": ART,
    "zero-shot": ZERO_SHOT,
}
"""Every experiment by name, in the order in which they run."""


def reproduce(names: Sequence[str], settings: Settings) -> Path:
    """Runs experiments, one folder each, and writes REPORT.md; returns its path.

    What an earlier call has finished is not repeated, and what it had begun goes on where it was.

    Args:
        names: Of EXPERIMENTS, or "all", which leaves out those that take long in any case.
        settings: How to run them.

    Raises:
        ReproductionError: settings.out holds results of other settings.
        DataNotFoundError: The data is not where the settings say.
        WeightsError: from_pretrained, and the package lacks a rule.
        MetaTrainingError: A meta-training collapsed.
    """
    store = ResultStore(settings)
    _check_folder(store)
    requests = {}
    for name, experiment in EXPERIMENTS.items():
        if name not in names and ("all" not in names or not experiment.in_all):
            continue
        if (store.out / name / "results.json").is_file() and not experiment.keeps_its_own:
            print(f"{name}: done before")
        else:
            requests[name] = experiment.requests(store)
            for request in requests[name].values():
                store.splits(request.task.dataset)  # what is missing shows now rather than in an hour
    with WorkProgress(sum(map(len, requests.values())) + len(requests), "pieces of work") as progress:
        for name, wanted in requests.items():
            store.report = lambda text, name=name: progress.report(f"{name}: {text}")  # type: ignore[misc]
            pieces = len(wanted) + 1  # its losses, and what is made of them
            print(f"{name}: {pieces} pieces of work{progress.at_this_pace(pieces)}", flush=True)
            started, folder, losses = time.perf_counter(), store.out / name, {}
            for key, request in wanted.items():
                losses[key] = store.losses(request)
                progress.count()
            folder.mkdir(parents=True, exist_ok=True)
            outcome = EXPERIMENTS[name].outcome(store, losses, folder)
            tasks = [request.task for request in wanted.values()] or [REFERENCE_TASK]
            head = {"experiment": name, "title": EXPERIMENTS[name].title, **store.provenance(tasks)}
            write_experiment(head, outcome, store.out, time.perf_counter() - started)
            write_report(store.out, list(EXPERIMENTS))
            progress.count()
            print(f"{name}: done")
    return write_report(store.out, list(EXPERIMENTS))


def _check_folder(store: ResultStore) -> None:
    """Refuses to mix results of different settings in one folder."""
    path = store.out / "settings.json"
    ours = asdict(store.settings) | {"data": store.source("mnist")}
    for name in ("out", "data_root", "smiles_root", "cifar_root", "problems", "peers", "workers"):
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
    """Runs the command on what `settings.parse` gave."""
    # Lightning's remarks on its set-up, once for every meta-training.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    try:
        path = reproduce(names, settings)
    except (DataNotFoundError, DataCorruptedError) as error:
        hint = "here --data-root, --smiles-root and --cifar-root name the folders"
        raise type(error)(f"{error} ({hint})") from error
    except KeyboardInterrupt:
        raise ReproductionError("interrupted: the same command goes on from here") from None
    print(f"Report: {path}")
