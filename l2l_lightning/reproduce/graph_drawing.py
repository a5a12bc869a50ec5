"""Pictures of autograd's graphs: an inner step by its operations, a window beside what does without one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, PathPatch, Rectangle
from matplotlib.path import Path

from l2l_lightning.comparison.plots import COLOURS, HIGHLIGHT
from l2l_lightning.reproduce.autograd_graph import (
    BACKWARD,
    FORWARD,
    LEARNED,
    LEAVES,
    META_LOSS,
    UPDATE,
    Graph,
    Operation,
    Place,
)

PART_COLOURS = {
    LEAVES: "#666666",
    FORWARD: COLOURS[0],
    BACKWARD: COLOURS[4],
    LEARNED: HIGHLIGHT,
    UPDATE: COLOURS[1],
    META_LOSS: COLOURS[5],
}
HELD_COLOURS = {"states": COLOURS[2], "gradients": COLOURS[3], "cotangents": COLOURS[1]}

_LANES = {META_LOSS: 0.0, UPDATE: -0.6, FORWARD: -1.3, BACKWARD: -2.2, LEARNED: -3.3, LEAVES: -4.4}
"""A window's parts from top to bottom: θ_t, down through the optimizee and the rule, and up to θ_{t+1}."""

RESHAPING = frozenset(
    (
        *("Alias", "AsStrided", "Expand", "Permute", "Reshape", "Select", "Slice", "Split", "SplitWithSizes"),
        *("Squeeze", "T", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View"),
    )
)
"""Operations that give another view of what is there: they compute nothing and hold nothing."""

MIB = 2**20

_SORTING, _STRAIGHTENING = 40, 60
"""Sweeps over the rows."""

# Inches.
_ROW, _FLAT_ROW = 0.235, 0.13
_HEADER = 0.9
_BOX_HEIGHT, _LETTER, _PADDING, _DOT = 0.17, 0.0505, 0.1, 0.11


@dataclass(frozen=True)
class Measurement:
    """What one way to a window's meta-gradient holds, and what it takes."""

    mode: str
    unroll: int
    held_bytes: int | None
    peak_bytes: int | None
    """None, as what is held may be, where it was not measured."""


@dataclass(frozen=True)
class Layout:
    """Where a drawing's points lie."""

    x: npt.NDArray[np.float64]
    """Of every operation, then of every bend."""
    row: npt.NDArray[np.int64]
    """The same points' rows, from the top."""
    paths: list[list[int]]
    """The points that each edge goes through, from its first operation to its last."""


def layered_layout(graph: Graph, widths: Sequence[float]) -> Layout:
    """Rows such that every edge goes down, and places in them such that edges are straight and cross little.

    A row is the longest way to the graph's end, so that everything stands right before what uses it; an edge
    has a bend in every row that it passes. Rows are sorted by the mean of their neighbours' places, from top
    to bottom and back, and the places are those next to the means that leave room for the widths.

    Args:
        graph: What to lay out.
        widths: Of its operations, gaps included.

    Source: Sugiyama, Tagawa, Toda 1981, "Methods for visual understanding of hierarchical system structures".
    """
    count = len(graph.operations)
    to_end = longest_ways(count, [(b, a) for a, b in reversed(graph.edges)], range(count - 1, -1, -1))
    rows = [int(to_end.max()) - int(way) for way in to_end]
    width = list(widths)
    above: dict[int, list[int]] = defaultdict(list)
    below: dict[int, list[int]] = defaultdict(list)
    paths = []
    for source, target in dict.fromkeys(graph.edges):
        bends = range(len(rows), len(rows) + rows[target] - rows[source] - 1)
        rows += range(rows[source] + 1, rows[target])
        width += [_DOT] * len(bends)
        path = [source, *bends, target]
        paths.append(path)
        for a, b in pairwise(path):
            below[a].append(b)
            above[b].append(a)
    row = np.array(rows)
    x = np.zeros(len(rows))
    members = [np.flatnonzero(row == r) for r in range(row.max() + 1)]
    for sweep in range(_SORTING + _STRAIGHTENING):
        down, sorting = sweep % 2 == 0, sweep < _SORTING
        for r in range(len(members)) if down else reversed(range(len(members))):
            points = members[r].tolist()
            # In the end a point heeds both sides, which straightens lines.
            both = [[*above[p], *below[p]] for p in points]
            near = [above[p] if down else below[p] for p in points] if sorting else both
            # A little nearer to the middle: without, rows that push each other apart drift without end.
            wanted = np.array([0.99 * x[n].mean() if n else x[p] for p, n in zip(points, near, strict=True)])
            if sorting:
                order = np.argsort(wanted, kind="stable")
                members[r], wanted = members[r][order], wanted[order]
            # A bend is to lie straight above its next: lines are followed by eye, boxes need not be.
            weight = np.where(members[r] >= count, 3.0, 1.0)
            x[members[r]] = _spread(wanted, np.array([width[p] for p in members[r].tolist()]), weight)
    return Layout(x, row, paths)


def longest_ways(count: int, edges: Sequence[tuple[int, int]], order: Sequence[int]) -> npt.NDArray[np.int64]:
    """The number of edges on the longest way that ends in each of `count` points, visited in this order."""
    sources: dict[int, list[int]] = defaultdict(list)
    for a, b in edges:
        sources[b].append(a)
    ways = np.zeros(count, np.int64)
    for point in order:
        ways[point] = max((ways[source] + 1 for source in sources[point]), default=0)
    return ways


def _spread(
    target: npt.NDArray[np.float64], room: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The places nearest to the targets (least squares) that keep their order and leave each its room.

    By pooling adjacent violators: what would overlap becomes a block, which stands at its members' mean.
    """
    offset = np.concatenate([[0.0], np.cumsum((room[1:] + room[:-1]) / 2)])
    blocks: list[tuple[float, float, int]] = []  # (mean, weight, members)
    for wanted, w in zip(target - offset, weight, strict=True):
        mean, total, members = float(wanted), float(w), 1
        while blocks and blocks[-1][0] >= mean:
            before, its_weight, its_members = blocks.pop()
            mean = (before * its_weight + mean * total) / (its_weight + total)
            total, members = its_weight + total, its_members + members
        blocks.append((mean, total, members))
    places: npt.NDArray[np.float64] = np.repeat([b[0] for b in blocks], [b[2] for b in blocks]) + offset
    return places


def step_figure(graph: Graph, title: str) -> Figure:
    """A small graph, from top to bottom: every operation a box with what it saved, every reshaping one a dot.

    Args:
        graph: With every operation in its place.
        title: Above it; its counts are added.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM, Optimizees, Quadratic
        >>> from l2l_lightning.reproduce.autograd_graph import window_graph
        >>> optimizees = Optimizees(Quadratic(dim=3), None, seed=0, stream="train", indices=[0])
        >>> graph = window_graph(CoordinatewiseLSTM(), optimizees, 1, second_order=True)
        >>> figure = step_figure(graph, "An inner step")
    """
    labels = [_label(operation) for operation in graph.operations]
    widths = [_LETTER * len(label) + _PADDING if label else _DOT for label in labels]
    layout = layered_layout(graph, [width + 0.1 for width in widths])
    tall = np.full(layout.row.max() + 1, False)
    for r, label in zip(layout.row, labels, strict=False):
        tall[r] |= bool(label)
    height = np.where(tall, _ROW, _FLAT_ROW)
    y = -(np.cumsum(height) - height / 2)[layout.row]
    half = np.zeros(len(layout.x))
    half[: len(widths)] = np.array(widths) / 2
    left, right = (layout.x - half).min(), (layout.x + half).max()
    # Wide enough for the legend.
    size = (max(right - left + 0.3, 7.0), float(height.sum()) + _HEADER + 0.1)
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim((left + right - size[0]) / 2, (left + right + size[0]) / 2)
    axes.set_ylim(_HEADER - size[1], _HEADER)
    axes.set_axis_off()
    for path in layout.paths:
        points = np.stack([layout.x[path], y[path]], axis=1)
        axes.add_patch(PathPatch(_smooth(points), fill=False, ec="#9a9a9a", lw=0.6, zorder=1))
    for i, (operation, label, width) in enumerate(zip(graph.operations, labels, widths, strict=True)):
        colour = _colour(operation)
        if not label:
            axes.plot(layout.x[i], y[i], "o", ms=3.4, color=colour, zorder=3)
            continue
        corner = (layout.x[i] - width / 2, y[i] - _BOX_HEIGHT / 2)
        box = FancyBboxPatch(corner, width, _BOX_HEIGHT, boxstyle="round,pad=0,rounding_size=0.04")
        box.set(ec=colour, lw=0.9, fc=_tint(colour, 0.3 if _holds(operation) else 0.06), zorder=3)
        axes.add_patch(box)
        axes.text(layout.x[i], y[i] - 0.003, label, size=6.2, ha="center", va="center_baseline", zorder=4)
    figure.text(0.15 / size[0], 1 - 0.2 / size[1], _with_counts(title, graph), size=10, va="center")
    _part_legend(figure, graph)
    return figure


def window_figure(
    graph: Graph, held: Mapping[str, int], measurements: Sequence[Measurement], title: str
) -> Figure:
    """A window's graph, step by step; under it, what it holds beside what the forward without a graph holds.

    Above: every operation a dot, placed by its part, its step and the longest way from that part's start.
    Below, left: areas are bytes, on one scale, a column for every step. Right: measured peaks, and in them
    the share that is held when the backward begins.

    Args:
        graph: Of an unrolled window, with every operation in its place.
        held: Bytes of what the forward without a graph holds in its stead, by name (see HELD_COLOURS).
        measurements: Of every way to the meta-gradient at every length of the window, in the legend's order.
        title: Above it; its counts are added.
    """
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[1.2, 1])
    below = grid[1].subgridspec(1, 2, width_ratios=[1.1, 1])
    axes = figure.add_subplot(grid[0])
    axes.set_title(_with_counts(title, graph), loc="left", fontsize=10)
    _draw_window(axes, graph)
    _draw_held(figure.add_subplot(below[0]), graph, held)
    _draw_measured(figure.add_subplot(below[1]), measurements)
    return figure


def _draw_window(axes: Axes, graph: Graph) -> None:
    """The dots and lines of a window's graph: time goes to the right, and each part has a lane."""
    steps = _evaluations(graph)
    heights = {part: y for part, y in _LANES.items() if part in graph.by_part()}
    points = _window_places(graph, steps)
    colours = [_colour(operation) for operation in graph.operations]
    edges = np.array(graph.edges)
    # φ reaches into every step: its lines would hide the others.
    faint = np.array([operation.kind == "AccumulateGrad" for operation in graph.operations])[edges[:, 0]]
    for chosen, alpha in ((faint, 0.25), (~faint, 0.5)):
        lines, line_colours = list(points[edges[chosen]]), [colours[source] for source in edges[chosen, 0]]
        axes.add_collection(LineCollection(lines, colors=line_colours, lw=0.4, alpha=alpha))
    axes.scatter(points[:, 0], points[:, 1], s=3.4, c=colours, lw=0, zorder=3)
    for part, (count, held) in graph.by_part().items():
        size = f"\n{_size(held)}" if held >= 2**10 else ""
        text = f"{part}\n{count:,} operations{size}"
        axes.text(-0.3, heights[part], text, ha="right", va="center", size=8, color=PART_COLOURS[part])
    axes.set_xlim(-3.2, steps + 0.1)
    axes.set_ylim(min(heights.values()) - 0.3, max(heights.values()) + 0.3)
    shown = range(0, steps, max(1, (steps - 1) // 10))
    axes.set_xticks([t + 0.5 for t in shown], [f"t = {t}" for t in shown], size=8)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _evaluations(graph: Graph) -> int:
    """T + 1."""
    return 1 + max((op.place.step or 0 for op in graph.operations if op.place is not None), default=0)


def _window_places(graph: Graph, steps: int) -> npt.NDArray[np.float64]:
    """[operations, 2]: in its step, further right the longer the way to it; what is level is stacked."""
    groups: dict[Place, list[int]] = defaultdict(list)
    for i, operation in enumerate(graph.operations):
        if operation.place is not None:
            groups[operation.place].append(i)
    places = np.zeros((len(graph.operations), 2))
    phi = 0
    for place, members in groups.items():
        places[members, 1] = _LANES[place.part]
        if place.name == "θ0":
            places[members] = 0, _LANES[UPDATE]
        elif place.part == LEAVES:
            # Every step reads φ: it stands in the middle of them.
            places[members, 0] = steps / 2 + 0.25 * phi
            phi += 1
        elif place.part == META_LOSS:
            places[members, 0] = np.linspace(steps - 0.5, steps, len(members))
        else:
            inside = {member: i for i, member in enumerate(members)}
            edges = [(inside[a], inside[b]) for a, b in graph.edges if a in inside and b in inside]
            way = longest_ways(len(members), edges, range(len(members)))
            for level in range(way.max() + 1):
                row = np.array(members)[way == level]
                places[row, 0] = (place.step or 0) + 0.08 + 0.84 * level / max(way.max(), 1)
                places[row, 1] += 0.11 * ((len(row) - 1) / 2 - np.arange(len(row)))
    return places


def _draw_held(axes: Axes, graph: Graph, held: Mapping[str, int]) -> None:
    """Areas on one scale: what the graph has saved, part by part, and the blocks that do without it."""
    steps = _evaluations(graph)
    parts = {part: number for part, (_, number) in graph.by_part().items() if number}
    blocks = [("the unrolled graph", graph.saved_bytes, [(PART_COLOURS[p], n) for p, n in parts.items()])]
    blocks += [(name, number, [(HELD_COLOURS[name], number)]) for name, number in held.items()]
    gap = 0.07 * (graph.saved_bytes + sum(held.values()))
    top = 0.0
    for name, number, stacked in blocks:
        middle = top - number / 2
        for colour, share in stacked:
            face = _tint(colour, 0.75)
            # The outline keeps in sight what is thinner than a pixel.
            axes.add_patch(Rectangle((0, top - share), steps, share, fc=face, ec=face, lw=0.8))
            top -= share
        axes.vlines(range(1, steps), middle - number / 2, middle + number / 2, color="white", lw=0.7)
        axes.text(steps + 0.6, middle, f"{name}, {_size(number)}", va="center", size=9)
        top -= gap
    axes.set_xlim(0, 1.75 * steps)
    axes.set_ylim(top + gap / 2, gap / 4)
    axes.set_axis_off()
    by_graph, without = _size(graph.saved_bytes), _size(sum(held.values()))
    axes.set_title(
        f"Held for the backward: {by_graph} by the graph, {without} without", loc="left", fontsize=10
    )


def _draw_measured(axes: Axes, measurements: Sequence[Measurement]) -> None:
    """A bar for every measured peak, and in it, darker, what was held; lengths of the window side by side."""
    modes = list(dict.fromkeys(m.mode for m in measurements))
    unrolls = sorted({m.unroll for m in measurements})
    colours = dict(zip(modes, (HIGHLIGHT, COLOURS[4], COLOURS[0]), strict=False))
    width = 0.8 / len(modes)
    for m in measurements:
        x = unrolls.index(m.unroll) + (modes.index(m.mode) - (len(modes) - 1) / 2) * width
        colour = colours[m.mode]
        held, peak = (m.held_bytes or 0) / MIB, (m.peak_bytes or 0) / MIB
        axes.bar(x, peak, 0.92 * width, color=_tint(colour, 0.4))
        axes.bar(x, held, 0.92 * width, color=colour)
        text = "not\nmeasured" if m.peak_bytes is None else f"{peak:,.3g}" if peak < 10 else f"{peak:,.0f}"
        top = (x, max(held, peak))
        axes.annotate(text, top, (0, 2), textcoords="offset points", ha="center", va="bottom", size=7.5)
    axes.legend(
        handles=[Patch(color=colours[mode], label=mode) for mode in modes],
        loc="upper left",
        fontsize=8,
        frameon=False,
    )
    axes.set_xticks(range(len(unrolls)), [f"T = {unroll}" for unroll in unrolls])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("MiB")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_title("A meta-step's peak memory; dark: held when its backward begins", loc="left", fontsize=10)


def _part_legend(figure: Figure, graph: Graph) -> None:
    patches = []
    for part, (count, held) in graph.by_part().items():
        colour, saved = PART_COLOURS[part], f", {_size(held)}" if held >= 2**10 else ""
        patches.append(Patch(fc=_tint(colour, 0.3), ec=colour, label=f"{part}: {count}{saved}"))
    dot = Line2D([], [], ls="", marker="o", ms=3.4, color=COLOURS[5], label="a view, nothing computed")
    width, height = figure.get_size_inches()
    figure.legend(
        handles=[*patches, dot],
        loc="upper left",
        bbox_to_anchor=(0.07 / width, 1 - 0.32 / height),
        borderaxespad=0,
        ncols=4,
        columnspacing=1.4,
        fontsize=7,
        frameon=False,
    )


def _with_counts(title: str, graph: Graph) -> str:
    counts = f"{len(graph.operations):,} operations, {len(graph.edges):,} edges"
    return f"{title}: {counts}, {_size(graph.saved_bytes)} saved"


def _colour(operation: Operation) -> str:
    return PART_COLOURS[operation.place.part] if operation.place is not None else COLOURS[5]


def _label(operation: Operation) -> str:
    """What stands in an operation's box; "" draws a dot."""
    if operation.kind in RESHAPING:
        return ""
    if operation.place is not None and operation.place.name:
        return f"{operation.place.name} [{', '.join(f'{n:,}' for n in operation.shapes[0])}]"
    return f"{operation.kind} · {_size(operation.saved_bytes)}" if _holds(operation) else operation.kind


def _holds(operation: Operation) -> bool:
    """Whether it has saved more than a constant."""
    return operation.saved_bytes >= 2**10


def _size(number: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", MIB), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number} B"


def _tint(colour: str, strength: float) -> tuple[float, float, float]:
    red, green, blue = (1 - strength * (1 - c) for c in to_rgb(colour))
    return red, green, blue


def _smooth(points: npt.NDArray[np.float64]) -> Path:
    """A curve through the points, [n, 2], that leaves the first and reaches the last vertically."""
    steps = np.diff(points, axis=0)
    tangents = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
    tangents[[0, -1], 0] = 0
    first, second = points[:-1] + tangents[:-1] / 3, points[1:] - tangents[1:] / 3
    curves = np.stack([first, second, points[1:]], axis=1).reshape(-1, 2)
    return Path(np.concatenate([points[:1], curves]), [Path.MOVETO] + [Path.CURVE4] * len(curves))
