"""What a comparison is reported as: a CSV file in long form, a picture of the curves, a table, a summary."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from l2l_lightning.comparison.baselines import setting_text
from l2l_lightning.comparison.compare import LEARNED, Comparison
from l2l_lightning.comparison.statistics import (
    FINAL_STEPS,
    diverged,
    final_loss,
    mean_and_half_width,
    sum_loss,
)
from l2l_lightning.files import write_atomically, write_json


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    r"""Returns a CSV file's text; nine digits tell every float32 from its neighbours.

    Example:
        >>> csv_text(("step", "loss"), [(0, 0.5), (1, float("nan"))])
        'step,loss\n0,0.5\n1,nan\n'
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{value:.9g}" if isinstance(value, float) else value for value in row] for row in rows)
    return buffer.getvalue()


def loss_rows(prefix: Sequence[Any], losses: Tensor) -> Iterator[list[Any]]:
    """Yields a row [*prefix, index of the optimizee, step, loss] for every entry of losses [T, K].

    Example:
        >>> import torch
        >>> list(loss_rows(["adam"], torch.tensor([[4.0, 3.0], [2.0, 1.0]])))
        [['adam', 0, 0, 4.0], ['adam', 0, 1, 2.0], ['adam', 1, 0, 3.0], ['adam', 1, 1, 1.0]]
    """
    for index, column in enumerate(losses.T.tolist()):
        for step, loss in enumerate(column):
            yield [*prefix, index, step, loss]


def curves_picture(losses: Mapping[str, Tensor], title: str, highlight: Collection[str] = ()) -> bytes:
    """Returns a PNG file of optimizers' mean losses by step, each with its 95% band.

    A label is "name  final loss", and "(k/K diverged)" after it where k of the K optimizees did.

    Args:
        losses: f_t(θ_t), [T, K], by the optimizer's name, in an order that stays the same from picture to
            picture, as it decides the colours.
        title: What is shown, above a line that says over how many optimizees.
        highlight: The names of the optimizers that the picture is about.
    """
    from l2l_lightning.comparison.plots import (
        Curve,
        curves_figure,
        png,
    )  # here: matplotlib takes long to load

    curves = []
    for name, value in losses.items():
        mean, half = mean_and_half_width(value.double())
        final, count = final_loss(value), diverged(value)
        label = f"{name}  {final}" + (f"  ({count}/{value.shape[1]} diverged)" if count else "")
        low, high = (mean - half).numpy(), (mean + half).numpy()
        curves.append(Curve(label, mean.numpy(), low, high, final.mean, name in highlight))
    steps, number = value.shape
    title = f"{title}\nmean of {number} optimizees, with its 95% interval"
    return png(curves_figure(curves, title, f"final loss (mean of last {min(FINAL_STEPS, steps)})"))


def comparison_table(comparison: Comparison) -> Table:
    """Returns a table of one row per optimizer, by final loss.

    "learned − it" is the paired difference of the final losses; "lead" says how clearly the learned optimizer
    is ahead (see `statistics.lead`) in the final loss, then in the sum. "setting" says which other
    hyperparameters are not the default; without any there is no such column.
    """
    with_learned = LEARNED in comparison.results
    with_settings = any(result.setting for result in comparison.results.values())
    title = f"{comparison.task}, {comparison.horizon} steps, {comparison.num_optimizees} optimizees"
    table = Table(title=escape(title))
    table.add_column("optimizer")
    for column in ("final loss", "sum of losses", "diverged", "learning rate"):
        table.add_column(column, justify="right")
    if with_settings:
        table.add_column("setting")
    table.add_column("seconds", justify="right")
    if with_learned:
        table.add_column("learned − it", justify="right")
        table.add_column("lead")
    for name in comparison.ranking:
        result = comparison.results[name]
        row = [
            escape(name),
            str(final_loss(result.losses)),
            str(sum_loss(result.losses)),
            str(diverged(result.losses)),
            "" if result.learning_rate is None else f"{result.learning_rate:g}",
            *([setting_text(result.setting)] if with_settings else []),
            f"{result.seconds:.2f}",
        ]
        if with_learned and name != LEARNED:
            leads = (comparison.lead(name, measure) for measure in ("final_loss", "sum_loss"))
            row += [str(comparison.difference(name)), " / ".join(leads)]
        table.add_row(*row, style="bold" if name == LEARNED else None)
    return table


def write_comparison(comparison: Comparison, folder: Path | str) -> None:
    """Writes curves.csv, curves.png and summary.json into a folder, each atomically.

    curves.csv has the columns task, optimizer, seed, step, loss; seed is the optimizee's index, and a loss
    that is not finite reads nan or inf. In summary.json such numbers are null.

    Raises:
        OSError: The folder cannot be written.
    """
    folder, losses = Path(folder), {name: result.losses for name, result in comparison.results.items()}
    rows = (row for name, value in losses.items() for row in loss_rows([comparison.task, name], value))
    write_atomically(folder / "curves.csv", csv_text(("task", "optimizer", "seed", "step", "loss"), rows))
    write_atomically(folder / "curves.png", curves_picture(losses, comparison.task, [LEARNED]))
    write_json(folder / "summary.json", comparison.summary())
