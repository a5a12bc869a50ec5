"""Figures 9 and 10 of the study: the graphs that unrolling builds, and what replaces them here."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, ClassVar

from l2l_lightning.reproduce.bench import Bench, Request, Train
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome
from l2l_lightning.reproduce.graph import graph_experiment
from l2l_lightning.reproduce.training import Report
from l2l_lightning.rules import UpdateRule
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
        rule = bench.rule("lstm-mnist")
        assert isinstance(rule, UpdateRule)
        results = graph_experiment(
            folder,
            task=MNISTMLP([3], batch_size=4) if bench.settings.quick else MNISTMLP(),
            rule=rule,
            images=None if splits is None else splits.train,
            seed=bench.settings.seed,
            windows=windows,
            progress=lambda text: report(0.5, text),
        )
        with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        measured = results["measurements"]
        return Outcome(_findings(results), results, tuple(columns), rows, tables=[_table(measured)])


def _findings(results: dict[str, Any]) -> list[Finding]:
    """The graphs' sizes, and the longest window's memory with and without one."""
    step, window = results["inner_step"], results["window"]
    longest = {m["mode"]: m for m in results["measurements"]}  # windows ascend: the last of a mode stays
    ours, first, second = (longest[m] for m in ("ours", "unrolled, first order", "unrolled, second order"))
    memory = (
        f"{_mib(ours['peak_bytes'])} without a graph; unrolled {_mib(first['peak_bytes'])} (first order), "
        f"{_mib(second['peak_bytes'])} (second order, as the study's)"
    )
    unmeasured = first["not_measured"] or second["not_measured"]
    return [
        Finding(
            "graph of one inner step (figure 9)",
            "a picture",
            "–",
            f"{step['operations']} operations, {_mib(step['saved_bytes'])} saved",
            "Reproduced: as a TensorBoard graph and a picture.",
        ),
        Finding(
            f"graph of {window['unroll']} steps (figure 10)",
            "a picture; “enormously computationally expensive”",
            "–",
            f"{window['operations']} operations, {_mib(window['saved_bytes'])} saved",
            "Reproduced: as a TensorBoard graph and a picture.",
        ),
        Finding(
            f"peak memory of a meta-step of {ours['unroll']} steps",
            "–",
            "–",
            memory,
            f"Not measured: {unmeasured}."
            if unmeasured
            else "New: a first-order meta-gradient needs no graph.",
        ),
    ]


def _table(measurements: list[dict[str, Any]]) -> str:
    lines = [
        "A meta-step's memory; the peak is beyond what the process had before, each in a process of its own:",
        "",
        "| inner steps | how | operations in the graph | held for the backward | peak |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in measurements:
        why = row["not_measured"]
        peak = _mib(row["peak_bytes"]) if why is None else f"not measured: {why}"
        cells = (row["unroll"], row["mode"], row["operations"] or 0, _mib(row["held_bytes"]), peak)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
