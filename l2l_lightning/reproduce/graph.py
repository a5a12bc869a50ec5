"""The study's figures 9 and 10, the graphs of an inner step and of a window, and what does without them."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from l2l_lightning.comparison.plots import png
from l2l_lightning.data.images import Images
from l2l_lightning.files import write_atomically
from l2l_lightning.reproduce.autograd_graph import Graph, window_graph
from l2l_lightning.reproduce.graph_drawing import Measurement, step_figure, window_figure
from l2l_lightning.reproduce.graph_events import write_events
from l2l_lightning.reproduce.memory import (
    MODES,
    MetaStep,
    NotMeasuredError,
    available_bytes,
    held_bytes,
    measure,
)
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rules.base import UpdateRule
from l2l_lightning.tasks.base import Task

DRAWN_UNROLL = 20
"""Steps of the window that is drawn: the paper's."""

_MARGIN = 1.5
"""What a meta-step may take for each byte that it holds: its backward needs room too."""


def graph_experiment(
    folder: Path,
    *,
    task: Task,
    rule: UpdateRule,
    images: Images | None,
    seed: int,
    windows: Sequence[int] = (10, 20, 100),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Draws the graph that unrolling a meta-step builds, and measures its memory beside that of none.

    The graph is the second-order one, as in the study, which did not stop the optimizee's gradient. Writes
    into the folder:

        graph/inner_step, graph/window  event files for `tensorboard --logdir FOLDER/graph`
        inner_step.png, window.png      the same as pictures, the second with the measurements
        results.csv                     mode, unroll, quantity, value, unit; no value: not measured

    Args:
        folder: Where they go; made if need be.
        task: What one optimizee is drawn from.
        rule: m_φ, on the CPU; left as it is. Measuring needs classes that a new process can import.
        images: The split that the task draws from, if it needs one.
        seed: Of the optimizee.
        windows: T of the meta-steps to measure; each takes a process for every mode.
        progress: Told in a few words what comes next.

    Returns:
        Plain values: "inner_step" and "window" describe the drawn graphs; "measurements" has, for every mode
        and T, the operations, edges and bytes of the graph behind the meta-loss, the bytes that are held when
        the backward begins and, of ours, which, and the peak beyond what the process had before. What was
        not measured is null, and "not_measured" says why.

    Example:
        >>> import tempfile
        >>> from l2l_lightning import CoordinatewiseLSTM, Quadratic
        >>> folder, rule = Path(tempfile.mkdtemp()), CoordinatewiseLSTM(hidden_size=4)
        >>> results = graph_experiment(
        ...     folder, task=Quadratic(dim=2), rule=rule, images=None, seed=0, windows=[2]
        ... )
        >>> [measurement["mode"] for measurement in results["measurements"]]
        ['ours', 'unrolled, first order', 'unrolled, second order']
    """
    report = progress or (lambda text: None)
    # One whose φ is trained no further gives its updates a graph as well.
    rule = copy.deepcopy(rule).requires_grad_()

    def graph(unroll: int) -> Graph:
        optimizees = Optimizees(task, images, seed, "train", indices=[0])
        return window_graph(rule, optimizees, unroll, second_order=True)

    report("graph of an inner step")
    step = graph(1)
    report(f"graph of {DRAWN_UNROLL} steps")
    window = graph(DRAWN_UNROLL)
    write_events(step, folder / "graph" / "inner_step")
    write_events(window, folder / "graph" / "window")
    measurements = []
    for unroll in windows:
        for mode in MODES:
            report(f"memory of {unroll} steps, {mode}")
            expected = window.saved_bytes * (unroll + 1) // (DRAWN_UNROLL + 1)
            measurements.append(_measurement(MetaStep(task, rule, images, seed, mode, unroll), expected))
    write_atomically(
        folder / "inner_step.png", png(step_figure(step, "The second-order graph of one inner step"))
    )
    figure = window_figure(
        window,
        held_bytes(rule, task.num_coordinates, DRAWN_UNROLL),
        [Measurement(m["mode"], m["unroll"], m["held_bytes"], m["peak_bytes"]) for m in measurements],
        f"The second-order graph of {DRAWN_UNROLL} unrolled steps",
    )
    write_atomically(folder / "window.png", png(figure))
    write_atomically(folder / "results.csv", _csv(measurements))
    return {
        "task": task.describe(),
        "coordinates": task.num_coordinates,
        "rule": type(rule).__name__,
        "rule_config": rule.config(),
        "seed": seed,
        "inner_step": _describe(step, 1),
        "window": _describe(window, DRAWN_UNROLL),
        "measurements": measurements,
    }


def _measurement(step: MetaStep, expected_graph_bytes: int) -> dict[str, Any]:
    """One entry of "measurements"; nothing is started that may want more memory than there is."""
    blocks = held_bytes(step.rule, step.task.num_coordinates, step.unroll) if step.mode == "ours" else {}
    expected = _MARGIN * (sum(blocks.values()) if blocks else expected_graph_bytes)
    found = reason = None
    if expected > (available := available_bytes()):
        reason = f"it may take {expected / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are free"
    else:
        try:
            found = measure(step)
        except NotMeasuredError as error:
            reason = str(error)
    graph_bytes = found.graph_bytes if found else None
    return {
        "mode": step.mode,
        "unroll": step.unroll,
        "operations": found.operations if found else None,
        "edges": found.edges if found else None,
        "graph_bytes": graph_bytes,
        "held_bytes": sum(blocks.values()) if blocks else graph_bytes,
        **{f"{name}_bytes": size for name, size in blocks.items()},
        "peak_bytes": found.peak_bytes if found else None,
        "not_measured": reason,
    }


def _describe(graph: Graph, unroll: int) -> dict[str, Any]:
    parts = {part: {"operations": n, "saved_bytes": held} for part, (n, held) in graph.by_part().items()}
    return {
        "unroll": unroll,
        "operations": len(graph.operations),
        "edges": len(graph.edges),
        "saved_bytes": graph.saved_bytes,
        "parts": parts,
    }


def _csv(measurements: Iterable[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["mode", "unroll", "quantity", "value", "unit"])
    for measurement in measurements:
        for name, value in measurement.items():
            if name in ("operations", "edges"):
                writer.writerow([measurement["mode"], measurement["unroll"], name, value, "1"])
            elif name.endswith("_bytes"):
                quantity = name.removesuffix("_bytes")
                writer.writerow([measurement["mode"], measurement["unroll"], quantity, value, "bytes"])
    return buffer.getvalue()
