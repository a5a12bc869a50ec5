"""The picture of a comparison: losses in, a figure of means and their intervals out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from l2l_lightning.comparison.statistics import (
    FINAL_STEPS,
    diverged,
    final_loss,
    log_interval,
    mean_and_half_width,
)
from l2l_lightning.errors import ResultsError

if TYPE_CHECKING:  # matplotlib takes long to load
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
"""The kinds of files that a figure can be written to, by the ending of their names."""

LOSS_LABELS = {
    "log": "loss: mean m, 95% interval m·exp(± t·s/(m√K))",
    "linear": "loss: mean m, 95% interval m ± t·s/√K",
}
"""The text beside the loss axis, by its scale: s is the deviation over K optimizees, t Student's quantile."""


def losses_figure(
    losses: Mapping[str, Tensor],
    title: str,
    highlight: Collection[str] = (),
    scale: Literal["log", "linear"] | None = None,
) -> Figure:
    """Returns a figure of optimizers' mean losses by step, each with its 95% interval.

    The means are those of the tables. On a log axis an interval is Student's interval of the mean's logarithm
    (`statistics.log_interval`), which never reaches zero; on a linear one it is Student's of the mean. The
    axis says which. A legend entry is "name  final loss", and "(k/K diverged)" where k of the K optimizees
    did.

    Args:
        losses: f_t(θ_t), [T, K], by the optimizer's name, which decides the colour.
        title: What is shown, above a line that says over how many optimizees.
        highlight: The names of the optimizers that the figure is about.
        scale: Of the loss axis; None is "log" if every mean is positive.

    Raises:
        ResultsError: The scale is "log", and a mean is not positive.

    Example:
        >>> import torch
        >>> losses_figure({"adam": torch.rand(20, 5) + 1}, "Quadratic").axes[0].get_yscale()
        'log'
    """
    from l2l_lightning.comparison.plots import Curve, curves_figure

    means = {name: value.double().mean(dim=1).numpy() for name, value in losses.items()}
    low = [name for name, mean in means.items() if (mean <= 0).any()]
    if scale == "log" and low:
        names = ", ".join(low)
        raise ResultsError(f"a log axis needs positive means, which {names} has not: use --scale linear")
    scale = scale or ("linear" if low else "log")
    curves = []
    for name, value in losses.items():
        value = value.double()
        mean, half = mean_and_half_width(value)
        low_edge, high_edge = log_interval(value) if scale == "log" else (mean - half, mean + half)
        final, count = final_loss(value), diverged(value)
        label = f"{name}  {final}" + (f"  ({count}/{value.shape[1]} diverged)" if count else "")
        band = (low_edge.numpy(), high_edge.numpy())
        curves.append(Curve(label, means[name], *band, final.mean, name in highlight, name))
    numbers = " or ".join(str(number) for number in dict.fromkeys(v.shape[1] for v in losses.values()))
    steps = min(FINAL_STEPS, max(len(value) for value in losses.values()))
    title = f"{title}\nmean of {numbers} optimizees, with its 95% interval"
    return curves_figure(curves, title, f"final loss (mean of last {steps})", scale, LOSS_LABELS[scale])


def curves_picture(losses: Mapping[str, Tensor], title: str, highlight: Collection[str] = ()) -> bytes:
    """Returns `losses_figure` as a PNG file."""
    from l2l_lightning.comparison.plots import png

    return png(losses_figure(losses, title, highlight))
