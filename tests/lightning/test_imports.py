"""What each part imports: rules, tasks and rollouts no Lightning; wandb and jsonargparse where asked for."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import l2l_lightning
from l2l_lightning.errors import L2LError
from l2l_lightning.extras import needed_by
from l2l_lightning.reproduce import command
from l2l_lightning.reproduce.settings import EXPERIMENT_NAMES

ROOT = Path(__file__).parents[2]


def python(code, *blocked, cwd=None):
    """Runs code in a fresh interpreter in which some packages cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        check=False,
        env={**os.environ, "L2L_KERNELS_BACKEND": "reference"},
    )


def assert_runs(code, *blocked, cwd=None):
    done = python(code, *blocked, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_can_be_imported_and_is_seen_by_type_checkers():
    for name in l2l_lightning.__all__:
        assert getattr(l2l_lightning, name).__name__ == name
    assert set(l2l_lightning.__all__) <= set(dir(l2l_lightning))
    with pytest.raises(AttributeError, match="'l2l_lightning' has no attribute 'Nothing'"):
        l2l_lightning.Nothing  # noqa: B018
    (seen,) = (
        node
        for node in ast.parse(inspect.getsource(l2l_lightning)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    visible = {
        (node.module.removeprefix("l2l_lightning."), name.name) for node in seen.body for name in node.names
    }
    lazy = {(module, name) for module, names in l2l_lightning._MODULES.items() for name in names}
    assert visible == lazy
    assert {name for _, name in lazy} == set(l2l_lightning.__all__)


def not_of_the_core():
    """The modules of all packages here that a plain installation, without extras, would not bring."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        rest = [Requirement(line).name for line in tomllib.load(file)["project"]["dependencies"]]
    core = set()
    while rest:
        name = canonicalize_name(rest.pop())
        if name not in core:
            core.add(name)
            needs = map(Requirement, metadata.requires(name) or ())
            rest += [one.name for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [
        module
        for module, packages in metadata.packages_distributions().items()
        if not core & set(map(canonicalize_name, packages)) and not module.startswith(("l2l_", "_"))
    ]


LIGHT = """
    import torch
    from l2l_lightning import CoordinatewiseLSTM, LearnedOptimizer, MNISTMLP, Optimizees, Quadratic, Rollout
    from l2l_lightning import load, run_rule
    from l2l_lightning.comparison.statistics import Interval
    from l2l_lightning.comparison.tuning import tune
    from l2l_lightning.data import load_images
    from l2l_lightning.pretrained import card, save

    rule = CoordinatewiseLSTM(hidden_size=4)
    optimizees = Optimizees(Quadratic(dim=3), None, 0, "train", range(2))
    Rollout(rule, optimizees).window(3).meta_loss.backward()
    Interval.of(run_rule(rule, optimizees, 3).sum(0))
    run_rule(load("lstm-mnist"), Optimizees(MNISTMLP(), load_images("mnist").test, 0, "test", range(2)), 1)
    save(rule, "rule.safetensors", card("lstm-mnist"))
    parameter = torch.nn.Parameter(load_images("digits").test.pixels[:2])
    for chosen in (None, "rule.safetensors"):
        optimizer = LearnedOptimizer([parameter], chosen, total_steps=10)
        parameter.square().sum().backward()
        optimizer.step()

    import l2l_lightning
    from l2l_lightning.__main__ import main

    def said(f, *arguments):
        try:
            f(*arguments)
        except (ImportError, SystemExit) as error:
            print("SAID", error)

    for name in ("MetaData", "MetaLearner", "MetaTrainer", "ComparisonSettings"):
        said(getattr, l2l_lightning, name)
    said(load_images, "mnist", "FOLDER")
    said(load, "user/rule")
    main(["info"])
    for command in ("fit", "tune", "export a.ckpt b.safetensors", "reproduce mnist"):
        said(main, command.split())
"""


def test_a_plain_installation_runs_rules_and_names_the_extra_for_all_else(tmp_path):
    done = python(LIGHT, *not_of_the_core(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("SAID ") for line in done.stdout.splitlines() if line.startswith("SAID")]
    train = "pip install 'l2l-lightning[train]'"
    for name, line in zip(
        ("MetaData", "MetaLearner", "MetaTrainer", "ComparisonSettings"), said, strict=False
    ):
        assert re.fullmatch(rf"{name} needs the package \w+: {re.escape(train)}", line)
    assert said[4] == "this data set needs the package torchvision: pip install 'l2l-lightning[data]'"
    assert said[5].endswith("needs the package huggingface_hub: pip install 'l2l-lightning[hub]'")
    assert said[6:] == ["1"] * 4
    program = re.escape("error: python -m l2l_lightning")
    for typed, line in zip(("fit", "tune", "export", "reproduce"), done.stderr.splitlines(), strict=True):
        assert re.fullmatch(rf"{program} {typed} needs the package \w+: {re.escape(train)}", line)


def test_another_packages_missing_module_is_not_taken_for_an_extra():
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere'"), needed_by("this"):
        importlib.import_module("nowhere")


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "lightning", "wandb", "jsonargparse", "matplotlib")
    loaded = assert_runs(f"import sys, l2l_lightning; print([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_meta_training_and_comparing_do_without_wandb_and_jsonargparse(tmp_path):
    printed = assert_runs(
        """
        from l2l_lightning import CoordinatewiseLSTM, ComparisonSettings, MetaData, MetaLearner, MetaTrainer
        from l2l_lightning import Quadratic
        rule = CoordinatewiseLSTM(hidden_size=4, preprocessing="identity")
        model = MetaLearner(Quadratic(dim=3), rule, horizon=4, unroll=2, num_tasks=2)
        trainer = MetaTrainer(max_epochs=1, inference_mode=False, accelerator="cpu")
        trainer.fit(model, datamodule=MetaData(num_rollouts=2))
        settings = ComparisonSettings(num_optimizees=3, num_tuning_optimizees=2, baselines=["sgd"])
        comparison = trainer.compare(model, model.data, settings)
        print(*comparison.results)
        """,
        *("wandb", "jsonargparse"),
        cwd=tmp_path,
    )
    assert "learned sgd" in printed
    assert {path.name for path in (tmp_path / "comparison").iterdir()} == {
        *("curves.csv", "curves.png", "summary.json")
    }


def test_what_needs_no_lightning_does_not_wait_for_it():
    """Nor for torchvision and matplotlib: they take longer to import than torch itself."""
    answers = {
        "info": "CPU kernels:",
        "--help": "meta-train a rule",
        "reproduce --help": "--from-pretrained",
        "fit --config qudratic": "no such file or preset",
        "fot": "there is no command fot",
        "compare": "give a checkpoint",
        "reproduce mnits": "mnits",
    }
    printed = assert_runs(
        f"""
        import contextlib
        from l2l_lightning.__main__ import main
        sys.stderr = sys.stdout
        for typed in {list(answers)}:
            print("TYPED", typed)
            with contextlib.suppress(SystemExit):
                main(typed.split())
        """,
        *("lightning", "torchmetrics", "torchvision", "wandb", "matplotlib"),
    )
    said = dict(part.split("\n", 1) for part in printed.split("TYPED ")[1:])
    assert {typed: words in said[typed] for typed, words in answers.items()} == dict.fromkeys(answers, True)


def test_every_public_error_has_the_one_base_class():
    public = {
        name: value
        for module in pkgutil.walk_packages(l2l_lightning.__path__, "l2l_lightning.")
        if not module.name.endswith("__main__")
        for name, value in vars(importlib.import_module(module.name)).items()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and value.__module__.startswith("l2l_lightning")
        and not name.startswith("_")
    }
    assert len(public) > 12
    assert not [name for name, error in public.items() if not issubclass(error, L2LError)]


def test_the_experiments_have_the_names_that_the_command_line_offers():
    assert tuple(command.EXPERIMENTS) == EXPERIMENT_NAMES


FIT = """
    import sys
    from l2l_lightning.__main__ import main
    sys.argv[1:] = ["fit", "--data.num_rollouts=1", "--model.horizon=2", "--model.unroll=2",
                    "--trainer.accelerator=cpu", "--comparison.num_optimizees=2",
                    "--comparison.num_tuning_optimizees=2", "--comparison.baselines=[sgd]", "--wandb=MODE"]
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "mode", "said"),
    [
        ("jsonargparse", "MODE", "needs the package jsonargparse: pip install 'l2l-lightning[train]'"),
        ("wandb", "online", "--wandb online needs the package wandb"),
        ("wandb", "offline", "The package wandb is not installed"),
    ],
)
def test_the_command_line_names_the_package_that_it_needs(missing, mode, said, tmp_path):
    """A run that nobody asked to be logged goes on without W&B."""
    done = python(FIT.replace("MODE", mode), missing, cwd=tmp_path)
    assert done.returncode == (mode != "offline")
    assert bool(list(tmp_path.glob("runs/*/*/summary.json"))) is (mode == "offline")
    assert said in (done.stdout if mode == "offline" else done.stderr)
