"""What can be said of optimizers' losses on the same K optimizees: means, 95% intervals, paired differences.

Losses are [T, K]: f_t(θ_t) of every optimizee in row t. Everything that compares two optimizers takes one
value of each optimizee, [K], in the same order, and makes use of the pairing.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

FINAL_STEPS = 10
"""The final loss is a mean over this many last steps: one minibatch's loss alone is too noisy to rank by."""

Lead = Literal["clear", "paired", "none"]


def final_losses(losses: Tensor) -> Tensor:
    """Returns each optimizee's mean over its last min(10, T) losses, [T, K] to [K]."""
    return losses[-FINAL_STEPS:].mean(dim=0)


def sum_losses(losses: Tensor) -> Tensor:
    """Returns the sum of each optimizee's losses, [T, K] to [K] float64."""
    return losses.double().sum(dim=0)


def diverged(losses: Tensor) -> int:
    """Counts the optimizees of losses [T, K] that met one that is not finite, or ended above their first.

    They are counted and never dropped: one loss that is not finite leaves the means undefined.

    Example:
        >>> diverged(torch.tensor([[1.0, 1.0, 1.0], [0.5, 3.0, torch.nan]]))
        2
    """
    finite = losses.isfinite().all(dim=0)
    return int((~finite | (final_losses(losses) > losses[0])).sum())


