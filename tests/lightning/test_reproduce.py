"""`reproduce`: what it writes is what was measured, and an interruption changes nothing."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from l2l_lightning import pretrained
from l2l_lightning.cli import main
from l2l_lightning.comparison.baselines import BASELINES
from l2l_lightning.reproduce import bench as bench_module
from l2l_lightning.reproduce import training
from l2l_lightning.reproduce.bench import Bench, NotShippedError, Run, Settings, Train, Tune
from l2l_lightning.reproduce.command import EXPERIMENTS, OutFolderError, reproduce
from l2l_lightning.reproduce.experiment import diverged, lead, ratio
from l2l_lightning.reproduce.generalise import cells
from l2l_lightning.reproduce.progress import Countdown
from l2l_lightning.reproduce.recipes import ABLATIONS, RECIPES, snapshot_of
from l2l_lightning.reproduce.training import meta_train
from l2l_lightning.tasks import MNISTMLP, Quadratic

SMALL = [
    "--data.num_rollouts=4",
    "--model.horizon=6",
    "--model.unroll=2",
    "--model.num_tasks=2",
    "--model.num_validation_optimizees=2",
    "--trainer.val_check_interval=3",
]


def settings(folder, **arguments):
    return Settings(out=str(folder), quick=True, num_tuning_optimizees=1, **arguments)


def silent(fraction, text):
    pass


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def quadratic(tmp_path_factory):
    """A finished quick reproduction of the quadratics."""
    folder = tmp_path_factory.mktemp("reproduction")
    reproduce(["quadratic"], settings(folder))
    return folder


def test_an_experiment_leaves_numbers_pictures_and_a_report(quadratic):
    document = json.loads((quadratic / "quadratic/results.json").read_text())
    assert document["seed"] == 0
    assert document["quick"] is True
    assert {"commit", "device", "versions", "data", "seconds", "findings"} <= set(document)
    assert (quadratic / "quadratic/paper_quadratic.png").read_bytes()[1:4] == b"PNG"
    report = (quadratic / "REPORT.md").read_text()
    assert "A quick run" in report
    for finding in document["findings"]:
        assert f"| {finding['ours']} | {finding['verdict']} |" in report


def test_the_reports_numbers_are_the_means_of_the_csvs_losses(quadratic):
    rows = read_csv(quadratic / "quadratic/results.csv")
    document = json.loads((quadratic / "quadratic/results.json").read_text())
    for panel, results in document["results"].items():
        for name, numbers in results["optimizers"].items():
            losses = np.array(
                [float(r["loss"]) for r in rows if (r["panel"], r["optimizer"]) == (panel, name)]
            ).reshape(numbers["num_optimizees"], results["horizon"])
            assert numbers["final_loss"]["mean"] == pytest.approx(losses[:, -10:].mean(), rel=1e-6)
            assert numbers["sum_loss"]["mean"] == pytest.approx(losses.sum(1).mean(), rel=1e-6)


def test_what_is_done_is_not_done_again(quadratic, monkeypatch, capsys):
    monkeypatch.setattr(Bench, "answer", lambda *_: pytest.fail("something was computed again"))
    reproduce(["quadratic"], settings(quadratic))
    assert "quadratic: done before" in capsys.readouterr().out


def test_an_interrupted_reproduction_goes_on_where_it_was(quadratic, tmp_path, monkeypatch):
    """Stopped among the curves: what was trained, tuned and run is found, and the numbers are the same."""
    runs = []
    original = bench_module.run_baseline

    def interrupted(*arguments, **options):
        runs.append(arguments)
        if len(runs) == 5:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(bench_module, "run_baseline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce(["quadratic"], settings(tmp_path))
    assert not (tmp_path / "quadratic/results.json").exists()
    monkeypatch.setattr(training.MetaLearningCLI, "build", lambda *_, **__: pytest.fail("trained again"))
    reproduce(["quadratic"], settings(tmp_path))
    assert len(runs) == 1 + 2 * len(BASELINES)  # the one that was interrupted, and everyone once
    ours, theirs = ((f / "quadratic/results.csv").read_text() for f in (tmp_path, quadratic))
    assert ours == theirs


def test_a_folder_is_not_shared_by_different_settings(quadratic):
    with pytest.raises(OutFolderError, match="seed 0, not 1: name another folder with --out"):
        reproduce(["quadratic"], settings(quadratic, seed=1))


def test_a_meta_training_that_was_stopped_gives_the_same_rule(tmp_path):
    whole = meta_train("quadratic", tmp_path / "whole", report=silent, arguments=SMALL, snapshots=[3])

    def stop(fraction, text):
        if fraction >= 0.5:
            raise KeyboardInterrupt

    arguments = [*SMALL, "--latest.every_n_meta_steps=5"]  # the last validation was earlier
    with pytest.raises(KeyboardInterrupt):
        meta_train("quadratic", tmp_path / "cut", report=stop, arguments=arguments, snapshots=[3])
    assert not (tmp_path / "cut/rule.safetensors").exists()
    resumed = meta_train("quadratic", tmp_path / "cut", report=silent, arguments=SMALL, snapshots=[3])
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    snapshots = [pretrained.load(tmp_path / name / "after-3.safetensors") for name in ("whole", "cut")]
    for ours, theirs in zip(*(rule.parameters() for rule in snapshots), strict=True):
        assert torch.equal(ours, theirs)
    record = json.loads((tmp_path / "cut/training.json").read_text())
    assert record["meta_steps"] == 12
    assert record["seconds"] > 0


def test_losses_are_kept_by_what_determines_them(tmp_path):
    bench = Bench(settings(tmp_path))
    run = Run(Quadratic(dim=3), "sgd", 4, 2, tuning="default")
    first = bench.losses(run)
    assert torch.equal(bench.losses(run), first)
    kept = list((tmp_path / "losses").iterdir())
    assert len(kept) == 1
    bench.losses(Run(Quadratic(dim=3), "sgd", 4, 3, tuning="default"))
    assert len(list((tmp_path / "losses").iterdir())) == 2
    # A damaged file is computed again, never read.
    kept[0].write_bytes(kept[0].read_bytes()[:-8])
    assert torch.equal(bench.losses(run), first)


def test_one_search_serves_several_horizons(tmp_path):
    bench = Bench(settings(tmp_path))
    task = Quadratic(dim=3)
    together = bench.tuned(Tune(task, (3, 6)))
    for horizon in (3, 6):
        alone = Bench(settings(tmp_path / "alone")).tuned(Tune(task, (horizon,)))[horizon]
        for name, tuned in alone.items():
            other = together[horizon][name]
            assert (other.learning_rate, other.setting) == (tuned.learning_rate, tuned.setting)


def test_only_what_is_shipped_comes_from_the_package(tmp_path):
    bench = Bench(settings(tmp_path, from_pretrained=True))
    assert bench.rule("lstm-mnist").spec.hidden_size == 20
    with pytest.raises(NotShippedError, match=r"no rule 'lstm-mars'.*leave out --from-pretrained"):
        bench.rule("lstm-mars")


def losses_from(final, steps=12, start=3.0):
    """Losses [steps, K] that begin at `start` and whose last ten have the given values."""
    values = torch.as_tensor(final, dtype=torch.float64)
    losses = values.repeat(steps, 1)
    losses[0] = start
    return losses


def test_a_ratio_of_means_and_its_interval():
    generator = np.random.default_rng(0)
    b = generator.uniform(0.5, 1.5, 12)
    a = 1.2 * b + generator.normal(0, 0.05, 12)
    value = ratio(losses_from(a), losses_from(b))
    quotient = a.mean() / b.mean()
    assert value.mean == pytest.approx(quotient, rel=1e-12)
    residual = (a - quotient * b).std(ddof=1) / b.mean()
    assert value.high - value.mean == pytest.approx(2.200985 * residual / math.sqrt(12), rel=1e-6)
    exact = ratio(losses_from(2 * b), losses_from(b))
    assert (exact.low, exact.high) == pytest.approx((2.0, 2.0), abs=1e-9)
    assert ratio(losses_from([1.0, math.nan]), losses_from([1.0, 1.0])).mean == math.inf


def test_the_ratios_interval_covers_its_share():
    """Of 1,000 samples with a known ratio of expectations, about 95% cover it."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        b = generator.normal(1.0, 0.2, 16)
        a = 0.8 * b + generator.normal(0, 0.1, 16)
        value = ratio(losses_from(a), losses_from(b))
        covered += value.low < 0.8 < value.high
    assert 930 <= covered <= 970


