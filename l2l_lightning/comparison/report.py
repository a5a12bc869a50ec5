"""What a comparison is reported as: a CSV file in long form, a picture of the curves, a table, a summary."""

from __future__ import annotations

from pathlib import Path

from l2l_lightning.comparison.curves_file import csv_text as csv_text
from l2l_lightning.comparison.curves_file import curves_text
from l2l_lightning.comparison.curves_file import loss_rows as loss_rows
from l2l_lightning.comparison.figures import curves_picture as curves_picture
from l2l_lightning.comparison.result import Comparison
from l2l_lightning.files import write_atomically, write_json
from l2l_lightning.tables import FittingTable


def comparison_table(comparison: Comparison) -> FittingTable:
    """Returns `comparison.table()`."""
    return comparison.table()


def write_comparison(comparison: Comparison, folder: Path | str) -> None:
    """Writes curves.csv, curves.png and summary.json into a folder, each atomically.

    curves.csv has the columns task, optimizer, seed, step, loss; seed is the optimizee's index, and a loss
    that is not finite reads nan or inf. In summary.json such numbers are null.

    Raises:
        OSError: The folder cannot be written.
    """
    folder, losses = Path(folder), comparison.losses
    write_atomically(folder / "curves.csv", curves_text(comparison.task, losses))
    write_atomically(folder / "curves.png", curves_picture(losses, comparison.task, comparison.learned))
    write_json(folder / "summary.json", comparison.summary())
