"""Figures 9 and 10 of the study: the graphs that unrolling builds, and what replaces them here."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

from l2l_lightning.reproduce.bench import Bench, Request, Train
from l2l_lightning.reproduce.experiment import Experiment, Outcome
from l2l_lightning.reproduce.graph import graph_experiment
from l2l_lightning.reproduce.training import Report
from l2l_lightning.tasks import MNISTMLP


class GraphExperiment(Experiment):
    """An inner step's graph, a window's graph, and their memory beside that of a window without one."""

    name = "graph"
    title = "The computational graph of an inner step and of a window: the study's figures 9 and 10"
    datasets: ClassVar[set[str | None]] = {"mnist"}
    seconds = 90.0

    def requests(self, bench: Bench) -> list[Request]:
        """The rule whose graph it is."""
        return [Train("lstm-mnist")]

    def outcome(self, bench: Bench, folder: Path, report: Report) -> Outcome:
        """Writes the event file and the pictures; their numbers."""
        splits = bench.splits("mnist")
        windows = (2, 3) if bench.settings.quick else (10, 20, 100)
        results = graph_experiment(
            folder,
            task=MNISTMLP([3], batch_size=4) if bench.settings.quick else MNISTMLP(),
            rule=bench.rule("lstm-mnist"),
            images=None if splits is None else splits.train,
            seed=bench.settings.seed,
            windows=windows,
            progress=lambda text: report(0.5, text),
        )
        with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        return Outcome([], results, tuple(columns), rows)
