"""A run's folder belongs to one run, and what a run prints and reads is not the locale's."""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import TINY

from l2l_lightning.cli import main
from l2l_lightning.cli.run_folder import FolderInUseError, RunLock, missing, new_run_folder


def test_runs_that_begin_together_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run_folder(tmp_path / "runs" / "q"), range(40)))
    assert len(set(folders)) == 40
    assert all(folder.is_dir() for folder in folders)


def hold(folder):
    """A process that holds a run's folder until its standard input ends."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom l2l_lightning.cli.run_folder import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]))\nprint('holds', flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_folder_in_use_is_refused_in_one_line_and_left_alone(tiny_fit, tmp_path, fails):
    folder = tiny_fit()
    process = hold(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for start in (f"--run_folder={folder}", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"):
        printed = fails(
            "fit", start, *TINY, "--wandb=off", f"--trainer.default_root_dir={tmp_path / 'other'}"
        )
        assert printed.count("\n") == 1
        assert f"{folder} is in use: process {process.pid} on " in printed
        assert "--run_folder" in printed
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "other").exists()
    process.kill()  # the lock dies with it, and what it said of itself does not matter
    process.wait()
    main(["fit", f"--run_folder={folder}", *TINY, "--wandb=off", f"--trainer.default_root_dir={tmp_path}"])
    rows = list(csv.DictReader((folder / "metrics.csv").open(encoding="utf-8")))
    assert len({(row["step"], row["val/sum_loss"]) for row in rows}) == len(rows)


def test_a_folder_in_which_nothing_was_written_goes_with_its_run(tmp_path):
    parent = tmp_path / "kept" / "runs"
    parent.parent.mkdir()
    made = missing(parent)
    folder = new_run_folder(parent)
    lock = RunLock(folder, [folder, *made])
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"):
        RunLock(folder)
    lock.release()
    assert list(tmp_path.rglob("*")) == [parent.parent]
    folder = new_run_folder(parent)
    lock = RunLock(folder, [folder])
    (folder / "config.yaml").touch()
    lock.release()
    assert (folder / "config.yaml").is_file()


def test_a_run_that_goes_on_is_the_same_run_in_wandb(tiny_fit, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tiny_fit("--trainer.max_steps=2", wandb="offline")
    identity = (folder / "wandb-id.txt").read_text(encoding="utf-8")
    arguments = ["--data.num_rollouts=3", "--wandb=offline", "--trainer.max_steps=-1"]
    main(["fit", f"--run_folder={folder}", *TINY, f"--trainer.default_root_dir={tmp_path}", *arguments])
    begun = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(begun) == 2
    # offline-run-TIME-ID, and a number if both began in one second
    assert {path.name.split("-")[3] for path in begun} == {identity}


@pytest.mark.parametrize(
    ("variable", "value", "logged"),
    [("WANDB_MODE", "disabled", False), ("WANDB_DISABLED", "true", False), ("WANDB_MODE", "offline", True)],
)
def test_wandbs_own_variables_hold_unless_the_command_says_more(
    variable, value, logged, tmp_path, monkeypatch
):
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    main(["fit", *TINY, f"--trainer.default_root_dir={tmp_path}"])
    assert bool(list(tmp_path.glob("*/*/wandb"))) == logged


@pytest.mark.parametrize(
    "option", ["limit_train_batches=1", "limit_train_batches=0.5", "overfit_batches=1", "limit_val_batches=0"]
)
def test_an_option_that_shortens_a_run_is_honoured(option, tiny_fit):
    assert (tiny_fit(f"--trainer.{option}") / "summary.json").is_file()


def test_a_run_may_be_validated_by_the_clock(tmp_path):
    main(
        ["fit", *TINY, "--trainer.val_check_interval=00:00:00:00", f"--run_folder={tmp_path}", "--wandb=off"]
    )
    assert "val/sum_loss" in (tmp_path / "metrics.csv").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_output_never_fails_on_an_encoding(encoding, tmp_path):
    """In a locale without UTF-8, with names that it lacks: presets and files are UTF-8 all the same."""
    config = tmp_path / "θ0.yaml"
    config.write_text("# θ0\n" + yaml.safe_dump({"data": {"num_rollouts": 2}}), encoding="utf-8")
    variables = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    variables |= {"PYTHONCOERCECLOCALE": "0"}
    command = [
        sys.executable,
        "-m",
        "l2l_lightning",
        "fit",
        "--config=quadratic",
        f"--config={config}",
        *TINY,
    ]
    root = tmp_path / "läufe"
    done = subprocess.run(
        [*command, "--wandb=off", f"--trainer.default_root_dir={root}"],
        env=variables,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (summary,) = root.glob("*/*/summary.json")
    assert summary.is_file()


def test_no_text_is_read_in_the_locales_encoding():
    root = Path(__file__).parents[2]
    wrong = []
    for folder in ("l2l_lightning", "kernels"):
        for path in (root / folder).rglob("*.py"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if any(call in line for call in (".read_text()", "text=True")) and "encoding" not in line:
                    wrong.append(f"{path.name}:{number}")
    assert wrong == []
