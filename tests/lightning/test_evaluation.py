import csv
import functools
import json
import math
import re

import pytest
import torch
from rich.console import Console

from l2l_lightning import files, provenance
from l2l_lightning.comparison.baselines import BASELINES, Trial, TunedBaseline, run_baseline
from l2l_lightning.comparison.compare import Comparison, Contender, Result, baseline_contender, compare
from l2l_lightning.comparison.report import comparison_table, write_comparison
from l2l_lightning.comparison.statistics import (
    Interval,
    diverged,
    final_loss,
    final_losses,
    mean_and_half_width,
    student_t_quantile,
    sum_loss,
)
from l2l_lightning.data.images import Images
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.tasks.base import Task
from l2l_lightning.training.trainer import tuning_table

IMAGES = Images(torch.rand(16, 3), torch.zeros(16, dtype=torch.int64), "sixteen random vectors")


class Noisy(Task):
    """f(x) = mean ½ |x − pixels|² over a minibatch of two."""

    num_coordinates = 3

    def init(self, generator):
        return 3 + torch.randn(3, generator=generator)

    def batch(self, instance, images, generator):
        return images.sample_indices(2, generator)

    def gather(self, batches, images):
        return images.pixels[batches]

    def loss(self, theta, batch):
        return ((theta - batch) ** 2).sum(-1).mean() / 2

    def config(self):
        return {"activation": "[relu]", "comma": 1}


def make_optimizees(count=5):
    return Optimizees(Noisy(), IMAGES, 0, "test", range(count))


def sgd(name, learning_rate, shown=None):
    return Contender(name, functools.partial(run_baseline, BASELINES["sgd"], learning_rate), shown)


def contenders():
    return [sgd("learned", 0.4), sgd("slow", 0.01, 0.01), sgd("lost", 1e6, 1e6)]


@pytest.fixture(scope="module")
def comparison():
    return compare(contenders(), make_optimizees, 30, seed=0)


def test_student_quantiles_are_the_published_ones():
    published = {
        **{1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 19: 2.0930},
        **{30: 2.0423, 31: 2.0395, 60: 2.0003, 120: 1.9799, 1000: 1.9623},
    }
    for degrees, quantile in published.items():
        assert student_t_quantile(degrees) == pytest.approx(quantile, abs=6e-5), degrees


def test_student_quantile_tends_to_the_normal_one():
    assert student_t_quantile(20001) == pytest.approx(1.95996 + 1.95996 * (1.95996**2 + 1) / 80004, abs=1e-5)


def test_interval_of_known_values():
    interval = Interval.of(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert interval == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)
    assert str(interval) == "2.5 ± 2.1"


