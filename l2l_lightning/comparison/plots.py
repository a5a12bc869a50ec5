"""Figures: arrays in, a matplotlib Figure out. Nothing here knows what is plotted, or how it came about."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, which readers with any colour vision can tell apart.
HIGHLIGHT = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Beyond six curves the colours repeat, in the next style.
STYLES = ("-", "--", ":")


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve of T values with its band; it has gaps, or ends, where it is not finite.

    Args:
        label: The text of its legend entry.
        mean: The line, [T].
        low: The band's lower edge, [T].
        high: The band's upper edge, [T].
        final: The value that the legend is sorted by, the least first.
        highlight: Whether the figure is about this curve: it is on top, bold, in a colour of its own.
    """

    label: str
    mean: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    final: float
    highlight: bool = False


def curves_figure(curves: Sequence[Curve], title: str, legend_title: str) -> Figure:
    """Draws losses against steps, one curve per optimizer, on a log axis if every mean is positive.

    Args:
        curves: The curves, in an order that stays the same from figure to figure: it decides the colours.
        title: The text above the axes.
        legend_title: The text above the legend, which lies beside the axes and is sorted by `Curve.final`.

    Example:
        >>> mean = np.geomspace(1, 0.1, 50)
        >>> adam = Curve("adam", mean, 0.9 * mean, 1.1 * mean, final=0.1)
        >>> figure = curves_figure([adam], "Quadratic", "final loss")
        >>> len(figure.axes[0].lines)
        1
    """
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    lines = {}
    plain = 0
    for curve in curves:
        if curve.highlight:
            colour, style, width, order = HIGHLIGHT, "-", 2.6, 4.0
        else:
            colour, style = COLOURS[plain % len(COLOURS)], STYLES[plain // len(COLOURS) % len(STYLES)]
            width, order = 1.5, 3.0
            plain += 1
        steps = np.arange(len(curve.mean))
        # All bands lie below all lines.
        axes.fill_between(steps, curve.low, curve.high, color=colour, alpha=0.16, lw=0, zorder=order - 2)
        mean = np.where(np.isfinite(curve.mean), curve.mean, math.nan)
        (lines[curve],) = axes.plot(steps, mean, color=colour, linestyle=style, lw=width, zorder=order)

    _scale(axes, np.concatenate([curve.mean for curve in curves]))
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.margins(x=0.01)
    axes.grid(which="major", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", color="#888888")

    ranked = sorted(curves, key=lambda curve: curve.final if math.isfinite(curve.final) else math.inf)
    legend = axes.legend(
        [lines[curve] for curve in ranked],
        [curve.label for curve in ranked],
        title=legend_title,
        # Beside the axes: inside, it would lie on a curve sooner or later.
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        alignment="left",
        labelspacing=0.8,
        fontsize=9,
        title_fontsize=9,
        frameon=False,
    )
    for text, curve in zip(legend.get_texts(), ranked, strict=True):
        text.set_fontweight("bold" if curve.highlight else "normal")
    return figure


def _scale(axes: Axes, means: npt.NDArray[np.float64]) -> None:
    """Makes a log axis around the means if the finite ones are positive; cuts off bands that reach zero."""
    means = means[np.isfinite(means)]
    if not means.size or means.min() <= 0:
        return
    low, high = np.log10(means.min()), np.log10(means.max())
    margin = max(0.06 * (high - low), 0.01)
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(10 ** (low - margin), 10 ** (high + margin))
    if high - low < 2.5:
        # Powers of ten alone would leave one or two labels.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def heatmap_figure(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    label: str,
    middle: float | None = None,
) -> Figure:
    """Draws a table of positive numbers, coloured on a log scale; what is not finite is grey and reads ∞.

    Args:
        values: The numbers, [rows][columns].
        rows: The rows' names, from the top.
        columns: The columns' names.
        title: The text above the axes.
        label: The text beside the colour bar.
        middle: The value of the neutral colour: below it green, above it red, alike at the same ratio. None
            colours from the least to the greatest.

    Example:
        >>> figure = heatmap_figure([[0.5, 2.0]], ["a cell"], ["one rule", "another"], "Ratios", "ratio", 1.0)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['0.50', '2.00']
    """
    table = np.asarray(values, dtype=float)
    finite = table[np.isfinite(table)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (1.0, 1.0)
    colours = "viridis_r"
    if middle is not None:
        spread = min(max(high / middle, middle / low, 1.01), 4.0)
        low, high, colours = middle / spread, middle * spread, "RdYlGn_r"
    figure = Figure(figsize=(2.6 + 1.15 * len(columns), 1.6 + 0.27 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shown = np.ma.masked_invalid(table)
    norm = LogNorm(low, max(high, low * 1.0001))
    image = axes.imshow(shown, norm=norm, cmap=colormaps[colours].with_extremes(bad="#bbbbbb"), aspect="auto")
    for row, column in np.ndindex(table.shape):
        value = table[row, column]
        text = "∞" if not math.isfinite(value) else f"{value:.2f}" if value < 100 else f"{value:.0f}"
        # Dark colours lie at the scale's ends.
        position = 0.5 if not math.isfinite(value) else float(norm(value))
        dark = not 0.12 < position < 0.88 if middle is not None else position > 0.6
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, label=label, shrink=min(1.0, 6 / max(len(rows), 6)))
    return figure


def png(figure: Figure, dpi: int = 160) -> bytes:
    """Returns the figure as a PNG file's bytes; needs no display.

    Example:
        >>> png(Figure(), dpi=20)[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
