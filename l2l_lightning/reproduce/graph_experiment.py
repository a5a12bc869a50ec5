"""Figures 9 and 10 of the study: the graphs that unrolling builds, and what replaces them here."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from l2l_lightning.comparison.plots import COLOURS, HIGHLIGHT, png
from l2l_lightning.reproduce.autograd_graph import Graph, window_graph
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome, markdown_table
from l2l_lightning.reproduce.meta_step_memory import (
    MODES,
    MetaStep,
    NotMeasuredError,
    available_bytes,
    held_bytes,
    measure,
)
from l2l_lightning.reproduce.result_store import ResultStore
from l2l_lightning.reproduce.tensorboard_graph import write_events
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rules import UpdateRule
from l2l_lightning.tasks import MNISTMLP

WINDOW = 20
"""The steps of the window whose graph is written, as many as the paper's."""

_MARGIN = 1.5
"""The bytes that a meta-step may take for each that it holds: its backward needs room too."""


class GraphExperiment(Experiment):
    """An inner step's graph, a window's graph, and their memory beside that of a window without one."""

    name = "graph"
    title = "The computational graph of an inner step and of a window: the study's figures 9 and 10"

    def outcome(self, store: ResultStore, folder: Path) -> Outcome:
        """Writes event files, and measures the memory of a meta-step that unrolls beside one that does not.

        The graph is the second-order one, as in the study, which did not stop the optimizee's gradient. The
        folders graph/inner_step and graph/window are for `tensorboard --logdir FOLDER/graph`. In the results,
        "measurements" has, for every mode and T, the operations, edges and bytes of the graph behind the
        meta-loss, the bytes that are held when the backward begins and, of ours, which, and the peak beyond
        what the process had before. What was not measured is null, and "not_measured" says why.
        """
        splits, seed, quick = store.splits("mnist"), store.settings.seed, store.settings.quick
        images = None if splits is None else splits.train
        task = MNISTMLP([3], batch_size=4) if quick else MNISTMLP()
        # One whose φ is trained no further gives its updates a graph as well.
        rule = copy.deepcopy(store.rule("lstm-mnist")).requires_grad_()
        assert isinstance(rule, UpdateRule)
        results: dict[str, Any] = {
            "task": task.describe(),
            "coordinates": task.num_coordinates,
            "rule": type(rule).__name__,
            "rule_config": rule.config(),
            "seed": seed,
        }
        for name, unroll in (("inner_step", 1), ("window", WINDOW)):
            store.report(f"graph of {unroll} inner steps")
            optimizees = Optimizees(task, images, seed, "train", indices=[0])
            graph = window_graph(rule, optimizees, unroll, second_order=True)
            write_events(graph, folder / "graph" / name)
            results[name] = _describe(graph, unroll)
        results["measurements"] = measurements = []
        for unroll, mode in itertools.product((2, 3) if quick else (10, 20, 100), MODES):
            store.report(f"memory of {unroll} steps, {mode}")
            expected = graph.saved_bytes * (unroll + 1) // (WINDOW + 1)
            measurements.append(_measurement(MetaStep(task, rule, images, seed, mode, unroll), expected))
        return Outcome(
            _findings(results),
            results,
            ("mode", "unroll", "quantity", "value", "unit"),
            list(_rows(measurements)),
            {"meta_steps": png(bars(measurements))},
            tables=[_table(measurements)],
        )


def _describe(graph: Graph, unroll: int) -> dict[str, Any]:
    parts = {part: {"operations": n, "saved_bytes": held} for part, (n, held) in graph.by_part().items()}
    return {
        "unroll": unroll,
        "operations": len(graph.operations),
        "edges": len(graph.edges),
        "saved_bytes": graph.saved_bytes,
        "parts": parts,
    }


