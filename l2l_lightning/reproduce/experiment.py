"""What an experiment is: what it needs, and what it makes of that."""

from __future__ import annotations

import csv
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from l2l_lightning.comparison.plots import Curve
from l2l_lightning.comparison.statistics import Interval, final_losses, mean_and_half_width
from l2l_lightning.reproduce.bench import Bench, Request
from l2l_lightning.reproduce.training import Report


@dataclass(frozen=True)
class Finding:
    """One line of the report: a number of theirs, ours, and whether it reproduced."""

    what: str
    study: str
    """What Bradford, Giancola and Petri report; "–" if nothing."""
    paper: str
    """What Andrychowicz et al. report; "–" if nothing."""
    ours: str
    verdict: str
    """A sentence; starts with "Reproduced", "Not reproduced", "Better", "New" or "Not measured"."""


@dataclass
class Outcome:
    """What an experiment leaves in its folder."""

    findings: list[Finding]
    results: dict[str, Any]
    """For results.json, next to the provenance."""
    columns: tuple[str, ...]
    """Of results.csv, which is in long form."""
    rows: Iterable[Sequence[Any]]
    pictures: dict[str, bytes] = field(default_factory=dict)
    """PNG files by name, without the ending."""
    notes: list[str] = field(default_factory=list)
    """Paragraphs for the report: what did not reproduce, and why as far as it was tested."""
    tables: list[str] = field(default_factory=list)
    """Markdown for the report, under the findings."""


class Experiment(ABC):
    """One of the names that `reproduce` takes."""

    name: ClassVar[str]
    title: ClassVar[str]
    """One line: which figures of whom."""
    datasets: ClassVar[set[str | None]] = {"mnist"}
    seconds: ClassVar[float] = 5.0
    """What `outcome` takes, for the time left."""

    def data(self, bench: Bench) -> set[str | None]:
        """The data sets that it runs on, None for synthetic tasks."""
        return self.datasets

    @abstractmethod
    def requests(self, bench: Bench) -> list[Request]:
        """What it needs, in the order in which it is to be computed."""

    @abstractmethod
    def outcome(self, bench: Bench, folder: Path, report: Report) -> Outcome:
        """What it makes of that; files of its own kind go to the folder."""


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file; nine digits tell every float32 from its neighbours."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{value:.9g}" if isinstance(value, float) else value for value in row] for row in rows)
    return buffer.getvalue()


def diverged(losses: Tensor) -> int:
    """How many of the K optimizees met a loss that is not finite, or end higher than they began."""
    finite = losses.isfinite().all(dim=0)
    return int((~finite | (final_losses(losses) > losses[0])).sum())


def final(losses: Tensor) -> Interval:
    """The final loss over optimizees, with its 95% interval."""
    return Interval.of(final_losses(losses).double())


def paired(losses: Tensor, others: Tensor) -> Interval:
    """The difference of two optimizers' final losses, optimizee by optimizee."""
    return Interval.of((final_losses(losses) - final_losses(others)).double())


def ratio(losses: Tensor, others: Tensor) -> Interval:
    r"""The ratio R of two optimizers' mean final losses on the same optimizees, with its 95% interval.

    The half width is t·s/(√K·b̄), s the deviation of a_k - R·b_k over the optimizees (the delta method, which
    keeps what the pairing gives). Infinite where the first is not finite.
    """
    a, b = final_losses(losses).double(), final_losses(others).double()
    quotient = float(a.mean() / b.mean())
    if not math.isfinite(quotient):
        return Interval(math.inf, math.nan, math.nan)
    _, half = mean_and_half_width((a - quotient * b) / b.mean())
    return Interval(quotient, quotient - float(half), quotient + float(half))


def lead(losses: Tensor, others: Tensor) -> str:
    """How the first compares with the second in the final loss: what the intervals allow to say."""
    a, b = final(losses), final(others)
    difference = paired(losses, others)
    if a.high < b.low:
        return "ahead, disjoint intervals"
    if difference.high < 0:
        return "ahead, paired"
    if a.low > b.high:
        return "behind, disjoint intervals"
    return "behind, paired" if difference.low > 0 else "level"


def curve(label: str, losses: Tensor, *, highlight: bool = False) -> Curve:
    """A curve with its 95% band, labelled with its final loss and how many diverged."""
    mean, half = mean_and_half_width(losses.double())
    text = f"{label}  {final(losses)}"
    if count := diverged(losses):
        text += f"  ({count}/{losses.shape[1]} diverged)"
    return Curve(
        label=text,
        mean=mean.numpy(),
        low=(mean - half).numpy(),
        high=(mean + half).numpy(),
        final=final(losses).mean,
        highlight=highlight,
    )


def loss_rows(prefix: Sequence[Any], losses: Tensor) -> Iterable[Sequence[Any]]:
    """Rows (*prefix, seed, step, loss) of every optimizee's every step."""
    for seed, column in enumerate(losses.T.tolist()):
        for step, loss in enumerate(column):
            yield [*prefix, seed, step, loss]


def summary(losses: Tensor) -> dict[str, Any]:
    """An optimizer's numbers for results.json."""
    return {
        "final_loss": final(losses).as_json(),
        "sum_loss": Interval.of(losses.double().sum(0)).as_json(),
        "diverged": diverged(losses),
        "num_optimizees": losses.shape[1],
    }
