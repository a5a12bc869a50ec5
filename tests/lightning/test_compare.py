import base64
import csv
import functools
import json
import math
import platform
import re
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

import l2l_lightning
from l2l_lightning import files, provenance
from l2l_lightning.comparison import plots
from l2l_lightning.comparison.baselines import BASELINES, Trial, TunedBaseline, run_baseline
from l2l_lightning.comparison.compare import Contender, baseline_contender, compare
from l2l_lightning.comparison.figures import losses_figure
from l2l_lightning.comparison.report import comparison_table, curves_picture, write_comparison
from l2l_lightning.comparison.statistics import Interval, diverged, final_loss, final_losses
from l2l_lightning.data.images import Images
from l2l_lightning.errors import MissingPackageError, ResultsError
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
    settings = {"model": {"rate": 0.4, "limit": math.inf}}
    return compare(contenders(), make_optimizees, 30, seed=0, settings=settings)


def test_every_contender_meets_the_same_optimizees_at_its_own_setting():
    """One rule under two names gives the same numbers, minibatch noise and all."""
    setting = {"beta1": 0.5, "beta2": 0.9}
    tuned = baseline_contender(TunedBaseline(BASELINES["adam"], 0.1, setting))
    plain = baseline_contender(TunedBaseline(BASELINES["adam"], 0.1), "adam (default)")
    again = Contender("again", tuned.run)
    result = compare([tuned, plain, again], make_optimizees, 12, seed=0)
    losses = {name: found.losses for name, found in result.results.items()}
    expected = run_baseline(BASELINES["adam"], 0.1, make_optimizees(), 12, setting=setting).double()
    assert torch.equal(losses["adam"], expected)
    assert torch.equal(losses["again"], expected)
    assert not torch.equal(losses["adam (default)"], expected)
    assert expected.shape == (12, 5)
    optimizers = result.summary()["optimizers"]
    assert optimizers["adam"]["setting"] == setting
    assert optimizers["adam (default)"]["setting"] == {}
    (row,) = (line for line in printed(comparison_table(result)).splitlines() if "│ adam  " in line)
    assert "beta1 0.5, beta2 0.9" in row


def test_the_tuning_table_has_a_column_of_settings_where_there_are_any():
    default = TunedBaseline(BASELINES["nag"], 0.1, {}, (Trial({}, 0.1, 0.25), Trial({}, 0.2, math.inf)))
    setting = {"momentum": 0.8}
    trials = tuple(Trial(setting, rate, rate) for rate in (0.2, 0.5, 1))
    other = TunedBaseline(BASELINES["momentum"], 0.2, setting, trials)
    assert "setting" not in printed(tuning_table([default], "task"))
    lines = printed(tuning_table(iter([default, other]), "task")).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
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


def test_refuses_losses_of_another_shape():
    with pytest.raises(ValueError, match=r"losses \(6, 5\), not \(5, 5\)"):
        compare([Contender("long", lambda o, h: sgd("", 0.1).run(o, h + 1))], make_optimizees, 5, seed=0)


def test_ranking_and_differences(comparison):
    assert comparison.ranking == ["learned", "slow", "lost"]
    assert diverged(comparison.results["lost"].losses) == 5
    assert comparison.lead("slow") == "clear"
    assert comparison.lead("slow", "sum_loss") == "clear"
    assert comparison.lead("lost") == "none"
    learned, slow = (final_losses(comparison.results[name].losses) for name in ("learned", "slow"))
    assert comparison.difference("slow") == Interval.of(learned - slow)
    assert comparison.difference("slow").high < 0
    sums = [comparison.results[name].losses.sum(0) for name in ("learned", "slow")]
    assert comparison.difference("slow", "sum_loss") == Interval.of(sums[0] - sums[1])


