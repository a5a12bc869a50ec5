"""What each part imports: rules, tasks and rollouts no Lightning; wandb and jsonargparse where asked for."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import textwrap

import pytest

import l2l_lightning
from l2l_lightning.errors import L2LError
from l2l_lightning.reproduce import command
from l2l_lightning.reproduce.settings import EXPERIMENT_NAMES


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
    tree = ast.parse(inspect.getsource(l2l_lightning))
    visible = {
        (node.module.removeprefix("l2l_lightning."), name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("l2l_lightning.")
        for name in node.names
    }
    lazy = {(module, name) for module, names in l2l_lightning._MODULES.items() for name in names}
    assert visible == lazy
    assert {name for _, name in lazy} == set(l2l_lightning.__all__)


def test_the_core_does_without_lightning():
    assert_runs(
        """
        from l2l_lightning import CoordinatewiseLSTM, MNISTMLP, Optimizees, Quadratic, Rollout, run_rule
        from l2l_lightning.data import load_images
        load_images("mnist")
        import l2l_lightning.comparison.tuning, l2l_lightning.comparison.report
        rule = CoordinatewiseLSTM(hidden_size=4)
        optimizees = Optimizees(Quadratic(dim=3), None, 0, "train", range(2))
        Rollout(rule, optimizees).window(3).meta_loss.backward()
        run_rule(rule, optimizees, 3)
        """,
        *("lightning", "torchmetrics", "torchvision", "wandb", "jsonargparse", "matplotlib", "triton"),
        *("sklearn", "PIL"),
    )


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


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("info", "CPU kernels:"),
        ("--help", "meta-train a rule"),
        ("reproduce --help", "--from-pretrained"),
        ("fit --config qudratic", "no such file or preset"),
        ("fot", "there is no command fot"),
        ("compare", "give a checkpoint"),
        ("reproduce mnits", "mnits"),
    ],
)
def test_what_needs_no_lightning_does_not_wait_for_it(typed, said):
    """Nor for torchvision and matplotlib: they take longer to import than torch itself."""
    done = python(
        f"""
        sys.argv = ["l2l_lightning", *{typed.split()}]
        from l2l_lightning.__main__ import main
        main()
        """,
        *("lightning", "torchmetrics", "torchvision", "wandb", "matplotlib"),
    )
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


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
        ("jsonargparse", "MODE", "pip install 'jsonargparse[signatures]'"),
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
