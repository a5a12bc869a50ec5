"""What a run's loggers get, where they write, and runs that W&B's agent starts."""

import os
import random
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from logged_files import tensorboard_values, wandb_run
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from l2l_lightning import CoordinatewiseLSTM, MetaData, MetaLearner, Quadratic
from l2l_lightning.cli import MetaLearningCLI, main
from l2l_lightning.cli.arguments import prepare
from l2l_lightning.cli.loggers import run_loggers
from l2l_lightning.comparison.loggers import log_comparison
from l2l_lightning.comparison.result import Comparison, Result
from l2l_lightning.errors import CommandLineError
from l2l_lightning.training.metrics_log import MetricsLog
from l2l_lightning.training.run_settings import log_settings, run_settings

SWEEP = yaml.safe_load((Path(__file__).parents[2] / "docs/examples/sweep.yaml").read_text(encoding="utf-8"))
VARIABLES = (
    "MODE",
    "DISABLED",
    "PROJECT",
    "ENTITY",
    "RUN_GROUP",
    "NAME",
    "TAGS",
    "RUN_ID",
    "SWEEP_ID",
    "CONSOLE",
)


@pytest.fixture(autouse=True)
def no_variables_of_the_users(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that what a test leaves is taken back
        monkeypatch.delenv(f"WANDB_{name}")


def test_every_logger_gets_the_hyperparameters_and_the_comparison(tiny_fit, capsys):
    """And W&B writes no progress bars, and warns of nothing."""
    options = ["--wandb_project=my-project", "--wandb_tags=[quick,two words]", "--wandb_group=g"]
    folder = tiny_fit(
        "--model.learning_rate=0.01", "--trainer.logger=TensorBoardLogger", *options, wandb="offline"
    )
    printed = capsys.readouterr()
    assert "WARNING" not in printed.err + printed.out

    run, config, summary, history = wandb_run(folder)
    assert (run.project, run.run_group) == ("my-project", "g")
    assert sorted(run.tags) == ["quick", "two words"]
    assert run.display_name == f"quadratic/{folder.name}"
    expected = {
        **{"seed_everything": 0, "model.learning_rate": 0.01, "model.horizon": 6, "data.num_rollouts": 2},
        **{"model.task": "l2l_lightning.tasks.Quadratic", "model.task.dim": 10, "averaging.decay": 0.99},
        **{"trainer.gradient_clip_val": 1.0, "comparison.baselines": ["sgd", "adam"]},
        **{"versions.torch": torch.__version__.partition("+")[0], "data_source": "none (synthetic task)"},
    }
    assert {name: config[name] for name in expected} == expected
    assert not [name for name in config if "logger" in name or name.startswith("wandb")]
    assert SWEEP["metric"]["name"] in history
    assert not list(folder.glob("wandb/*/files/output.log"))
    for kind in ("table", "curves*_table"):
        assert list(folder.glob(f"wandb/*/files/media/table/comparison/{kind}_*.json"))
    assert list(folder.glob("wandb/*/files/media/images/comparison/figure_*.png"))

    kept = yaml.safe_load((folder / "summary.json").read_text(encoding="utf-8"))
    assert kept["settings"]["model"]["learning_rate"] == 0.01
    assert kept["settings"]["averaging"]["decay"] == 0.99
    values = tensorboard_values(folder / "tensorboard")
    for name in ("learned", "sgd", "adam"):
        loss = kept["optimizers"][name]["final_loss"]["mean"]
        assert summary[f"comparison/{name}/final_loss"] == pytest.approx(loss)
        assert values[f"comparison/{name}/final_loss"][-1].simple_value == pytest.approx(loss)
    difference = kept["optimizers"]["adam"]["reference_minus_it"]["final_loss"]["mean"]
    assert summary["comparison/adam/learned_minus_it/final_loss"] == pytest.approx(difference)
    assert values["comparison/adam/learned_minus_it/final_loss"][-1].simple_value == pytest.approx(difference)
    assert values["hp_metric"][-1].simple_value == pytest.approx(
        kept["optimizers"]["learned"]["final_loss"]["mean"]
    )
    assert values["comparison/curves"][-1].image.encoded_image_string.startswith(b"\x89PNG")
    assert "val/sum_loss" in values
    written = yaml.safe_load((folder / "tensorboard/hparams.yaml").read_text(encoding="utf-8"))
    assert written["model.learning_rate"] == 0.01

    # All in the run's folder, and the checkpoints in one place.
    assert {path.name for path in folder.rglob("*.ckpt")} == {"last.ckpt", "best-4.ckpt"}
    assert {path.parent for path in folder.rglob("*.ckpt")} == {folder / "checkpoints"}
    assert "val/sum_loss" in (folder / "metrics.csv").read_text(encoding="utf-8")
    assert not (folder / "hparams.yaml").exists()


@pytest.mark.slow
def test_a_run_with_a_logger_of_the_users_goes_on(tiny_fit, fails, tmp_path):
    folder = tiny_fit("--trainer.max_steps=2", "--trainer.logger=TensorBoardLogger")
    before = len(tensorboard_values(folder / "tensorboard")["val/sum_loss"])
    arguments = ["fit", f"--run_folder={folder}", *TINY, "--wandb=off", "--trainer.max_steps=-1"]
    assert "--trust lightning.pytorch.loggers" in fails(*arguments)
    main([*arguments, "--data.num_rollouts=3", "--trust=lightning.pytorch.loggers"])
    assert len(tensorboard_values(folder / "tensorboard")["val/sum_loss"]) > before


def built(*arguments):
    """What a command line describes, without running it."""
    prepared, _ = prepare(["fit", *arguments])
    return MetaLearningCLI.build(prepared[1:], run=False)


def test_loggers_of_the_users_are_added_and_write_into_the_runs_folder(tmp_path):
    root = f"--trainer.default_root_dir={tmp_path}"
    apart = tmp_path / "apart"
    specs = [
        "{class_path: TensorBoardLogger}",
        f"{{class_path: CSVLogger, init_args: {{save_dir: {apart}, name: x}}}}",
    ]
    loggers = built(root, f"--trainer.logger=[{', '.join(specs)}]").trainer.loggers
    assert [type(logger).__name__ for logger in loggers] == ["MetricsLog", "TensorBoardLogger", "CSVLogger"]
    assert Path(loggers[1].log_dir) == tmp_path / "tensorboard"
    assert Path(loggers[2].log_dir) == apart / "x/csv"
    relative = built(root, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=here").trainer.loggers
    assert Path(relative[1].log_dir) == tmp_path / "here/csv"
    assert built(root, "--trainer.logger=false").trainer.loggers == []


def options(**given):
    names = ("wandb", *(f"wandb_{name}" for name in ("project", "entity", "group", "name", "tags")))
    return Namespace(**dict.fromkeys(names) | given)


def wandb_arguments(folder, **given):
    _, logger = run_loggers(folder, "mnist", options(wandb="offline", **given), [])
    arguments = logger._wandb_init
    return {name: arguments.get(name) for name in ("project", "entity", "group", "name", "tags", "id", "dir")}


def test_wandb_is_told_what_the_options_say_and_else_what_its_variables_say(tmp_path, monkeypatch):
    default = wandb_arguments(tmp_path)
    assert len(default.pop("id")) == 12
    assert default == {
        **{"project": "l2l-lightning", "entity": None, "group": "mnist", "name": f"mnist/{tmp_path.name}"},
        **{"tags": None, "dir": str(tmp_path)},
    }
    for name in ("PROJECT", "ENTITY", "RUN_GROUP", "NAME", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", name)
    by_variables = wandb_arguments(tmp_path)
    # None leaves it to wandb, which reads the variable itself.
    assert [by_variables[name] for name in ("project", "entity", "group", "name", "id")] == [None] * 5
    given = {"project": "p", "entity": "e", "group": "g", "name": "n"}
    both = wandb_arguments(
        tmp_path, **{f"wandb_{name}": value for name, value in given.items()}, wandb_tags="a, b"
    )
    assert {name: both[name] for name in given} == given
    assert both["tags"] == ["a", "b"]
    for tags in (",", ["x" * 65]):
        with pytest.raises(CommandLineError, match="--wandb_tags: a tag has 1 to 64 characters"):
            wandb_arguments(tmp_path, wandb_tags=tags)
    (tmp_path / "wandb-id.txt").write_text("kept")
    assert wandb_arguments(tmp_path)["id"] == "kept"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")  # whose project, entity and run they are
    in_a_sweep = wandb_arguments(tmp_path)
    assert (in_a_sweep["project"], in_a_sweep["entity"], in_a_sweep["id"]) == (None, None, None)


@pytest.mark.parametrize(
    ("variables", "offline"),
    [
        ({}, True),
        ({"SWEEP_ID": "s"}, False),
        ({"SWEEP_ID": "s", "MODE": "offline"}, True),
        ({"MODE": "online"}, False),
    ],
)
def test_a_run_of_a_sweep_is_online(variables, offline, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    _, logger = run_loggers(tmp_path, "mnist", options(), [])
    assert logger._offline is offline


def test_a_users_own_wandb_logger_takes_the_place_of_ours(tmp_path, monkeypatch):
    own = WandbLogger(project="mine", offline=True)
    assert run_loggers(tmp_path, "mnist", options(), [own])[1:] == [own]
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(CommandLineError, match="needs the package wandb"):
        run_loggers(tmp_path, "mnist", options(wandb="online"), [])


def sweep_command(values):
    """The command line that W&B's own agent makes of a sweep's choice."""
    variables = create_sweep_command_args(
        {"args": {name: {"value": value} for name, value in values.items()}}
    )
    variables |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [SWEEP["program"]]}
    parts = (
        variables.get(part[2:-1], [part]) if part.startswith("${") else [part] for part in SWEEP["command"]
    )
    return [word for part in parts for word in part]


@pytest.mark.parametrize("seed", range(2))
def test_the_commands_of_the_documented_sweep_are_taken(seed, tmp_path):
    """Wherever the preset stands among them: it is what the others are put over."""
    draw, values = random.Random(seed), {}
    for name, how in SWEEP["parameters"].items():
        values[name] = (
            draw.choice(how["values"]) if "values" in how else draw.choice([how["min"], how["max"], 3.1e-05])
        )
    names = draw.sample(sorted(values), len(values))
    if seed:
        names = [*(name for name in names if name != "config"), "config"]
    command = sweep_command({name: values[name] for name in names})
    assert command[:5] == ["/usr/bin/env", "python", "-m", "l2l_lightning", "fit"]
    run = built(*command[5:], f"--trainer.default_root_dir={tmp_path}", "--model.horizon=[100, 200]")
    assert run.model.task.activation == values["config"].removeprefix("mnist_")
    assert run.model.learning_rate == values["model.learning_rate"]
    assert run.model.unrolls == [values["model.unroll"]]
    assert run.model.seed == values["seed_everything"]
    assert run.model.horizons == [100, 200]
    assert run.config["averaging"]["decay"] == values["averaging.decay"]


class Recorder(DummyLogger):
    """A logger that keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.told = {}

    def log_hyperparams(self, params):
        self.told |= params

    def log_metrics(self, metrics, step=None):
        self.told |= metrics


def test_any_logger_gets_numbers_and_metrics_csv_none():
    losses = {name: torch.rand(4, 3, dtype=torch.float64) for name in ("learned", "adam")}
    results = {name: Result(value, 0.1, None) for name, value in losses.items()}
    comparison = Comparison("task", 4, 3, "none", 0, "cpu", "float32", results)
    recorder = Recorder()
    log_comparison(
        [MetricsLog("nowhere"), CSVLogger("nowhere"), recorder], comparison, 7, "comparison/member-2"
    )
    assert recorder.told == {
        **{
            f"comparison/member-2/{name}/final_loss": pytest.approx(v.mean().item())
            for name, v in losses.items()
        },
        **{
            f"comparison/member-2/{name}/sum_loss": pytest.approx(v.sum(0).mean().item())
            for name, v in losses.items()
        },
        **{
            f"comparison/member-2/adam/learned_minus_it/{measure}": pytest.approx(value.item())
            for measure, value in {
                "final_loss": (losses["learned"] - losses["adam"]).mean(),
                "sum_loss": (losses["learned"] - losses["adam"]).sum(0).mean(),
            }.items()
        },
    }
    assert not os.path.exists("nowhere")


def test_without_a_command_line_the_settings_are_the_learners():
    model, data, recorder = (
        MetaLearner(Quadratic(dim=3), CoordinatewiseLSTM()),
        MetaData(num_rollouts=7),
        Recorder(),
    )
    log_settings([recorder], model, data, {})
    assert recorder.told["model.task.dim"] == 3
    assert recorder.told["data.num_rollouts"] == 7
    assert recorder.told["model.learning_rate"] == model.learning_rate
    assert recorder.told["seed_everything"] == model.seed
    assert run_settings(model, data, {"comparison": {"horizon": None}})["comparison"] == {"horizon": None}