def test_leads_say_what_the_intervals_allow():
    noise = [0.0, 0.1, 0.2, 0.3]
    low, high = losses_from([1 + x for x in noise]), losses_from([2 + x for x in noise])
    near = losses_from([1.05 + x for x in noise])
    crossing = losses_from([1.3 - x for x in noise])
    assert lead(low, high) == "ahead, disjoint intervals"
    assert lead(high, low) == "behind, disjoint intervals"
    assert lead(low, near) == "ahead, paired"
    assert lead(near, low) == "behind, paired"
    assert lead(low, crossing) == "level"


def test_runs_that_diverge_are_counted():
    losses = losses_from([1.0, 4.0, 1.0, 1.0])
    losses[5, 2] = math.inf
    assert diverged(losses) == 2  # one ends above its start, one met infinity


def test_the_matrixs_cells():
    star, full = cells("star"), cells("full")
    assert len(set(full)) == len(full) == 4 * 4 * 3 * 3 * 3
    assert set(star) <= set(full)
    for activation in ("sigmoid", "relu", "tanh", "elu"):
        mnist = [c for c in star if (c.dataset, c.activation) == ("mnist", activation)]
        assert {c.width for c in mnist} == {10, 20, 40, 100}
        assert {c.depth for c in mnist} == {1, 2, 3}
        assert {c.horizon for c in mnist} == {100, 200, 1000}
        assert {c.dataset for c in star if c.activation == activation} == {"mnist", "digits", "smiles"}
    deep = next(c for c in star if c.depth == 3)
    assert deep.task.hidden_sizes == [20, 20, 20]
    assert isinstance(deep.task, MNISTMLP)


