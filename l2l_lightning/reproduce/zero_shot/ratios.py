"""Ratios of held-out losses, paired by problem and seed, and their geometric means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2l_lightning.comparison.statistics import Interval, student_t_quantile
from l2l_lightning.reproduce.zero_shot.store import Entry

WORSE = 1.10
"""Above this ratio a problem counts as lost by more than 10%."""


def log_ratios(entry: Entry, other: Entry) -> Tensor:
    """Returns ln(loss / other's loss) by seed, [S] float64."""
    return torch.tensor(entry.losses, dtype=torch.float64).log() - torch.tensor(other.losses).double().log()


class Ratio(NamedTuple):
    """A geometric mean of ratios over problems, and over their seeds, with two 95% intervals."""

    mean: float
    over_seeds: tuple[float, float]
    """Where it would be for other seeds on the same problems."""
    over_problems: tuple[float, float]
    """Where it would be for other problems of the same kinds."""

    @classmethod
    def of(cls, logs: Sequence[Tensor]) -> Ratio:
        """Returns exp of the mean of the problems' mean logs, of a tensor [S] for each of P problems.

        The interval over seeds is Student's with P(S − 1) degrees of freedom and the standard error
        √(Σ_p s_p² / S) / P, s_p the deviation over a problem's seeds; that over problems is Student's of the
        P means. NaN stands for what one seed or one problem says nothing of.

        Example:
            >>> ratio = Ratio.of([torch.tensor([0.5, 2.0]).log(), torch.tensor([1.0, 4.0]).log()])
            >>> round(ratio.mean, 3)
            1.414
        """
        means = torch.stack([values.double().mean() for values in logs])
        centre, freedom = float(means.mean()), sum(len(values) - 1 for values in logs)
        half = math.nan
        if all(len(values) > 1 for values in logs):
            variance = sum(float(values.double().var()) / len(values) for values in logs)
            half = student_t_quantile(freedom) * math.sqrt(variance) / len(logs)
        problems = Interval.of(means)
        seeds = (math.exp(centre - half), math.exp(centre + half))
        return cls(math.exp(centre), seeds, (math.exp(problems.low), math.exp(problems.high)))

    def as_json(self) -> dict[str, Any]:
        """Returns the numbers, null for what is not known."""

        def pair(interval: tuple[float, float]) -> list[float | None]:
            return [end if math.isfinite(end) else None for end in interval]

        return {
            "geometric_mean": self.mean,
            "ci95_over_seeds": pair(self.over_seeds),
            "ci95_over_problems": pair(self.over_problems),
        }

    def __str__(self) -> str:
        """Gives the mean and the interval over problems."""
        low, high = self.over_problems
        return f"{self.mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) else "")


class Comparison(NamedTuple):
    """One optimizer against another on the problems that both have run."""

    ratio: Ratio
    by_problem: dict[str, float]
    by_family: dict[str, Ratio]
    balanced: float
    """The geometric mean over families, each of which counts once."""
    diverged: int
    """The first optimizer's runs that did."""

    @classmethod
    def of(cls, ours: Mapping[str, Entry], others: Mapping[str, Entry]) -> Comparison:
        """Compares entries by problem; at least one must be in both.

        Args:
            ours: The first optimizer's, whose ratios are below 1 where it is ahead.
            others: The second's, or the best one's of several.
        """
        logs = {name: log_ratios(entry, others[name]) for name, entry in ours.items() if name in others}
        families = list(dict.fromkeys(ours[name].family for name in logs))
        by_family = {
            family: Ratio.of([logs[name] for name in logs if ours[name].family == family])
            for family in families
        }
        return cls(
            Ratio.of(list(logs.values())),
            {name: math.exp(float(values.mean())) for name, values in logs.items()},
            by_family,
            math.exp(sum(math.log(ratio.mean) for ratio in by_family.values()) / len(by_family)),
            sum(ours[name].diverged for name in logs),
        )

    @property
    def wins(self) -> int:
        """The number of problems on which the first optimizer is ahead."""
        return sum(ratio < 1 for ratio in self.by_problem.values())

    @property
    def losses(self) -> list[str]:
        """The problems on which it is behind by more than 10%, the worst first."""
        behind = [name for name, ratio in self.by_problem.items() if ratio > WORSE]
        return sorted(behind, key=lambda name: -self.by_problem[name])

    @property
    def worst(self) -> str:
        """The problem on which it compares worst."""
        return max(self.by_problem, key=lambda name: self.by_problem[name])

    def as_json(self) -> dict[str, Any]:
        """Returns the numbers."""
        return self.ratio.as_json() | {
            "problems": len(self.by_problem),
            "ahead": self.wins,
            "worse_by_10_percent": self.losses,
            "worst": {"problem": self.worst, "ratio": self.by_problem[self.worst]},
            "diverged": self.diverged,
            "geometric_mean_over_families": self.balanced,
            "families": {name: ratio.as_json() for name, ratio in self.by_family.items()},
            "by_problem": self.by_problem,
        }