def test_summary_json(comparison, tmp_path):
    write_comparison(comparison, tmp_path / "new" / "folder")

    def forbid(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "new" / "folder" / "summary.json").read_text()
    summary = json.loads(text, parse_constant=forbid)
    expected = {
        "task": "Noisy(activation=[relu], comma=1)",
        "horizon": 30,
        "num_optimizees": 5,
        "data_source": "sixteen random vectors",
        "seed": 0,
        "dtype": "float32",
    }
    assert {name: summary[name] for name in expected} == expected
    others = {"commit", "device", "instruction_set", "versions"}
    others |= {"optimizers", "settings", "reference", "paired"}
    assert set(summary) == expected.keys() | others
    assert (summary["reference"], summary["paired"]) == ("learned", True)
    assert summary["settings"] == {"model": {"rate": 0.4, "limit": "inf"}}
    assert list(summary["optimizers"]) == ["learned", "slow", "lost"]
    losses, entry = comparison.results["slow"].losses, summary["optimizers"]["slow"]
    for key, values in (("final_loss", losses[-10:].mean(0)), ("sum_loss", losses.sum(0))):
        mean, low, high = Interval.of(values)
        assert entry[key]["mean"] == pytest.approx(mean)
        assert entry[key]["ci95"] == pytest.approx([low, high])
    for measure, of in (("final_loss", final_losses), ("sum_loss", lambda losses: losses.sum(0))):
        mean, low, high = Interval.of(of(comparison.results["learned"].losses) - of(losses))
        found = entry["reference_minus_it"][measure]
        assert [found["mean"], *found["ci95"]] == pytest.approx([mean, low, high])
    assert entry.pop("reference_minus_it").keys() == entry["lead"].keys()
    assert entry.pop("lead") == {"final_loss": "clear", "sum_loss": "clear"}
    assert "lead" not in summary["optimizers"]["learned"]
    lost = summary["optimizers"]["lost"]
    assert lost["reference_minus_it"]["final_loss"] == {"mean": None, "ci95": [None, None]}
    assert lost["lead"]["final_loss"] == "none"
    assert entry.pop("seconds") > 0
    assert {name: entry[name] for name in set(entry) - {"final_loss", "sum_loss"}} == {
        **{"diverged": 0, "learning_rate": 0.01, "setting": {}}
    }
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
    assert "setting" not in text
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["learned", "slow", "lost"]
    assert "clear / clear" in rows[1]
    assert "not finite" in rows[2]
    alone = printed(comparison_table(compare([sgd("slow", 0.01, 0.01)], make_optimizees, 5, seed=0)))
    assert "learned" not in alone
    assert "0.01" in alone


def test_a_picture_says_final_losses_and_how_many_diverged(comparison, monkeypatch):
    drawn = {}

    def draw(curves, title, legend_title, scale, loss_label):
        drawn.update(curves={c.label: c for c in curves}, title=title, legend=legend_title)
        drawn.update(scale=scale, loss_label=loss_label)
        return Figure()

    monkeypatch.setattr(plots, "curves_figure", draw)
    losses = {name: result.losses for name, result in comparison.results.items()}
    assert curves_picture(losses, "Noisy", ["learned"])[1:4] == b"PNG"
    labels = [f"{name}  {final_loss(losses[name])}" for name in ("learned", "slow")]
    assert list(drawn["curves"]) == [*labels, "lost  not finite  (5/5 diverged)"]
    assert [c.highlight for c in drawn["curves"].values()] == [True, False, False]
    assert [c.name for c in drawn["curves"].values()] == ["learned", "slow", "lost"]
    mean, low, high = Interval.of(losses["slow"][7])
    ratio = math.exp((high - mean) / mean)  # Student's interval of the mean's logarithm
    curve = drawn["curves"][labels[1]]
    assert (curve.mean[7], curve.low[7], curve.high[7]) == pytest.approx((mean, mean / ratio, mean * ratio))
    assert (drawn["scale"], "exp" in drawn["loss_label"]) == ("log", True)
    comparison.figure(["slow"], "a title", "linear")
    (curve,) = drawn["curves"].values()
    assert (curve.mean[7], curve.low[7], curve.high[7]) == pytest.approx((mean, low, high))
    assert drawn["title"].startswith("a title\n")
    assert (drawn["scale"], "exp" in drawn["loss_label"]) == ("linear", False)
    with pytest.raises(ResultsError, match="no optimizer adam: choose from learned, slow, lost"):
        comparison.figure(["adam"])
    curves_picture(losses, "Noisy", ["learned"])
    assert drawn["title"] == "Noisy\nmean of 5 optimizees, with its 95% interval"
    assert drawn["legend"] == "final loss (mean of last 10)"


