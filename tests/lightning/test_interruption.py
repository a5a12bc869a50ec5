"""Kills, signals and full disks: what a run goes on from, and what it says."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from killed_fits import OPTIONS
from meta_training import make_small

from l2l_lightning import MetaData, MetaTrainer
from l2l_lightning.cli import main
from l2l_lightning.tasks import Quadratic
from l2l_lightning.training.latest_checkpoint import LatestCheckpoint
from l2l_lightning.training.metrics_log import MetricsLog

KILLED_FITS = Path(__file__).with_name("killed_fits.py")
SMALL = [*OPTIONS, "--data.num_rollouts=8", "--latest.every_n_meta_steps=5"]


def the_run(root):
    """The folder of the only run under a root."""
    (folder,) = root.glob("*/2*")
    return folder


def contents(folder):
    """What a finished run holds that does not depend on where or when it ran."""
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    parts = {
        key: checkpoint[key]
        for key in ("state_dict", "current_model_state", "optimizer_states", "global_step", "rollouts")
    }
    return {
        "metrics": (folder / "metrics.csv").read_text(),
        "curves": (folder / "curves.csv").read_text(),
        "best": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        **dict(leaves(parts)),
    }


def leaves(value, path=""):
    """Every number in a nest, by its path."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from leaves(part, f"{path}/{index}")
    else:
        yield path, value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def signal_at(monkeypatch):
    """Has runs receive signals as soon as they have done so many meta-steps; `signal_at(None)` ends it."""
    plan = {}
    written = LatestCheckpoint.on_train_batch_end

    def send(self, trainer, *arguments):
        if trainer.global_step == plan["step"]:
            for number in plan["numbers"]:
                os.kill(os.getpid(), number)
        written(self, trainer, *arguments)

    def set_plan(step, *numbers):
        plan.update(step=step, numbers=numbers)

    set_plan(None)
    monkeypatch.setattr(LatestCheckpoint, "on_train_batch_end", send)
    return set_plan


def stopped(*arguments):
    """The exit code of a fit that must not come to its end."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    return stop.value.code


def printed_command(message):
    """What a run that was stopped says to go on with."""
    return message.rpartition(" fit ")[2].split()


@pytest.fixture(scope="module")
def in_peace(tmp_path_factory):
    root = tmp_path_factory.mktemp("peace")
    main(["fit", *SMALL, f"--trainer.default_root_dir={root}"])
    return contents(the_run(root))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(tmp_path):
    """SIGKILL at 20 random moments or more: weights, rollouts, logs and curves are the same, bit for bit."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(KILLED_FITS), str(tmp_path / "runs"), "20", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)["kills"]
    assert sum(kills) >= 20
    expected = contents(the_run(tmp_path / "runs/peace"))
    for number in range(len(kills)):
        folders = [path.parent for path in (tmp_path / f"runs/killed-{number}").glob("*/2*/curves.csv")]
        assert [contents(folder) for folder in folders] == [expected]


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 13), (signal.SIGTERM, 24), pytest.param(signal.SIGTERM, 12, marks=pytest.mark.slow)],
)
def test_a_signal_stops_after_a_whole_meta_step_and_the_run_goes_on(
    tmp_path, capsys, in_peace, number, step, signal_at
):
    taken = signal.getsignal(number)
    signal_at(step, number)
    assert stopped(*SMALL, f"--trainer.default_root_dir={tmp_path}") == 128 + number
    signal_at(None)
    assert signal.getsignal(number) == taken
    folder = the_run(tmp_path)
    message = capsys.readouterr().err
    assert f"stopped by {number.name} after meta-step {step}; go on with: python -m " in message
    main(["fit", *printed_command(message)])
    assert contents(folder) == in_peace


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_again_stops_at_once(tmp_path, monkeypatch, first):
    def twice(self, *arguments):
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(LatestCheckpoint, "on_train_batch_end", twice)
    assert stopped(*SMALL, f"--trainer.default_root_dir={tmp_path}") not in (0, None)