def test_intervals_cover_the_truth_19_times_in_20():
    draws = torch.randn(20000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, half = mean_and_half_width(draws)
    assert float((mean.abs() < half).double().mean()) == pytest.approx(0.95, abs=0.006)


def test_an_interval_that_does_not_exist_is_null():
    assert Interval.of(torch.tensor([2.0])).as_json() == {"mean": 2.0, "ci95": [None, None]}
    assert Interval.of(torch.tensor([1.0, math.inf])).as_json() == {"mean": None, "ci95": [None, None]}
    assert Interval.of(torch.tensor([1.0, math.nan])).as_json() == {"mean": None, "ci95": [None, None]}
    assert str(Interval.of(torch.tensor([2.0]))) == "2"
    assert str(Interval.of(torch.tensor([1.0, math.inf]))) == "not finite"


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


def test_every_contender_meets_the_same_optimizees():
    """The same rule under three names gives the same numbers, minibatch noise and all."""
    adam = TunedBaseline(BASELINES["adam"], 0.1)
    run = baseline_contender(adam).run
    result = compare([Contender(name, run) for name in "abc"], make_optimizees, 12, seed=0)
    a, b, c = (result.results[name].losses for name in "abc")
    assert torch.equal(a, b)
    assert torch.equal(b, c)
    assert torch.equal(a, run(make_optimizees(), 12).double())
    assert a.shape == (12, 5)
    assert a.dtype == torch.float64


def test_a_baseline_runs_at_its_setting_and_under_another_name():
    setting = {"beta1": 0.5, "beta2": 0.9}
    tuned = baseline_contender(TunedBaseline(BASELINES["adam"], 0.1, setting))
    plain = baseline_contender(TunedBaseline(BASELINES["adam"], 0.1), "adam (default)")
    assert (tuned.name, plain.name) == ("adam", "adam (default)")
    expected = run_baseline(BASELINES["adam"], 0.1, make_optimizees(), 12, setting=setting)
    assert torch.equal(tuned.run(make_optimizees(), 12), expected)
    assert not torch.equal(plain.run(make_optimizees(), 12), expected)
    result = compare([tuned, plain], make_optimizees, 12, seed=0)
    optimizers = result.summary()["optimizers"]
    assert optimizers["adam"]["setting"] == setting
    assert optimizers["adam (default)"]["setting"] == {}
    (row,) = (line for line in printed(comparison_table(result)).splitlines() if "│ adam  " in line)
    assert "beta1 0.5, beta2 0.9" in row


def test_tables_have_a_column_of_settings_where_there_are_any(comparison):
    assert "setting" not in printed(comparison_table(comparison))
    default = TunedBaseline(BASELINES["nag"], 0.1, {}, (Trial({}, 0.1, 0.25), Trial({}, 0.2, math.inf)))
    other = TunedBaseline(
        BASELINES["momentum"],
        0.2,
        {"momentum": 0.8},
        tuple(Trial({"momentum": 0.8}, r, r) for r in (0.2, 0.5, 1)),
    )
    text = printed(tuning_table([default], "task"))
    assert "setting" not in text
    text = printed(tuning_table(iter([default, other]), "task"))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")
    ]
    assert rows == [
        ["nag", "0.1 (edge of the search)", "", "0.25", "2"],
        ["momentum", "0.2 (edge of the search)", "momentum 0.8", "0.2", "3"],
    ]


def test_refuses_what_is_not_paired():
    seeds = iter(range(100))

    def unpaired():
        return Optimizees(Noisy(), IMAGES, next(seeds), "test", range(3))

    with pytest.raises(ValueError, match="another θ0"):
        compare(contenders(), unpaired, 5, seed=0)

    def greedy(optimizees, horizon):
        optimizees.next_batches()
        return run_baseline(BASELINES["sgd"], 0.1, optimizees, horizon)

    with pytest.raises(ValueError, match="greedy and learned differ in their first losses"):
        compare([*contenders(), Contender("greedy", greedy)], make_optimizees, 5, seed=0)


def test_refuses_two_of_one_name_and_losses_of_another_shape():
    with pytest.raises(ValueError, match="two contenders have one name"):
        compare([sgd("a", 0.1), sgd("a", 0.2)], make_optimizees, 5, seed=0)
    with pytest.raises(ValueError, match=r"losses \(6, 5\), not \(5, 5\)"):
        compare([Contender("long", lambda o, h: sgd("", 0.1).run(o, h + 1))], make_optimizees, 5, seed=0)


def test_diverged_are_counted_and_not_dropped():
    falls, rises = torch.linspace(2, 1, 20), torch.linspace(2, 3, 20)
    blows_up = torch.where(torch.arange(20) < 15, falls, math.inf)
    recovers = torch.where(torch.arange(20) == 2, math.nan, falls)
    losses = torch.stack([falls, rises, blows_up, recovers, falls], dim=1).double()
    assert diverged(losses) == 3
    assert not math.isfinite(final_loss(losses).mean)
    assert not math.isfinite(sum_loss(losses).mean)
    assert diverged(losses[:, :2]) == 1
    assert final_loss(losses[:, :2]).mean == pytest.approx(2.0)


def test_ranking_and_differences(comparison):
    assert comparison.ranking == ["learned", "slow", "lost"]
    assert diverged(comparison.results["lost"].losses) == 5
    assert comparison.lead("slow") == "clear"
    assert comparison.lead("lost") == "none"  # nothing can be said of a mean that does not exist
    learned, slow = (final_losses(comparison.results[name].losses) for name in ("learned", "slow"))
    assert comparison.difference("slow") == Interval.of(learned - slow)
    assert comparison.difference("slow").high < 0
    sums = [comparison.results[name].losses.sum(0) for name in ("learned", "slow")]
    assert comparison.difference("slow", "sum_loss") == Interval.of(sums[0] - sums[1])