def test_no_band_of_a_log_axis_reaches_zero_and_a_mean_that_is_not_positive_makes_it_linear():
    wide = torch.tensor([[1.0, 1e-3, 1e-3], [50.0, 1e-6, 1e-6]], dtype=torch.float64)
    axes = losses_figure({"adam": wide}, "wide").axes[0]
    assert axes.get_yscale() == "log"
    assert Interval.of(wide[1]).low < 0 < axes.collections[0].get_paths()[0].vertices[:, 1].min()
    below = {"adam": wide, "sgd": wide - 1}
    assert losses_figure(below, "below").axes[0].get_yscale() == "linear"
    with pytest.raises(ResultsError, match="which sgd has not: use --scale linear"):
        losses_figure(below, "below", scale="log")


def test_a_notebook_shows_the_table_and_the_figure_and_no_tensors(comparison):
    html = comparison._repr_html_()
    assert "<td" in html
    assert str(final_loss(comparison.results["slow"].losses)) in html
    assert base64.b64decode(html.partition("base64,")[2].partition('"')[0]).startswith(b"\x89PNG")
    assert "tensor" not in repr(comparison)
    assert str(comparison.difference("slow")) in repr(comparison)


class Frame:
    """The two things of a pandas.DataFrame that are needed."""

    def __init__(self, rows, columns=None):
        self.rows, self.columns, self.index = rows, columns, None

    def set_index(self, name):
        self.index = name
        return self


def test_to_pandas_is_the_table_or_every_loss(comparison, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match=r"pip install .l2l-lightning\[analysis\]") as missing:
        comparison.to_pandas()
    assert isinstance(missing.value, ImportError)
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=Frame))
    table = comparison.to_pandas()
    assert (table.index, str(table.rows)) == ("optimizer", str(comparison.rows()))  # NaN is not NaN
    slow = comparison.results["slow"].losses
    row = table.rows[1]
    assert [row["optimizer"], row["learning_rate"], row["lead"]] == ["slow", 0.01, "clear"]
    for key, interval in {
        "final_loss": final_loss(slow),
        "sum_loss": Interval.of(slow.sum(0)),
        "difference": comparison.difference("slow"),
        "sum_difference": comparison.difference("slow", "sum_loss"),
    }.items():
        assert [row[key], row[f"{key}_low"], row[f"{key}_high"]] == pytest.approx(list(interval))
    assert table.rows[0]["difference"] is None
    losses = comparison.to_pandas("losses")
    assert list(losses.columns) == ["task", "optimizer", "seed", "step", "loss"]
    assert len(losses.rows) == 3 * 5 * 30
    assert [comparison.task, "slow", 4, 29, slow[29, 4].item()] in losses.rows
    with pytest.raises(ValueError, match='"table" or "losses"'):
        comparison.to_pandas("curves")


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
    monkeypatch.setenv("L2L_COMMIT", "abc")
    assert provenance.commit.__wrapped__() == "abc"


def test_a_copy_that_was_never_installed_has_a_provenance(monkeypatch, tmp_path):
    """As a machine with torch alone runs it, from a folder without git."""

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    others = {"not installed", platform.python_version()}
    assert set(provenance.versions().values()) == {l2l_lightning.__version__} | others
    assert provenance.commit.__wrapped__() == l2l_lightning.__version__


def test_device_name():
    assert provenance.device_name("cpu")
    assert provenance.device_name("meta") == "meta"
