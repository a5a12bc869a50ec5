"""What a comparison found: every loss, and what can be said, shown and kept of it."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from l2l_lightning.comparison.baselines import Setting, setting_text
from l2l_lightning.comparison.curves_file import COLUMNS, loss_rows
from l2l_lightning.comparison.figures import curves_picture, losses_figure
from l2l_lightning.comparison.settings import plain
from l2l_lightning.comparison.statistics import (
    Interval,
    Lead,
    diverged,
    final_loss,
    final_losses,
    lead,
    paired_difference,
    sum_loss,
    sum_losses,
    summary,
)
from l2l_lightning.errors import ResultsError
from l2l_lightning.extras import needed_by
from l2l_lightning.provenance import commit, instruction_set, versions
from l2l_lightning.tables import Column, FittingTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNED = "learned"
"""The learned optimizer's name: what the others are compared with."""

Measure = Literal["final_loss", "sum_loss"]
MEASURES: dict[Measure, Callable[[Tensor], Tensor]] = {"final_loss": final_losses, "sum_loss": sum_losses}
"""What optimizers are compared by: losses [T, K] to a value of each optimizee, [K]."""

DIFFERENCES: dict[str, Measure] = {"difference": "final_loss", "sum_difference": "sum_loss"}
"""The columns of paired differences in `Comparison.rows`, and of which measures they are."""


