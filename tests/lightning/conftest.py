"""Fixtures for tests that run the command line in this process."""

import copy
import signal

import pytest
from meta_training import cut_run

from l2l_lightning.cli import main
from l2l_lightning.training import checkpoints

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


@pytest.fixture(autouse=True)
def signals():
    """Ctrl-C interrupts: tests that are started in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Written in the second rollout of four."""
    return cut_run(tmp_path_factory.mktemp("written"))


@pytest.fixture
def rewrite(checkpoint, tmp_path):
    """Writes the checkpoint anew with a change."""

    def run(change):
        content = copy.deepcopy(checkpoints.read(checkpoint))
        change(content)
        checkpoints.write(content, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return run
