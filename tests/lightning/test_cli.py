"""The command line as a user meets it: presets, run folders, checkpoints, one clear message per mistake."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import TINY
from l2l_kernels.cpu import library

from l2l_lightning.cli import main, presets

TINY_TASKS = {
    # Presets whose optimizees are large are run on small ones.
    "mnist": ["--model.task.batch_size=4"],
    "mnist_relu": ["--model.task.batch_size=4"],
    "deepmind_code_mnist": ["--model.task.batch_size=4"],
    "cifar": ["--model.task.dataset=colour-digits", "--model.task.shrink=8", "--model.task.batch_size=4"],
    "colour_digits": ["--model.task.shrink=8", "--model.task.batch_size=4"],
    "zero_shot": ["--model.task.families=[linear]"],
    "corrected_direction": ["--model.task.families=[linear]"],
    "corrected_step_size": ["--model.task.families=[linear]"],
}


def load(checkpoint):
    return torch.load(checkpoint, weights_only=True)


SLOW = ("mnist_mixture", "mnist_activations", "cifar", "colour_digits", "deepmind_code_mnist", "mnist_tanh")


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in presets()]
)
def test_every_preset_runs_to_its_comparison(preset, tiny_fit, capsys):
    folder = tiny_fit(f"--config={preset}", *TINY_TASKS.get(preset, []))
    printed = capsys.readouterr().out
    assert "learned" in printed
    assert "Data: " in printed
    assert folder.parent.name == preset

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["horizon"] == 6
    members = sorted(folder.glob("member-*"))
    assert bool(members) == (preset in ("mnist_activations", "mnist_mixture"))
    folder = members[0] if members else folder
    rows = list(csv.DictReader((folder / "curves.csv").open()))
    assert list(rows[0]) == ["task", "optimizer", "seed", "step", "loss"]
    assert {row["optimizer"] for row in rows} == {"learned", "sgd", "adam"}
    assert len(rows) == 3 * 3 * 6
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["horizon"] == 6
    assert summary["num_optimizees"] == 3
    assert summary["data_source"]
    assert summary["commit"]
    learned = summary["optimizers"]["learned"]
    finals = [float(row["loss"]) for row in rows if row["optimizer"] == "learned"]
    assert learned["final_loss"]["mean"] == pytest.approx(sum(finals) / len(finals), rel=1e-5)
    low, high = learned["final_loss"]["ci95"]
    assert low <= learned["final_loss"]["mean"] <= high
    assert learned["sum_loss"]["mean"] == pytest.approx(sum(finals) / 3, rel=1e-5)
    assert learned["learning_rate"] is None
    assert summary["optimizers"]["adam"]["learning_rate"] > 0


def test_a_runs_own_config_repeats_it(tiny_fit):
    first = tiny_fit("--seed_everything=5", "--model.task.dim=4")
    again = tiny_fit(f"--config={first / 'config.yaml'}")
    assert again.parent.name == "config"
    assert (first / "curves.csv").read_text() == (again / "curves.csv").read_text()


def test_two_runs_with_one_seed_give_the_same_curves_and_another_seed_others(tiny_fit):
    first, second, other = tiny_fit(), tiny_fit(), tiny_fit("--seed_everything=1")
    assert first != second
    assert first.parent.name == "quadratic"  # without a --config
    assert (first / "curves.csv").read_text() == (second / "curves.csv").read_text()
    assert (first / "curves.csv").read_text() != (other / "curves.csv").read_text()
    weights = [load(folder / "checkpoints/last.ckpt")["state_dict"] for folder in (first, second)]
    for a, b in zip(weights[0].values(), weights[1].values(), strict=True):
        assert torch.equal(a, b)


def test_validate_test_and_compare_take_everything_from_the_checkpoint(tiny_fit, tmp_path, capsys):
    folder = tiny_fit("--model.task.dim=7")
    checkpoint = f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"
    runs = [f"--trainer.default_root_dir={tmp_path / 'elsewhere'}", "--trainer.accelerator=cpu"]
    capsys.readouterr()
    main(["validate", checkpoint, *runs])
    assert "val/final_loss" in capsys.readouterr().out
    main(["test", checkpoint, *runs])
    assert "test/final_loss" in capsys.readouterr().out
    out = tmp_path / "compared"
    comparison = [argument for argument in TINY if argument.startswith("--comparison")]
    main(["compare", checkpoint, f"--out={out}", *comparison, *runs])
    ours, theirs = (json.loads((where / "summary.json").read_text())["optimizers"] for where in (out, folder))
    assert ours["learned"]["final_loss"] == theirs["learned"]["final_loss"]
    main(["compare", checkpoint, "--model.task=NoisyScaledSquare", f"--out={out}", *comparison, *runs])
    assert "NoisyScaledSquare" in json.loads((out / "summary.json").read_text())["task"]


def test_tune_prints_every_baseline(tmp_path, capsys):
    few = ["--comparison.num_tuning_optimizees=2", "--comparison.baselines=[sgd,rmsprop]"]
    root = f"--trainer.default_root_dir={tmp_path}"
    main(["tune", "--model.horizon=5", "--model.unroll=5", root, *few])
    printed = capsys.readouterr().out
    assert "sgd" in printed
    assert "rmsprop" in printed
    assert len(list((tmp_path / "tuning").glob("*.json"))) == 2


def test_info_names_backends_and_presets(capsys):
    main(["info"])
    printed = capsys.readouterr().out
    for word in ("cpu", "triton", "reference", "quadratic", "torch", f"CPU kernels: {library.describe()}"):
        assert word in printed


def test_the_module_runs_as_a_program(tmp_path):
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "l2l_lightning", "fit", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0
    assert "--model.num_tasks" in done.stdout
