"""The run's metrics.csv, to which a run that goes on from a checkpoint adds its rows."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class _Writer(ExperimentWriter):
    """Lightning's writer, which would delete a file that is there already: this one adds to it."""

    def _check_log_dir_exists(self) -> None:
        pass

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.replace(fieldnames, self.read())

    def read(self) -> list[dict[str, str]]:
        """The rows so far; one that a kill cut short is left out."""
        lines = Path(self.metrics_file_path).read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        return list(csv.DictReader(lines))

    def replace(self, fieldnames: list[str], rows: list[dict[str, str]]) -> None:
        """Writes the file anew; until that is done the old one stays."""
        new = Path(f"{self.metrics_file_path}.new")
        with new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)
        new.replace(self.metrics_file_path)


class MetricsLog(CSVLogger):
    """metrics.csv in a run's folder, one row a step and group of metrics.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Drops what was logged at this step and later: a run that goes on from there logs it again."""
        writer = self.experiment
        if not os.path.exists(writer.metrics_file_path):
            return
        rows = [row for row in writer.read() if row.get("step", "").isdigit() and int(row["step"]) < step]
        writer.metrics_keys = list(rows[0]) if rows else []
        writer.replace(writer.metrics_keys, rows)