def test_sigterm_again_is_the_same_stop(tmp_path, capfd, signal_at):
    """A batch system sends it to the process and to its group."""
    signal_at(7, signal.SIGTERM, signal.SIGTERM)
    assert stopped(*SMALL, f"--trainer.default_root_dir={tmp_path}") == 128 + signal.SIGTERM
    message = capfd.readouterr().err
    assert message.count("Stopping after this meta-step") == 1
    assert "stopped by SIGTERM after meta-step 7; go on with" in message
    saved = torch.load(the_run(tmp_path) / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_final_comparison_ends_with_a_message_and_the_run_goes_on(
    tmp_path, capsys, monkeypatch, in_peace, number
):
    def interrupted(*arguments, **options):
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(MetaTrainer, "compare", interrupted)
    assert stopped(*SMALL, f"--trainer.default_root_dir={tmp_path}") == 128 + number
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == before
    message = capsys.readouterr().err
    folder = the_run(tmp_path)
    assert f"in the final comparison; go on with: python -m l2l_lightning fit --ckpt_path {folder}" in message
    main(["fit", f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"])
    assert contents(folder) == in_peace


def test_a_trainer_leaves_signals_as_they_were_and_takes_a_relative_root_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    latest = LatestCheckpoint(every_n_meta_steps=5)
    options = {"inference_mode": False, "logger": False, "default_root_dir": "here"}
    trainer = MetaTrainer(max_epochs=1, callbacks=[latest], **options)
    trainer.validate(make_small(), MetaData(num_rollouts=2), verbose=False)
    trainer.fit(make_small(), datamodule=MetaData(num_rollouts=2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert (tmp_path / "here/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("window", [7, pytest.param(8, marks=pytest.mark.slow)])
def test_a_signal_in_the_middle_of_an_accumulation_waits_for_its_end(tmp_path, capsys, monkeypatch, window):
    accumulating = [*SMALL, "--trainer.accumulate_grad_batches=2"]
    main(["fit", *accumulating, f"--trainer.default_root_dir={tmp_path / 'peace'}"])
    capsys.readouterr()
    written = LatestCheckpoint.on_train_batch_end
    windows = []

    def interrupt(self, trainer, *arguments):
        windows.append(None)
        if len(windows) == window:
            os.kill(os.getpid(), signal.SIGTERM)
        written(self, trainer, *arguments)

    monkeypatch.setattr(LatestCheckpoint, "on_train_batch_end", interrupt)
    stopped(*accumulating, f"--trainer.default_root_dir={tmp_path / 'cut'}")
    monkeypatch.undo()
    message = capsys.readouterr().err
    assert f"stopped by SIGTERM after meta-step {(window + 1) // 2}; go on with: python -m " in message
    main(["fit", *printed_command(message)])
    assert contents(the_run(tmp_path / "cut")) == contents(the_run(tmp_path / "peace"))


@pytest.mark.parametrize("interval", [5, pytest.param(24, marks=pytest.mark.slow)])
def test_the_last_checkpoint_is_of_the_runs_end(tmp_path, interval):
    """Whether a validation ends the run or not."""
    options = [f"--trainer.val_check_interval={interval}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *SMALL, *options])
    saved = torch.load(the_run(tmp_path) / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 24


def test_options_of_one_continuation_hold_for_the_next(tmp_path, capsys, signal_at):
    def stopped_at(step, *arguments):
        signal_at(step, signal.SIGTERM)
        stopped(*arguments)
        return printed_command(capsys.readouterr().err)

    command = stopped_at(4, *SMALL, f"--trainer.default_root_dir={tmp_path}")
    command = stopped_at(9, *command, "--early_stopping.patience=100", "--trainer.gradient_clip_val=0.5")
    # A continuation that is refused changes nothing.
    stopped(*command, "--early_stopping.patience=7", "--model.horizon=15")
    assert "--model.horizon is 15, the checkpoint's 12" in capsys.readouterr().err
    stopped_at(14, *command)
    newest = yaml.safe_load(max(the_run(tmp_path).glob("config-*.yaml")).read_text())
    assert newest["early_stopping"]["patience"] == 100
    assert newest["trainer"]["gradient_clip_val"] == 0.5


def test_a_task_of_ones_own_goes_on_by_the_same_command_and_by_the_printed_one(
    tmp_path, capsys, monkeypatch, signal_at
):
    (tmp_path / "own_bowl.py").write_text("def bowl(theta):\n    return theta.square().sum()\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--model.task=FunctionTask", "--model.task.f", "own_bowl.bowl", "--model.task.dim=3"]
    command = [*SMALL, *own, f"--run_folder={tmp_path / 'run'}"]
    for step in (4, 9):
        signal_at(step, signal.SIGTERM)
        stopped(*command)
        message = capsys.readouterr().err
        assert f"stopped by SIGTERM after meta-step {step}; go on with" in message
    signal_at(None)
    printed = printed_command(message)
    assert printed[-2:] == ["--trust", "own_bowl"]
    main(["fit", *printed])
    assert (tmp_path / "run/curves.csv").is_file()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, monkeypatch):
    """As nohup and a script's `&` have it."""
    monkeypatch.setattr(
        LatestCheckpoint, "on_train_batch_start", lambda *arguments: os.kill(os.getpid(), signal.SIGINT)
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(["fit", *SMALL, f"--trainer.default_root_dir={tmp_path}"])
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert (the_run(tmp_path) / "curves.csv").is_file()


def test_a_full_disk_ends_with_a_message_and_the_last_good_checkpoint(tmp_path, capsys, caplog, in_peace):
    """A limit on the size of files is what a process can impose on itself: at 20 KiB no checkpoint fits."""
    caplog.set_level("INFO", logger="lightning.pytorch")  # `reproduce` and `example` make it quieter
    saved = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = LatestCheckpoint._put_in_place_and_stop

    def fill(self, trainer):
        written(self, trainer)
        if trainer.global_step == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, saved[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatestCheckpoint, "_put_in_place_and_stop", fill)
        try:
            assert stopped(*SMALL, f"--trainer.default_root_dir={tmp_path}") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, saved)
    folder = the_run(tmp_path)
    message = capsys.readouterr().err
    assert "File too large" in message
    assert "--trainer.default_root_dir" in message
    assert f"python -m l2l_lightning fit --ckpt_path {folder / 'checkpoints/last.ckpt'}" in caplog.text
    assert not [path for path in (folder / "checkpoints").iterdir() if path.suffix != ".ckpt"]
    main(["fit", f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"])
    assert contents(folder) == in_peace


def test_signals_are_left_alone_outside_the_main_thread(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=main, args=(["fit", *SMALL, f"--trainer.default_root_dir={tmp_path}"],))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert (the_run(tmp_path) / "curves.csv").is_file()


@pytest.mark.parametrize("torn", ["2.", "2.5,", "2.5,1"])
def test_the_log_is_trimmed_to_the_checkpoint_and_a_torn_row_is_dropped(tmp_path, torn):
    log = MetricsLog(tmp_path)
    for step in range(5):
        log.log_metrics({"loss": 0.5 * step}, step)
    log.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(torn)  # a kill in the middle of a row
    again = MetricsLog(tmp_path)
    again.go_on_from(3)
    again.log_metrics({"loss": 7.0, "new": 1.0}, 3)
    again.save()
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows == ["loss,new,step", "0.0,,0", "0.5,,1", "1.0,,2", "7.0,1.0,3"]


def test_a_finished_run_that_goes_on_is_finished(tmp_path):
    main(["fit", *SMALL, "--trainer.val_check_interval=1.0", f"--trainer.default_root_dir={tmp_path}"])
    folder = the_run(tmp_path)
    before = contents(folder)
    main(["fit", f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"])
    assert contents(folder) == before


def test_slurms_signal_to_requeue_saves_a_whole_meta_step(tmp_path, monkeypatch, in_peace):
    """Lightning's handler would save at once: in the middle of a window."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "requeued"}')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    job = {"JOB_ID": "123", "JOB_NAME": "job.sh", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    taken = Quadratic.losses_and_grads
    calls = []

    def signalled(self, *arguments):
        calls.append(None)
        if len(calls) == 40:
            os.kill(os.getpid(), signal.SIGUSR1)
        return taken(self, *arguments)

    monkeypatch.setattr(Quadratic, "losses_and_grads", signalled)
    main(["fit", *SMALL, f"--trainer.default_root_dir={tmp_path / 'runs'}"])
    monkeypatch.undo()
    folder = the_run(tmp_path / "runs")
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    assert contents(folder) == in_peace
    saved = torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)
    (folder / "hpc_ckpt_1.ckpt").rename(folder / "checkpoints/last.ckpt")
    assert 0 < saved["global_step"] < 24
    main(["fit", f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"])
    assert contents(folder) == in_peace