def _measurement(step: MetaStep, expected_graph_bytes: int) -> dict[str, Any]:
    """Makes one entry of "measurements"; it starts nothing that may want more memory than there is."""
    blocks = held_bytes(step.rule, step.task.num_coordinates, step.unroll) if step.mode == "ours" else {}
    expected = _MARGIN * (sum(blocks.values()) if blocks else expected_graph_bytes)
    found, reason = dict.fromkeys(("operations", "edges", "graph_bytes", "peak_bytes")), None
    if expected > (available := available_bytes()):
        reason = f"it may take {expected / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are free"
    else:
        try:
            found |= measure(step)
        except NotMeasuredError as error:
            reason = str(error)
    peak = found.pop("peak_bytes")
    return {
        "mode": step.mode,
        "unroll": step.unroll,
        **found,
        "held_bytes": sum(blocks.values()) if blocks else found["graph_bytes"],
        **{f"{name}_bytes": size for name, size in blocks.items()},
        "peak_bytes": peak,
        "not_measured": reason,
    }


def _rows(measurements: Sequence[dict[str, Any]]) -> Iterator[Sequence[Any]]:
    """Lists every number in long form; the value is None where it was not measured."""
    for measurement in measurements:
        for name, value in measurement.items():
            quantity = name.removesuffix("_bytes")
            if quantity != name or name in ("operations", "edges"):
                unit = "1" if quantity == name else "bytes"
                yield measurement["mode"], measurement["unroll"], quantity, value, unit


def _findings(results: dict[str, Any]) -> list[Finding]:
    """Reports the graphs' sizes, and the longest window's memory with and without one."""
    findings = []
    for key, what, study in (
        ("inner_step", "graph of one inner step (figure 9)", "a picture"),
        (
            "window",
            f"graph of {WINDOW} steps (figure 10)",
            "a picture; “enormously computationally expensive”",
        ),
    ):
        size = f"{results[key]['operations']} operations, {_size(results[key]['saved_bytes'])} saved"
        findings.append(Finding(what, study, "–", size, "Reproduced: as a TensorBoard graph."))
    longest = {m["mode"]: m for m in results["measurements"]}  # windows ascend: the last of a mode stays
    ours, first, second = (longest[mode] for mode in MODES)
    unmeasured = first["not_measured"] or second["not_measured"]
    memory = (
        f"{_size(ours['peak_bytes'])} without a graph; unrolled {_size(first['peak_bytes'])} (first order), "
        f"{_size(second['peak_bytes'])} (second order, as the study's)"
    )
    verdict = (
        f"Not measured: {unmeasured}." if unmeasured else "New: a first-order meta-gradient needs no graph."
    )
    return [
        *findings,
        Finding(f"peak memory of a meta-step of {ours['unroll']} steps", "–", "–", memory, verdict),
    ]


def _table(measurements: Sequence[dict[str, Any]]) -> str:
    rows = []
    for row in measurements:
        why, held = row["not_measured"], _size(row["held_bytes"])
        peak = _size(row["peak_bytes"]) if why is None else f"not measured: {why}"
        rows.append([row["unroll"], row["mode"], row["operations"] or 0, held, peak])
    head = ["inner steps", "how", "operations in the graph", "held for the backward", "peak"]
    return (
        "A meta-step's memory; the peak is beyond what the process had before, each in a process of its own:"
        f"\n\n{markdown_table(head, rows)}"
    )


def bars(measurements: Sequence[dict[str, Any]]) -> Figure:
    """Draws bars over T for every mode: the graph's operations and the peak memory, where measured."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    windows = list(dict.fromkeys(m["unroll"] for m in measurements))
    colours = dict(zip(MODES, (HIGHLIGHT, *COLOURS), strict=False))
    left, right = figure.subplots(1, 2)
    for axes, quantity, unit, title in (
        (left, "operations", 1, "Operations in the graph behind a window's meta-loss"),
        (right, "peak_bytes", 2**20, "Peak memory of its meta-step, MiB"),
    ):
        for number, mode in enumerate(MODES):
            values = [m[quantity] for m in measurements if m["mode"] == mode]
            heights = [math.nan if value is None else value / unit for value in values]
            places = [place + 0.3 * (number - 1) for place in range(len(windows))]
            drawn = axes.bar(places, heights, 0.28, label=mode, color=colours[mode])
            axes.bar_label(drawn, fmt="{:,.0f}", fontsize=7)
        axes.set_xticks(range(len(windows)), [f"{T} steps" for T in windows])
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _size(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
