"""The command line as a user meets it: presets, run folders, checkpoints, one clear message per mistake."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import TINY
from l2l_kernels.cpu import library

from l2l_lightning.cli import main, presets
from l2l_lightning.cli.arguments import COMMANDS, LIGHTNING_COMMANDS, prepare
from l2l_lightning.cli.help import TEXTS
from l2l_lightning.cli.run_name import run_name

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
    # Of CIFAR's preset another data set is typed here, which the run's name says.
    assert folder.parent.name == {"cifar": "cifar-colourdigits"}.get(preset, preset)

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
    assert again.parent.name == first.parent.name
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


def helped(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_every_command_is_a_line_of_the_help(capsys):
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"  {command} "))
        assert len(line) <= 80


@pytest.mark.parametrize("command", LIGHTNING_COMMANDS)
def test_a_commands_help_is_a_line_for_each_option_of_the_projects_first(command, capsys):
    lines = helped(capsys, command, "--help").splitlines()
    assert lines[0] == f"usage: python -m l2l_lightning {command} [options]"
    assert all(len(line) <= 80 for line in lines)
    options = [line for line in lines if line.startswith("  -")]
    assert all(re.search(r"\S  +\S", line) for line in options)  # with what it means on the same line
    named = [line.split()[0].strip(",") for line in options]
    assert named.index("--model.horizon") < named.index("--trainer.max_steps")
    assert "--trainer.detect_anomaly" not in named
    assert set(presets()) <= set(re.findall(r"\w+", " ".join(lines[:6])))


def test_every_option_of_the_projects_has_a_line_in_the_help(capsys):
    """And --help-all lists what --help does, and Lightning's, which --help leaves out."""
    whole = helped(capsys, "fit", "--help-all")
    options = set(re.findall(r"^  (?:-\w[^-]*, )?--([\w.-]+)", whole, flags=re.MULTILINE))
    ours = {
        name for name in options if re.match(r"(model|data|comparison|latest|averaging|collapse)\.", name)
    }
    ours |= {
        name for name in options if re.match(r"wandb|run_folder|trust|ckpt|config|seed|quick|print", name)
    }
    assert len(ours) > 50
    assert ours <= TEXTS.keys()
    shown = set(re.findall(r"--([\w.-]+) ", helped(capsys, "fit", "--help")))
    assert ours <= shown <= options
    assert "trainer.detect_anomaly" in options - shown


def test_print_config_is_a_configuration_that_a_first_look_shortens(capsys):
    whole = yaml.safe_load(helped(capsys, "fit", "--config=mnist", "--print_config"))
    typed = ["--comparison.num_optimizees=9", "--quick", "--config=mnist"]
    quick = yaml.safe_load(helped(capsys, "fit", *typed, "--print_config").split("little.\n")[1])
    assert quick["model"]["task"] == whole["model"]["task"]
    assert (quick["data"]["num_rollouts"], whole["data"]["num_rollouts"]) == (10, 2000)
    assert quick["comparison"]["baselines"] == ["sgd", "adam"]
    assert quick["comparison"]["num_optimizees"] == 9  # what is typed holds, wherever it stands
    assert "quick" not in quick


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "quadratic"),
        (["--config", "mnist_relu"], "mnist_relu"),
        (["--config=mnist", "--model.rule=RNNprop"], "mnist-rnnprop"),
        (["--config=mnist", "--model.rule", '{"class_path": "my_rules.Momentum"}'], "mnist-momentum"),
        (["--model.task", "FunctionTask", "--model.task.f=my_problem.rosenbrock"], "rosenbrock"),
        (["--model.task.dim=4"], "quadratic"),
        (["--config=mnist", "--model.task=ImageMLP", "--model.task.dataset=digits"], "mnist-digits"),
        (["--quick"], "quadratic"),
    ],
)
def test_a_runs_name_says_what_it_runs(arguments, name):
    assert prepare(["fit", *arguments])[1] == name


def test_a_run_from_a_runs_own_files_has_its_name(tmp_path):
    folder = tmp_path / "mnist-rnnprop" / "20300131-120000-1"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("data: {num_rollouts: 2}", encoding="utf-8")
    assert prepare(["fit", f"--config={folder / 'config.yaml'}"])[1] == "mnist-rnnprop"
    assert run_name(str(folder / "checkpoints" / "best-20.ckpt"), {}) == "mnist-rnnprop"


def test_a_reader_that_has_had_enough_ends_the_program_in_silence(tmp_path):
    """`info | head -1`."""
    command = [sys.executable, "-m", "l2l_lightning", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as program:
        program.stdout.close()
        said = program.stderr.read().decode()
    assert program.returncode == 141
    assert "Broken pipe" not in said
    assert "error:" not in said


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
