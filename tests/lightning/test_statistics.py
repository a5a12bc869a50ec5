"""Intervals and paired comparisons of known and of simulated values."""

import math

import pytest
import scipy.stats
import torch

from l2l_lightning.comparison.statistics import (
    Interval,
    diverged,
    final_loss,
    final_losses,
    lead,
    log_interval,
    mean_and_half_width,
    paired_ratio,
    standing,
    student_t_quantile,
    sum_loss,
)


@pytest.mark.parametrize("degrees", [*range(1, 41), 127, 999, 10_000, 100_001])
def test_students_quantiles_are_scipys(degrees):
    expected = pytest.approx(float(scipy.stats.t.ppf(0.975, degrees)), rel=1e-11)
    assert student_t_quantile(degrees) == expected


def test_interval_of_known_values():
    interval = Interval.of(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert interval == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)
    assert str(interval) == "2.5 ± 2.1"


def test_intervals_cover_the_truth_19_times_in_20():
    draws = torch.randn(20000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, half = mean_and_half_width(draws)
    assert float((mean.abs() < half).double().mean()) == pytest.approx(0.95, abs=0.006)


def test_intervals_for_a_log_axis_are_positive_and_cover_skewed_means_better():
    """Of losses that are log-normal, χ² and normal, all of mean 1."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 20000, 20, generator=draw, dtype=torch.float64)
    for values in ((normal[0] - 0.5).exp(), normal[1] ** 2, 1 + 0.1 * normal[2]):
        mean, half = mean_and_half_width(values)
        low, high = log_interval(values)
        assert (low > 0).all()
        assert torch.allclose(low * high, mean**2)
        covers = float(((low < 1) & (high > 1)).double().mean())
        assert covers > float(((mean - 1).abs() < half).double().mean()) - 0.002
        assert 0.88 < covers < 0.956
    narrow = log_interval(values)  # where it is narrow, it is Student's
    assert torch.allclose(torch.stack(narrow), torch.stack([mean - half, mean + half]), rtol=4e-3)
    odd = torch.tensor([[1.0, -3.0], [1.0, math.nan], [0.0, 0.0]])
    assert torch.stack(log_interval(odd)).isnan().all()
    assert torch.stack(log_interval(torch.tensor([2.0]))).isnan().all()


@pytest.mark.parametrize(
    ("values", "mean", "text"),
    [([2.0], 2.0, "2"), ([1.0, math.inf], None, "not finite"), ([1.0, math.nan], None, "not finite")],
)
def test_an_interval_that_does_not_exist_is_null(values, mean, text):
    interval = Interval.of(torch.tensor(values))
    assert interval.as_json() == {"mean": mean, "ci95": [None, None]}
    assert str(interval) == text


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.35812, 0.34612, 0.37012), "0.358 ± 0.012"),
        (Interval(75.04, 73.0, 77.08), "75.0 ± 2.0"),
        (Interval(1234.5, 1000.0, 1469.0), "1234 ± 234"),
        (Interval(1.0, 1.0, 1.0), "1 ± 0"),
        (Interval(1e9, 0.0, 2e9), "1e+09 ± 1e+09"),
    ],
)
def test_intervals_are_printed_to_the_digits_that_mean_something(interval, text):
    assert str(interval) == text


def test_the_final_loss_is_the_mean_of_the_last_ten():
    losses = torch.arange(30.0).reshape(15, 2)
    assert final_losses(losses).tolist() == [19.0, 20.0]
    assert final_losses(losses[:4]).tolist() == [3.0, 4.0]


def test_diverged_are_counted_and_not_dropped():
    falls, rises = torch.linspace(2, 1, 20), torch.linspace(2, 3, 20)
    blows_up = torch.where(torch.arange(20) < 15, falls, math.inf)
    recovers = torch.where(torch.arange(20) == 2, math.nan, falls)
    losses = torch.stack([falls, rises, blows_up, recovers, falls], dim=1)
    assert diverged(losses) == 3
    assert not math.isfinite(final_loss(losses).mean)
    assert not math.isfinite(sum_loss(losses).mean)
    assert diverged(losses[:, :2]) == 1
    assert final_loss(losses[:, :2]).mean == pytest.approx(2.0)


SPREAD = torch.arange(20.0)
"""Optimizees that differ by far more than optimizers do."""


@pytest.mark.parametrize(
    ("values", "others", "ahead", "words"),
    [
        (SPREAD - 1, SPREAD, "paired", "ahead, paired"),
        (SPREAD, SPREAD - 1, "none", "behind, paired"),
        (SPREAD - 50, SPREAD, "clear", "ahead, disjoint intervals"),
        (SPREAD, SPREAD - 50, "none", "behind, disjoint intervals"),
        (SPREAD, SPREAD.flip(0), "none", "level"),
        (SPREAD, SPREAD / 0, "none", "level"),  # nothing can be said of a mean that does not exist
    ],
)
def test_what_intervals_allow_to_say(values, others, ahead, words):
    assert lead(values, others) == ahead
    assert standing(values, others) == words


def test_the_interval_of_a_ratio_covers_the_truth_and_uses_the_pairing():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 2000, 30, generator=generator, dtype=torch.float64)
    shared = 10 + 2 * draws[0]
    ratios = [paired_ratio(0.8 * b + a, b) for a, b in zip(0.1 * draws[1], shared, strict=True)]
    assert sum(r.low < 0.8 < r.high for r in ratios) / len(ratios) == pytest.approx(0.95, abs=0.015)
    # The ratio of unpaired means would be uncertain by the optimizees' own spread.
    assert all(r.high - r.low < 0.02 for r in ratios)
    lost = paired_ratio(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0]))
    assert lost.mean == math.inf