@functools.cache
def student_t_quantile(degrees_of_freedom: int) -> float:
    """Returns the t that a Student variable stays within, on either side of 0, with probability 0.95.

    With t = √n tan ϑ that probability is a finite sum of powers of cos ϑ; bisected, to 10⁻¹¹ for n ≤ 10⁵.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.

    Example:
        >>> [round(student_t_quantile(n), 3) for n in (1, 2, 19)]
        [12.706, 4.303, 2.093]
    """
    n = degrees_of_freedom
    k = 2 * torch.arange(1, max(n // 2, 1), dtype=torch.float64, device="cpu")
    ratios = k / (k + 1) if n % 2 else (k - 1) / k  # of each term to the one before
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        cosine = math.cos(angle)
        terms = 1 + float((cosine**2 * ratios).cumprod(0).sum()) if n > 1 else 0.0
        inside = math.sin(angle) * terms
        if n % 2:
            inside = (angle + cosine * inside) * 2 / math.pi
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return math.sqrt(n) * math.tan(angle)


def mean_and_half_width(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean over the last axis and half the width t·s/√K of its 95% interval.

    Values [..., K] give two tensors [...]. Nothing is dropped: where a value is not finite neither are the
    mean and the half width. One value has no interval: its half width is NaN.
    """
    number = values.shape[-1]
    mean = values.mean(dim=-1)
    if number == 1:
        return mean, torch.full_like(mean, math.nan)
    return mean, values.std(dim=-1) * (student_t_quantile(number - 1) / math.sqrt(number))


def log_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the 95% interval of the mean over the last axis that a log axis can show: m·exp(± t·s/(m√K)).

    It is Student's interval of the mean's logarithm, whose deviation is s/(m√K) (the delta method): positive
    whatever the spread, as wide upwards as downwards on a log axis, and to first order the m ± t·s/√K of
    `mean_and_half_width` where that is narrow. Of skewed losses it covers the mean more often than that one,
    and than a bootstrap's percentiles. Values [..., K] give two tensors [...]; NaN where the mean is not
    positive or not finite, and of one value.

    Example:
        >>> low, high = log_interval(torch.tensor([0.1, 0.2, 3.0]))  # 1.1 ± 4.1
        >>> round(float(low), 3), round(float(high), 1)
        (0.027, 45.3)
    """
    mean, half = mean_and_half_width(values)
    mean = torch.where(mean > 0, mean, math.nan)
    spread = half / mean
    return mean * torch.exp(-spread), mean * torch.exp(spread)


class Interval(NamedTuple):
    """A mean over optimizees with its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """Returns the mean of K values [K], and where it lies with 95% confidence.

        Example:
            >>> print(Interval.of(torch.tensor([1.0, 2.0, 3.0, 4.0])))
            2.5 ± 2.1
        """
        mean, half = (float(x) for x in mean_and_half_width(values))
        return cls(mean, mean - half, mean + half)

    def as_json(self) -> dict[str, Any]:
        """Returns {"mean", "ci95": [low, high]}, with null for what is not finite."""
        mean, low, high = (x if math.isfinite(x) else None for x in self)
        return {"mean": mean, "ci95": [low, high]}

    def __str__(self) -> str:
        """Rounds to the half width's second digit, as what follows it is noise: "0.358 ± 0.012"."""
        half = self.high - self.mean
        if not math.isfinite(self.mean):
            return "not finite"
        if not math.isfinite(half):
            return f"{self.mean:.4g}"
        if not 1e-6 < half < 1e6:
            return f"{self.mean:.3g} ± {half:.2g}"
        decimals = max(0, 1 - math.floor(math.log10(half)))
        return f"{self.mean:.{decimals}f} ± {half:.{decimals}f}"


def final_loss(losses: Tensor) -> Interval:
    """Returns the final loss over the optimizees of losses [T, K]."""
    return Interval.of(final_losses(losses).double())


def sum_loss(losses: Tensor) -> Interval:
    """Returns the sum of a rollout's losses over the optimizees of losses [T, K]."""
    return Interval.of(sum_losses(losses))


def summary(losses: Tensor) -> dict[str, Any]:
    """Returns what a result file says of an optimizer's losses [T, K]: final loss, sum, how many diverged."""
    return {
        "final_loss": final_loss(losses).as_json(),
        "sum_loss": sum_loss(losses).as_json(),
        "diverged": diverged(losses),
    }


def paired_difference(values: Tensor, others: Tensor) -> Interval:
    """Returns the mean of values − others [K], optimizee by optimizee; negative where the first is ahead.

    Pairing removes what the optimizees share, so this interval is narrower than those of the two means.

    Example:
        >>> shared = torch.tensor([1.0, 5.0, 9.0])
        >>> print(paired_difference(shared - torch.tensor([0.1, 0.2, 0.3]), shared))
        -0.20 ± 0.25
    """
    return Interval.of((values - others).double())


def paired_ratio(values: Tensor, others: Tensor) -> Interval:
    """Returns the ratio R = ā/b̄ of two means over the same optimizees, a and b [K]; infinite where ā is.

    The half width is t·s/(√K·b̄), s the deviation of a_k − R·b_k over the optimizees (the delta method, which
    keeps what the pairing gives).

    Example:
        >>> print(paired_ratio(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])))
        0.5 ± 0
    """
    a, b = values.double(), others.double()
    quotient = float(a.mean() / b.mean())
    if not math.isfinite(quotient):
        return Interval(math.inf, math.nan, math.nan)
    _, half = mean_and_half_width((a - quotient * b) / b.mean())
    return Interval(quotient, quotient - float(half), quotient + float(half))


def lead(values: Tensor, others: Tensor) -> Lead:
    """Says how clearly an optimizer is ahead of (below) another one on the same optimizees, both [K].

    "clear": its interval lies wholly below the other's; "paired": the two overlap, but the interval of the
    paired difference lies below 0; "none": neither, or a mean that does not exist.

    Example:
        >>> shared = torch.tensor([1.0, 5.0, 9.0])
        >>> lead(shared - 1, shared), lead(shared - 100, shared), lead(shared, shared - 1)
        ('paired', 'clear', 'none')
    """
    if Interval.of(values.double()).high < Interval.of(others.double()).low:
        return "clear"
    return "paired" if paired_difference(values, others).high < 0 else "none"


def standing(values: Tensor, others: Tensor) -> str:
    """Says how the first optimizer's values stand to the second's in words, as `lead` does both ways round.

    Example:
        >>> shared = torch.tensor([1.0, 5.0, 9.0])
        >>> standing(shared - 1, shared), standing(shared + 100, shared), standing(shared, shared)
        ('ahead, paired', 'behind, disjoint intervals', 'level')
    """
    words = {"clear": "disjoint intervals", "paired": "paired"}
    for word, one_way in (("ahead", lead(values, others)), ("behind", lead(others, values))):
        if one_way != "none":
            return f"{word}, {words[one_way]}"
    return "level"