def test_a_lead_that_only_pairing_shows():
    """Optimizees differ by far more than the optimizers do; each of them is better off by one."""
    other = torch.arange(20.0, dtype=torch.float64).expand(3, 20)
    results = {"learned": Result(other - 1, 1.0, None), "other": Result(other, 1.0, 0.1)}
    comparison = Comparison("task", 3, 20, "none", 0, "cpu", "float64", results)
    assert comparison.lead("other") == comparison.lead("other", "sum_loss") == "paired"


def test_summary_json(comparison, tmp_path):
    write_comparison(comparison, tmp_path / "new" / "folder")

    def forbid(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "new" / "folder" / "summary.json").read_text()
    summary = json.loads(text, parse_constant=forbid)
    required = {"task", "horizon", "num_optimizees", "data_source", "commit", "optimizers"}
    assert set(summary) == required | {"seed", "device", "versions", "dtype"}
    assert summary["task"] == "Noisy(activation=[relu], comma=1)"
    assert (summary["horizon"], summary["num_optimizees"], summary["seed"]) == (30, 5, 0)
    assert summary["data_source"] == "sixteen random vectors"
    assert summary["dtype"] == "float32"
    assert list(summary["optimizers"]) == ["learned", "slow", "lost"]
    for entry in summary["optimizers"].values():
        assert set(entry) == {"final_loss", "sum_loss", "diverged", "learning_rate", "setting", "seconds"}
        assert set(entry["final_loss"]) == set(entry["sum_loss"]) == {"mean", "ci95"}
        assert entry["seconds"] > 0
    slow = comparison.results["slow"].losses
    entry = summary["optimizers"]["slow"]
    assert entry["final_loss"]["mean"] == pytest.approx(float(slow[-10:].mean()))
    assert entry["sum_loss"]["mean"] == pytest.approx(float(slow.sum() / 5))
    low, high = entry["final_loss"]["ci95"]
    assert low < entry["final_loss"]["mean"] < high
    assert entry["learning_rate"] == 0.01
    assert summary["optimizers"]["learned"]["learning_rate"] is None
    assert summary["optimizers"]["lost"]["final_loss"] == {"mean": None, "ci95": [None, None]}
    assert summary["optimizers"]["lost"]["diverged"] == 5


def test_curves_csv_and_png(comparison, tmp_path):
    write_comparison(comparison, str(tmp_path))
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["task", "optimizer", "seed", "step", "loss"]
    assert len(rows) == 3 * 5 * 30
    assert {row["task"] for row in rows} == {"Noisy(activation=[relu], comma=1)"}
    for name, result in comparison.results.items():
        losses = torch.empty(30, 5)
        for row in rows:
            if row["optimizer"] == name:
                losses[int(row["step"]), int(row["seed"])] = float(row["loss"])
        assert torch.allclose(losses, result.losses.float(), rtol=0, atol=0, equal_nan=True)
    assert len((tmp_path / "curves.png").read_bytes()) > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.csv", "curves.png", "summary.json"]


def printed(table):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_table(comparison):
    text = printed(comparison_table(comparison))
    assert "activation=[relu]" in text  # not taken for rich's markup
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["learned", "slow", "lost"]
    assert "clear / clear" in rows[1]
    assert "not finite" in rows[2]


def test_table_of_baselines_alone():
    text = printed(comparison_table(compare([sgd("slow", 0.01, 0.01)], make_optimizees, 5, seed=0)))
    assert "learned" not in text
    assert "0.01" in text


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_json(path, {"old": 1})

    def fail(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"nan": math.nan})
    assert json.loads(path.read_text()) == {"old": 1}


def test_commit_is_a_hash_or_the_version(monkeypatch, tmp_path):
    version = provenance.versions()["l2l-lightning"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", provenance.commit()) or provenance.commit() == version
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    assert provenance.commit.__wrapped__() == version


def test_device_name():
    assert provenance.device_name("cpu")
    assert provenance.device_name("meta") == "meta"
