"""Figures: arrays in, a matplotlib Figure out. Nothing here knows what is plotted, or how it came about."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from l2l_lightning.comparison.colours import line_styles

Scale = Literal["log", "linear"]


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve of T values with its band; it has gaps, or ends, where it is not finite.

    Args:
        label: The text of its legend entry.
        mean: The line, [T].
        low: The band's lower edge, [T].
        high: The band's upper edge, [T].
        final: The value that the legend is sorted by, the least first.
        highlight: Whether the figure is about this curve: it is on top and bold.
        name: The optimizer's, which decides the colour; None is the label.
    """

    label: str
    mean: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    final: float
    highlight: bool = False
    name: str | None = None


def curves_figure(
    curves: Sequence[Curve],
    title: str,
    legend_title: str,
    scale: Scale | None = None,
    loss_label: str = "loss",
) -> Figure:
    """Draws losses against steps, one curve per optimizer.

    Args:
        curves: The curves; their names decide the colours (see `colours.line_styles`).
        title: The text above the axes.
        legend_title: The text above the legend, which lies beside the axes and is sorted by `Curve.final`.
        scale: The loss axis's; None is `scale_of` the means.
        loss_label: The text beside the loss axis.

    Example:
        >>> mean = np.geomspace(1, 0.1, 50)
        >>> adam = Curve("adam", mean, 0.9 * mean, 1.1 * mean, final=0.1)
        >>> figure = curves_figure([adam], "Quadratic", "final loss")
        >>> len(figure.axes[0].lines)
        1
    """
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    styles = line_styles(curve.name or curve.label for curve in curves)
    lines = {}
    for curve in curves:
        colour, dashes = styles[curve.name or curve.label]
        width, order = (2.6, 4.0) if curve.highlight else (1.5, 3.0)
        steps = np.arange(len(curve.mean))
        # All bands lie below all lines.
        axes.fill_between(steps, curve.low, curve.high, color=colour, alpha=0.16, lw=0, zorder=order - 2)
        mean = np.where(np.isfinite(curve.mean), curve.mean, math.nan)
        (lines[curve],) = axes.plot(steps, mean, color=colour, linestyle=dashes, lw=width, zorder=order)

    means = np.concatenate([curve.mean for curve in curves])
    if (scale or scale_of(means)) == "log":
        _make_log_axis(axes, means)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel(loss_label)
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


def scale_of(means: npt.NDArray[np.float64]) -> Scale:
    """Returns "log" if the finite means are positive, which the logarithm needs, else "linear".

    Example:
        >>> scale_of(np.array([2.0, 0.1, math.nan])), scale_of(np.array([1.0, 0.0]))
        ('log', 'linear')
    """
    finite = means[np.isfinite(means)]
    return "log" if finite.size and finite.min() > 0 else "linear"


def _make_log_axis(axes: Axes, means: npt.NDArray[np.float64]) -> None:
    """Makes a log axis around the means, with enough labels; wider bands are cut off at its limits."""
    means = means[np.isfinite(means) & (means > 0)]
    low, high = (np.log10(means.min()), np.log10(means.max())) if means.size else (0.0, 1.0)
    margin = max(0.06 * (high - low), 0.01)
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(10 ** (low - margin), 10 ** (high + margin))
    if high - low < 2.5:
        # Powers of ten alone would leave one or two labels; below half a decade 1, 2 and 5 would, too.
        narrow = high - low < 0.6
        axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if narrow:
            axes.yaxis.set_minor_locator(NullLocator())


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
        middle: The value of the neutral colour: below it purple, above it orange, alike at the same ratio.
            None colours from the least to the greatest. Readers with any colour vision can tell them apart.

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
        low, high, colours = middle / spread, middle * spread, "PuOr_r"
    figure = Figure(figsize=(2.6 + 1.15 * len(columns), 1.6 + 0.27 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shown = np.ma.masked_invalid(table)
    norm = LogNorm(low, max(high, low * 1.0001))
    image = axes.imshow(shown, norm=norm, cmap=colormaps[colours].with_extremes(bad="#bbbbbb"), aspect="auto")
    for row, column in np.ndindex(table.shape):
        colour = text_colour(image.to_rgba(shown[row : row + 1, column : column + 1])[0, 0])
        text = _short(float(table[row, column]))
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
    bar = figure.colorbar(image, label=label, shrink=min(1.0, 6 / max(len(rows), 6)))
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def text_colour(background: Sequence[float]) -> str:
    """Returns "black" or "white", whichever has the greater contrast to a colour, by WCAG 2's luminance.

    Example:
        >>> text_colour((1.0, 1.0, 0.8)), text_colour((0.2, 0.0, 0.3))
        ('black', 'white')
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def _short(value: float) -> str:
    """A cell's number: two decimals below 100, none below 10,000, a power of ten above; "∞" is not finite.

    Example:
        >>> [_short(value) for value in (0.281, 4153.2, 1034648867.0, math.inf)]
        ['0.28', '4153', '1.0e9', '∞']
    """
    if not math.isfinite(value):
        return "∞"
    if value < 10_000:
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def image_bytes(figure: Figure, suffix: str = "png", dpi: int = 160) -> bytes:
    """Returns the figure as a file's bytes, which depend on the figure alone; needs no display.

    Args:
        figure: What to write.
        suffix: png, pdf or svg; in a PDF file letters are letters (TrueType), as journals ask for.
        dpi: Pixels per inch of a PNG file.

    Example:
        >>> image_bytes(Figure(), "svg") == image_bytes(Figure(), "svg")
        True
    """
    no_time: dict[str, dict[str, Any]] = {
        "png": {},
        "pdf": {"CreationDate": None, "ModDate": None},
        "svg": {"Date": None},
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "l2l-lightning", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=suffix, dpi=dpi, metadata=no_time[suffix])
    return buffer.getvalue()


def png(figure: Figure, dpi: int = 160) -> bytes:
    """Returns the figure as a PNG file's bytes; needs no display.

    Example:
        >>> png(Figure(), dpi=20)[1:4]
        b'PNG'
    """
    return image_bytes(figure, "png", dpi)
