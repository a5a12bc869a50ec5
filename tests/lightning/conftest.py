"""Fixtures for tests that run the command line in this process."""

import pytest

from l2l_lightning.cli import main

TINY = [
    "--data.num_rollouts=2",
    "--model.horizon=6",
    "--model.unroll=3",
    "--model.num_tasks=2",
    "--model.num_validation_optimizees=2",
    "--trainer.val_check_interval=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--comparison.num_optimizees=3",
    "--comparison.num_tuning_optimizees=2",
    "--comparison.baselines=[sgd,adam]",
]


@pytest.fixture(autouse=True)
def no_data_of_the_users(monkeypatch):
    """Tests run on the embedded subset, whatever the user's shell says."""
    monkeypatch.delenv("L2L_DATA", raising=False)
    monkeypatch.delenv("L2L_SMILES", raising=False)


@pytest.fixture
def tiny_fit(tmp_path, capsys):
    """Runs a tiny `fit` into a folder of its own; returns the run's folder."""

    def run(*arguments, root=None, wandb="off"):
        root = root or tmp_path / "runs"
        before = set(root.glob("*/2*")) if root.exists() else set()
        main(["fit", *arguments, *TINY, f"--trainer.default_root_dir={root}", f"--wandb={wandb}"])
        (folder,) = set(root.glob("*/2*")) - before
        return folder

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command line that must fail; returns what it printed on standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert stopped.value.code not in (0, None)
        return capsys.readouterr().err

    return run
