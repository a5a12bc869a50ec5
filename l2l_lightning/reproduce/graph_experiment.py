"""Figures 9 and 10 of the study: the graphs that unrolling builds, and what replaces them here."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from l2l_lightning.reproduce.autograd_graph import window_graph
from l2l_lightning.reproduce.experiment import Experiment, Finding, Outcome, markdown_table
from l2l_lightning.reproduce.meta_step_memory import MODES, MetaStep, held_bytes, measure
from l2l_lightning.reproduce.result_store import ResultStore
from l2l_lightning.reproduce.tensorboard_graph import write_events
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rules import UpdateRule
from l2l_lightning.tasks import MNISTMLP

WINDOWS = (
    ("inner_step", 1, "graph of one inner step (figure 9)", "a picture"),
    ("window", 20, "graph of 20 steps (figure 10)", "a picture; “enormously computationally expensive”"),
)
"""The graphs that are written: their name, T, and the report's line; the window is as long as the paper's."""


def _outcome(store: ResultStore, losses: Mapping[Any, Tensor], folder: Path) -> Outcome:
    """Writes event files, and measures the memory of a meta-step that unrolls beside one that does not.

    The graph is the second-order one, as in the study, which did not stop the optimizee's gradient. The
    folders graph/inner_step and graph/window are for `tensorboard --logdir FOLDER/graph`. In the results,
    "measurements" has, for every mode and T, the operations, edges and bytes of the graph behind the
    meta-loss, the bytes that are held when the backward begins and, of ours, which, and the peak beyond
    what the process had before. What was not measured is null, and "not_measured" says why.
    """
    splits, seed, quick = store.splits("mnist"), store.settings.seed, store.settings.quick
    assert splits is not None
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
    findings = []
    for name, unroll, what, study in WINDOWS:
        store.report(f"graph of {unroll} inner steps")
        optimizees = Optimizees(task, splits.train, seed, "train", indices=[0])
        graph = window_graph(rule, optimizees, unroll, second_order=True)
        write_events(graph, folder / "graph" / name)
        results[name] = {
            "unroll": unroll,
            "operations": len(graph.operations),
            "edges": len(graph.edges),
            "saved_bytes": graph.saved_bytes,
            "parts": {
                part: {"operations": number, "saved_bytes": held}
                for part, (number, held) in graph.by_part().items()
            },
        }
        size = f"{len(graph.operations)} operations, {_size(graph.saved_bytes)} saved"
        findings.append(Finding(what, study, "–", size, "Reproduced: as a TensorBoard graph."))
    results["measurements"] = measurements = []
    for unroll, mode in itertools.product((2, 3) if quick else (10, 20, 100), MODES):
        store.report(f"memory of {unroll} steps, {mode}")
        measurements.append(_measurement(MetaStep(task, rule, splits.train, seed, mode, unroll)))
    return Outcome(
        [*findings, _peak_finding(measurements[-len(MODES) :])],
        results,
        ("mode", "unroll", "quantity", "value", "unit"),
        [
            [found["mode"], found["unroll"], name.removesuffix("_bytes"), value, unit]
            for found in measurements
            for name, value in found.items()
            if (unit := _unit(name))
        ],
        {},
        [_table(measurements)],
    )


def _measurement(step: MetaStep) -> dict[str, Any]:
    blocks = held_bytes(step.rule, step.task.num_coordinates, step.unroll) if step.mode == "ours" else {}
    found: dict[str, Any] = dict.fromkeys(("operations", "edges", "graph_bytes", "peak_bytes"))
    reason = None
    try:
        found |= measure(step)
    except (RuntimeError, MemoryError) as error:
        reason = f"its process ended: {error}"
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


def _unit(name: str) -> str | None:
    return "bytes" if name.endswith("_bytes") else "1" if name in ("operations", "edges") else None


def _peak_finding(measurements: Sequence[dict[str, Any]]) -> Finding:
    """Reports the longest window's memory with and without a graph; the measurements are in MODES' order."""
    ours, first, second = (_size(found["peak_bytes"]) for found in measurements)
    unmeasured = next((found["not_measured"] for found in measurements if found["not_measured"]), None)
    return Finding(
        f"peak memory of a meta-step of {measurements[0]['unroll']} steps",
        "–",
        "–",
        f"{ours} without a graph; unrolled {first} (first order), {second} (second order, as the study's)",
        f"Not measured: {unmeasured}." if unmeasured else "New: a first-order meta-gradient needs no graph.",
    )


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


def _size(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


GRAPH = Experiment(
    "The computational graph of an inner step and of a window: the study's figures 9 and 10",
    lambda store: {},
    _outcome,
)
"""An inner step's graph, a window's graph, and their memory beside that of a window without one."""
