"""The run's metrics.csv, to which a run that goes on from a checkpoint adds its rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from l2l_lightning.files import write_atomically


class _Writer(ExperimentWriter):
    """Lightning's writer, which would delete a file that is there already: this one adds to it."""

    def _check_log_dir_exists(self) -> None:
        pass

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._rewrite(fieldnames, self.rows())

    def rows(self) -> list[dict[str, str]]:
        """The rows so far; one that a kill cut short is left out."""
        lines = Path(self.metrics_file_path).read_text(encoding="utf-8").splitlines(keepends=True)
        return list(csv.DictReader(line for line in lines if line.endswith("\n")))

    def keep_before(self, step: int) -> None:
        if Path(self.metrics_file_path).exists():
            rows = [row for row in self.rows() if row.get("step", "").isdigit() and int(row["step"]) < step]
            self.metrics_keys = list(rows[0]) if rows else []
            self._rewrite(self.metrics_keys, rows)

    def _rewrite(self, fieldnames: list[str], rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(Path(self.metrics_file_path), text.getvalue())


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
        self._experiment = self._experiment or _Writer(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Writes nothing: config.yaml beside it has them."""

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Drops what was logged at this step and later: a run that goes on from there logs it again."""
        self.experiment.keep_before(step)