@dataclass(frozen=True)
class Result:
    """The losses of one optimizer on the K optimizees, and what it ran with."""

    losses: Tensor
    """f_t(θ_t), [horizon, K] float64 on the CPU."""
    seconds: float
    """Wall-clock of the whole rollout, all K optimizees side by side, losses and gradients included."""
    learning_rate: float | None
    setting: Setting = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Optimizers on the same optimizees, in the order in which they ran, and where the numbers come from.

    A notebook shows it as its table and figure.
    """

    task: str
    horizon: int
    num_optimizees: int
    data_source: str
    seed: int
    device: str
    dtype: str
    results: dict[str, Result]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the learned optimizers came from, as plain values."""
    learned: tuple[str, ...] = (LEARNED,)
    """The names of the learned optimizers: of several runs' those of all, and the first is what all others
    are compared with."""
    paired: bool = True
    """Whether all ran on the same optimizees; without that there are no paired differences."""

    @property
    def reference(self) -> str:
        """The name of what all others are compared with."""
        return self.learned[0]

    @property
    def compared(self) -> list[str]:
        """The names of all that have a paired difference to the reference."""
        known = self.paired and self.reference in self.results
        return [name for name in self.results if known and name != self.reference]

    @property
    def losses(self) -> dict[str, Tensor]:
        """Every optimizer's losses f_t(θ_t), [horizon, K] float64, by name."""
        return {name: result.losses for name, result in self.results.items()}

    @property
    def ranking(self) -> list[str]:
        """The optimizers' names by mean final loss, the best first; those without one last."""
        means = {name: final_loss(result.losses).mean for name, result in self.results.items()}
        return sorted(means, key=lambda name: means[name] if math.isfinite(means[name]) else math.inf)

    def difference(self, name: str, measure: Measure = "final_loss") -> Interval:
        """Returns the paired difference learned − other of a measure; negative where learned is ahead.

        Of several runs the first one's is taken, the reference.
        """
        return paired_difference(*self._pair(name, measure))

    def lead(self, name: str, measure: Measure = "final_loss") -> Lead:
        """Says how clearly the learned optimizer is ahead of another one, as `statistics.lead`."""
        return lead(*self._pair(name, measure))

    def _pair(self, name: str, measure: Measure) -> tuple[Tensor, Tensor]:
        if not self.paired:
            raise ValueError("these optimizers did not run on the same optimizees: nothing is paired")
        reference, other = (MEASURES[measure](self.results[n].losses) for n in (self.reference, name))
        return reference, other

    def summary(self) -> dict[str, Any]:
        """Returns what summary.json holds."""
        return {
            "task": self.task,
            "horizon": self.horizon,
            "num_optimizees": self.num_optimizees,
            "data_source": self.data_source,
            "commit": commit(),
            "seed": self.seed,
            "device": self.device,
            "instruction_set": instruction_set(),
            "dtype": self.dtype,
            "versions": versions(),
            "settings": plain(self.settings),
            "reference": self.reference,
            "paired": self.paired,
            "optimizers": {
                name: {
                    **summary(result.losses),
                    "learning_rate": result.learning_rate,
                    "setting": result.setting,
                    "seconds": result.seconds,
                    **(self._against(name) if name in self.compared else {}),
                }
                for name, result in self.results.items()
            },
        }

    def _against(self, name: str) -> dict[str, Any]:
        return {
            "reference_minus_it": {measure: self.difference(name, measure).as_json() for measure in MEASURES},
            "lead": {measure: self.lead(name, measure) for measure in MEASURES},
        }

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row of numbers of every optimizer, by final loss.

        An interval x is three columns: x, x_low and x_high. "difference" is the paired difference
        reference − other of the final losses, "sum_difference" that of the sums; "lead" and "sum_lead" say
        how clearly the reference is ahead. The reference has None there.

        Example:
            >>> comparison.rows()[0]["optimizer"]  # doctest: +SKIP
            'learned'
        """
        rows = []
        for name in self.ranking:
            result, against = self.results[name], name in self.compared
            row: dict[str, Any] = {"optimizer": name}
            intervals: dict[str, tuple[float | None, ...]] = {
                "final_loss": final_loss(result.losses),
                "sum_loss": sum_loss(result.losses),
            }
            for key, measure in DIFFERENCES.items():
                intervals[key] = self.difference(name, measure) if against else (None, None, None)
            for key, interval in intervals.items():
                row |= dict(zip((key, f"{key}_low", f"{key}_high"), interval, strict=True))
            row["lead"] = self.lead(name) if against else None
            row["sum_lead"] = self.lead(name, "sum_loss") if against else None
            row["diverged"] = diverged(result.losses)
            row["learning_rate"] = result.learning_rate
            row["setting"] = setting_text(result.setting)
            row["seconds"] = result.seconds
            rows.append(row)
        return rows

    def table(self) -> FittingTable:
        """Returns a table of one row per optimizer, by final loss, which fits the terminal it is printed on.

        "learned − it" is the paired difference of the final losses; "lead" says how clearly the learned
        optimizer is ahead (see `statistics.lead`) in the final loss, then in the sum. "setting" says which
        other hyperparameters are not the default; without any there is no such column. Where the table is too
        wide it leaves out a count of diverged optimizees that is always 0, then seconds, then settings.
        """
        several = len(self.learned) > 1
        shown = [self.results[name] for name in self.ranking]
        columns = [
            (Column("optimizer"), self.ranking),
            (Column("final loss", True), [str(final_loss(result.losses)) for result in shown]),
            (Column("sum of losses", True), [str(sum_loss(result.losses)) for result in shown]),
        ]
        counts = [diverged(result.losses) for result in shown]
        columns.append((Column("diverged", True, 0 if any(counts) else 1), [str(count) for count in counts]))
        rates = ["" if result.learning_rate is None else f"{result.learning_rate:g}" for result in shown]
        columns.append((Column("learning rate", True), rates))
        if any(result.setting for result in shown):
            texts = [setting_text(result.setting) for result in shown]
            columns.append((Column("setting", spare=3), texts))
        columns.append((Column("seconds", True, 2), [f"{result.seconds:.2f}" for result in shown]))
        if self.compared:
            names = ["" if name not in self.compared else name for name in self.ranking]
            head = "first run − it" if several else f"{self.reference} − it"
            columns.append(
                (Column(head, True), [str(self.difference(name)) if name else "" for name in names])
            )
            leads = [" / ".join(self.lead(name, of) for of in MEASURES) if name else "" for name in names]
            columns.append((Column("lead"), leads))
        bold = [place for place, name in enumerate(self.ranking) if name in self.learned]
        cells = zip(*(texts for _, texts in columns), strict=True)
        return FittingTable(self.title, [column for column, _ in columns], list(cells), bold)

    @property
    def title(self) -> str:
        """The task, the horizon and the number of optimizees, in words."""
        words = f"{self.task}, {self.horizon} steps, {self.num_optimizees} optimizees"
        return words if self.paired else f"{words}: unpaired"

    def figure(
        self,
        optimizers: Sequence[str] | None = None,
        title: str | None = None,
        scale: Literal["log", "linear"] | None = None,
    ) -> Figure:
        """Returns the mean losses by step with their 95% intervals (see `figures.losses_figure`).

        Args:
            optimizers: The names of those to show; None is all.
            title: The text above the axes; None is the task.
            scale: Of the loss axis; None is "log" if every mean is positive.

        Raises:
            ResultsError: An optimizer is not in the comparison, or the scale is "log" and a mean is not
                positive.
        """
        losses = chosen(self.losses, optimizers)
        return losses_figure(losses, self.task if title is None else title, self.learned, scale)

    def to_pandas(self, what: Literal["table", "losses"] = "table") -> Any:
        """Returns a pandas DataFrame: of `rows`, one per optimizer, or of every loss, as curves.csv has them.

        Raises:
            MissingPackageError: pandas is not installed.
            ValueError: `what` is neither.
        """
        with needed_by("to_pandas()"):
            import pandas
        if what == "table":
            return pandas.DataFrame(self.rows()).set_index("optimizer")
        if what != "losses":
            raise ValueError(f'what must be "table" or "losses", got {what!r}')
        rows = [row for name, losses in self.losses.items() for row in loss_rows([self.task, name], losses)]
        return pandas.DataFrame(rows, columns=COLUMNS)

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        """Shows the table and the figure in a notebook."""
        picture = base64.b64encode(curves_picture(self.losses, self.task, self.learned)).decode()
        image = f'<img style="max-width: 100%" width="780" src="data:image/png;base64,{picture}">'
        return f"{self.table()._repr_html_()}{image}"


def chosen(losses: Mapping[str, Tensor], optimizers: Sequence[str] | None) -> dict[str, Tensor]:
    """Returns the losses of the optimizers named, in that order; None is all.

    Raises:
        ResultsError: One is not among them.
    """
    if unknown := [name for name in optimizers or () if name not in losses]:
        raise ResultsError(f"there is no optimizer {', '.join(unknown)}: choose from {', '.join(losses)}")
    return {name: losses[name] for name in (losses if optimizers is None else optimizers)}