def test_every_recipe_is_a_preset_and_options_that_fit_knows():
    from l2l_lightning.cli import presets
    from l2l_lightning.cli.lightning_cli import MetaLearningCLI

    assert {recipe.preset for recipe in RECIPES.values()} <= set(presets())
    assert len({ablation.name for ablation in ABLATIONS}) == len(ABLATIONS) == 16
    for name in ("lstm-mnist-relu", ABLATIONS[0].name, ABLATIONS[-1].name):
        recipe = RECIPES[name]
        cli = MetaLearningCLI.build([f"--config={presets()[recipe.preset]}", *recipe.arguments], run=False)
        if name == ABLATIONS[0].name:
            rule = cli.model.rule
            assert (rule.spec.preprocessing, rule.gradient_scale, rule.spec.output_scale) == (
                "identity",
                1,
                0.1,
            )
            assert cli.model.unrolls == [20]
    assert snapshot_of("lstm-mnist-relu-10") == ("lstm-mnist-relu", 10)
    assert snapshot_of("lstm-mnist-relu-11") is None


def test_the_time_left_goes_by_what_work_has_taken():
    countdown = Countdown(1000.0)
    assert countdown.left(0.0) == "about 17 min left"
    countdown.done, countdown.taken = 400.0, 830.0  # half as fast as was estimated
    assert countdown.left(400.0) == "about 20 min left"
    assert countdown.left(1000.0) == "under a minute left"


def test_the_time_left_counts_every_request(tmp_path):
    bench = Bench(settings(tmp_path))
    for experiment in EXPERIMENTS.values():
        requests = experiment().requests(bench)
        assert all(bench.seconds(request) > 0 for request in requests)
        assert any(isinstance(request, Train) for request in requests)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quadratic", "--num-optimizees=1"], ["--num-optimizees must be at least 2"]),
        (["mnist", "--data-root=/no/such/folder"], ["/no/such/folder", "--data.root"]),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["reproduce", *arguments, f"--out={tmp_path}", "--quick"])
    assert error.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert all(word in printed for word in words)


def test_an_unknown_experiment_lists_those_there_are(capfd):
    with pytest.raises(SystemExit) as error:
        main(["reproduce", "figure-8"])
    assert error.value.code == 2
    printed = capfd.readouterr().err
    assert all(name in printed for name in EXPERIMENTS)


def test_smiles_are_measured_where_there_is_a_copy(tmp_path):
    generalise = EXPERIMENTS["generalise"]()
    without = Bench(settings(tmp_path, matrix="star"))
    assert generalise.data(without) == {"mnist", "digits"}
    assert not any("smiles" in str(request) for request in generalise.requests(without))
    bench = Bench(settings(tmp_path, smiles_root=str(tmp_path)))
    assert generalise.data(bench) == {"mnist", "digits", "smiles"}
    tasks = [request.task for request in generalise.requests(bench) if isinstance(request, Run)]
    assert "smiles" in {task.dataset for task in tasks}
