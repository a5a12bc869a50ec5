"""`reproduce`: what it writes is what was measured, and an interruption changes nothing."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import torch

from l2l_lightning import pretrained
from l2l_lightning.cli import main
from l2l_lightning.comparison.baselines import BASELINES
from l2l_lightning.comparison.statistics import final_loss
from l2l_lightning.configs import presets
from l2l_lightning.errors import ReproductionError, WeightsError
from l2l_lightning.reproduce import result_store
from l2l_lightning.reproduce.command import EXPERIMENTS, reproduce
from l2l_lightning.reproduce.curves import Panel, Row, panel_outcome
from l2l_lightning.reproduce.generalise import GENERALISE, cells
from l2l_lightning.reproduce.recipes import ABLATIONS, RECIPES, SNAPSHOTS
from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.reproduce.training import meta_train
from l2l_lightning.tasks import MNISTMLP, Quadratic
from l2l_lightning.training.presets import make_learner, preset_values

SMALL = {
    "data": {"num_rollouts": 4},
    "model": {"horizon": 6, "unroll": 2, "num_tasks": 2, "num_validation_optimizees": 2},
    "trainer": {"val_check_interval": 3},
}


def settings(folder, **arguments):
    return Settings(out=str(folder), quick=True, num_tuning_optimizees=1, **arguments)


def equal_rules(ours, theirs):
    return all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


@pytest.fixture(scope="module")
def quadratic(tmp_path_factory):
    """A finished quick reproduction of the quadratics."""
    folder = tmp_path_factory.mktemp("reproduction")
    reproduce(["quadratic"], settings(folder))
    return folder


def test_an_experiment_leaves_numbers_pictures_and_a_report(quadratic):
    folder = quadratic / "quadratic"
    document = json.loads((folder / "results.json").read_text())
    assert (document["seed"], document["quick"]) == (0, True)
    assert {"commit", "device", "versions", "data", "seconds"} <= set(document)
    assert (folder / "paper_quadratic.png").read_bytes()[1:4] == b"PNG"
    report = (quadratic / "REPORT.md").read_text()
    assert "A quick run" in report
    assert "## Methods" in report
    for finding in document["findings"]:
        assert f"| {finding['ours']} | {finding['verdict']} |" in report
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for panel, results in document["results"].items():
        for name, numbers in results["optimizers"].items():
            losses = np.array(
                [float(row["loss"]) for row in rows if (row["panel"], row["optimizer"]) == (panel, name)]
            ).reshape(numbers["num_optimizees"], results["horizon"])
            assert numbers["final_loss"]["mean"] == pytest.approx(losses[:, -10:].mean(), rel=1e-6)
            assert numbers["sum_loss"]["mean"] == pytest.approx(losses.sum(1).mean(), rel=1e-6)


def test_what_is_done_is_not_done_again(quadratic, monkeypatch, capsys):
    monkeypatch.setattr(ResultStore, "losses", lambda *_: pytest.fail("something was computed again"))
    reproduce(["quadratic"], settings(quadratic))
    assert "quadratic: done before" in capsys.readouterr().out


def test_an_interrupted_reproduction_goes_on_where_it_was(quadratic, tmp_path, monkeypatch, capsys):
    """Stopped among the curves: what was trained, tuned and run is found, and the numbers are the same."""
    runs = []
    original = result_store.run_baseline

    def interrupted(*arguments, **options):
        runs.append(arguments)
        if len(runs) == 5:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(result_store, "run_baseline", interrupted)
    arguments = ["reproduce", "quadratic", "--quick", "--num-tuning-optimizees=1", f"--out={tmp_path}"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert capsys.readouterr().err == "error: interrupted: the same command goes on from here\n"
    assert not (tmp_path / "quadratic/results.json").exists()
    (trained,) = (tmp_path / "rules").glob("lstm-study-quadratic-*/rule.safetensors")
    when = trained.stat().st_mtime_ns
    main(arguments)
    assert trained.stat().st_mtime_ns == when
    assert len(runs) == 1 + 2 * len(BASELINES)  # the one that was interrupted, and everyone once
    ours, theirs = ((f / "quadratic/results.csv").read_text() for f in (tmp_path, quadratic))
    assert ours == theirs


def test_a_folder_is_not_shared_by_different_settings(quadratic):
    with pytest.raises(ReproductionError, match="seed 0, not 1: name another folder with --out"):
        reproduce(["quadratic"], settings(quadratic, seed=1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_meta_training_that_was_stopped_gives_the_same_rule(number, tmp_path):
    def train(name, report):
        folder = tmp_path / name
        return meta_train("quadratic", folder, seed=0, report=report, options=SMALL, snapshots=[3])

    def stop(text):
        if text.startswith("meta-step 7 "):
            os.kill(os.getpid(), number)

    whole = train("whole", print)
    with pytest.raises(KeyboardInterrupt):
        train("cut", stop)
    assert not (tmp_path / "cut/rule.safetensors").exists()
    steps = []
    assert equal_rules(train("cut", steps.append), whole)
    assert steps[0].startswith("meta-step 8 of 12")
    assert equal_rules(
        *(pretrained.load(tmp_path / f"{name}/after-3.safetensors") for name in ("whole", "cut"))
    )
    record = json.loads((tmp_path / "cut/training.json").read_text())
    assert record["meta_steps"] == 12
    assert record["seconds"] > 0
    assert equal_rules(train("cut", lambda text: pytest.fail("trained again")), whole)


def test_a_presets_training_is_the_command_lines(tiny_fit, tmp_path):
    """The same φ, bit for bit, from the objects as from `fit` with the same options."""
    folder = tiny_fit("--config=mnist")
    options = {
        "data": {"num_rollouts": 2},
        "model": {"horizon": 6, "unroll": 3, "num_tasks": 2, "num_validation_optimizees": 2},
        "trainer": {"val_check_interval": 2, "accelerator": "cpu"},
    }
    meta_train("mnist", tmp_path / "ours", seed=0, report=print, options=options)
    paths = [next(path.rglob("best-*.ckpt")) for path in (folder, tmp_path / "ours")]
    theirs, ours = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert paths[0].name == paths[1].name
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_a_baseline_that_diverges_is_neither_the_best_nor_level(tmp_path):
    """Of sgd one optimizee is not finite; adam is ahead of the rule or behind it."""
    panels = {"x": Panel("x²", Quadratic(dim=3), {"learned": "lstm-quadratic"}, baselines=("sgd", "adam"))}
    store = ResultStore(settings(tmp_path, from_pretrained=True))
    (tmp_path / "x").mkdir()
    noise = 0.01 * torch.rand(100, 4, generator=torch.Generator().manual_seed(0)).sort(0, descending=True)[0]
    sgd = torch.where(torch.arange(4) == 1, torch.nan, 0.5 + noise)
    apart = "; sgd, whose final loss is not finite, diverged on 1 of 4."
    for adam, said in (
        (2.0, f"Reproduced: ahead of every tuned baseline, 95% intervals disjoint{apart}"),
        (0.1, f"Not reproduced: not ahead of adam (best: adam, {final_loss(0.1 + noise)}){apart}"),
    ):
        losses = {("x", "learned"): 1 + noise, ("x", "sgd"): sgd, ("x", "adam"): adam + noise}
        outcome = panel_outcome(panels, [Row("x", "x² @100")], "", store, losses, tmp_path)
        assert outcome.findings[0].verdict == said
        rows = [line.strip("| ").split(" | ") for line in outcome.tables[0].splitlines()[4:]]
        order = ["**learned**", "adam", "sgd"] if adam > 1 else ["adam", "**learned**", "sgd"]
        assert [row[0] for row in rows] == order
        assert rows[-1][1] == "not finite"
        assert rows[-1][-1] == "–"
    diverged = {("x", "learned"): 1 + noise, ("x", "sgd"): sgd, ("x", "adam"): sgd}
    (finding,) = panel_outcome(panels, [Row("x", "x² @100")], "", store, diverged, tmp_path).findings
    assert finding.verdict.startswith(
        "Not reproduced: not ahead of sgd, adam (best: sgd, not finite); sgd, whose"
    )


def test_losses_are_kept_by_what_determines_them(tmp_path):
    store = ResultStore(settings(tmp_path))
    request = Request(Quadratic(dim=3), "sgd", 4, 2, tuning="default")
    first = store.losses(request)
    assert torch.equal(store.losses(request), first)
    kept = list((tmp_path / "losses").iterdir())
    assert len(kept) == 1
    store.losses(Request(Quadratic(dim=3), "sgd", 4, 3, tuning="default"))
    assert len(list((tmp_path / "losses").iterdir())) == 2
    # A damaged file is computed again, never read.
    kept[0].write_bytes(kept[0].read_bytes()[:-8])
    assert torch.equal(store.losses(request), first)


def test_only_what_is_shipped_comes_from_the_package(tmp_path, monkeypatch):
    store = ResultStore(settings(tmp_path, from_pretrained=True))
    assert store.rule("lstm-mnist").spec.hidden_size == 20
    with pytest.raises(WeightsError, match=r"no rule 'lstm-mars'.*leave out --from-pretrained"):
        store.rule("lstm-mars")
    monkeypatch.setattr(result_store, "tune", lambda *_, **__: pytest.fail("searched"))
    assert store.tuned(MNISTMLP(), (100,))[100].keys() == set(BASELINES)


def test_the_matrixs_cells():
    star, full = cells("star"), cells("full")
    assert len(set(full)) == len(full) == 4 * 4 * 3 * 3 * 3
    assert set(star) <= set(full)
    for activation in ("sigmoid", "relu", "tanh", "elu"):
        axes = zip(*(c for c in star if c.activation == activation), strict=True)
        datasets, _, widths, depths, horizons = map(set, axes)
        assert datasets == {"mnist", "digits", "smiles"}
        assert (widths, depths, horizons) == ({10, 20, 40, 100}, {1, 2, 3}, {100, 200, 1000})
    deep = next(c for c in star if c.depth == 3)
    assert deep.task.hidden_sizes == [20, 20, 20]
    assert isinstance(deep.task, MNISTMLP)


@pytest.mark.parametrize("smiles", [set(), {"smiles"}])
def test_smiles_are_measured_where_there_is_a_copy(tmp_path, smiles):
    store = ResultStore(Settings(smiles_root=str(tmp_path) if smiles else None))
    requests = GENERALISE.requests(store).values()
    assert {request.task.dataset for request in requests} == {"mnist", "digits"} | smiles


def test_every_recipe_is_a_preset_with_options_that_a_learner_knows():
    assert {recipe.preset for recipe in RECIPES.values()} <= set(presets())
    assert len({ablation.name for ablation in ABLATIONS}) == len(ABLATIONS) == 16
    store = ResultStore(Settings())
    requests = [request for e in EXPERIMENTS.values() for request in e.requests(store).values()]
    asked = {request.optimizer for request in requests}
    # What others start from is asked for by their recipes; CIFAR-10's rules, where there is a copy of it.
    unasked = {"lstm-mnist-activations"}
    unasked |= {"lstm-cifar10", "lstm-cifar10-sub", "lstm-cifar10-deepmind"}
    assert {*RECIPES, *SNAPSHOTS, *BASELINES} - asked == unasked
    assert asked - {*RECIPES, *SNAPSHOTS, *BASELINES} == {"zero-shot"}  # the package's, always
    for name, recipe in RECIPES.items():
        start = {"start_from": None} if recipe.start else {}
        values = preset_values(recipe.preset, recipe.options)["model"] | start
        model = make_learner(values, seed=0)
        if name == ABLATIONS[0].name:
            rule = model.rule
            assert (rule.spec.preprocessing, rule.gradient_scale) == ("identity", 1)
            assert (rule.spec.output_scale, model.unrolls) == (0.1, [20])
