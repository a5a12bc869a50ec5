"""Several processes: the same φ as one with all the tasks, the same decisions on each, runs that go on."""

import copy
import csv
import functools
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from exactness import assert_identical
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from meta_training import make_rule
from processes import fit_in_processes, free_port, run_together
from torch.multiprocessing import ProcessRaisedException

from l2l_lightning import MNISTMLP, MetaData, MetaLearner, Optimizees, Quadratic
from l2l_lightning.cli import main
from l2l_lightning.rollout import optimizees
from l2l_lightning.rollout.rollout import Rollout
from l2l_lightning.tasks import Mixture, NoisyScaledSquare
from l2l_lightning.training.callbacks import CollapseGuard, PhiAveraging
from l2l_lightning.training.resharding import reshard

pytestmark = pytest.mark.forks


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A forked process has not its parent's pool of threads, and must not wait for it."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_float64(monkeypatch):
    double = functools.partial(Optimizees, dtype=torch.float64)
    monkeypatch.setattr("l2l_lightning.training.meta_learner.Optimizees", double)


def make_model(num_tasks, task=None, **arguments):
    settings = {"horizon": [7, 5], "unroll": 3, "learning_rate": 0.01, "seed": 4}
    settings["num_validation_optimizees"] = 5
    task = task or Mixture([Quadratic(dim=3), NoisyScaledSquare(dim=2)])
    return MetaLearner(task, make_rule().double(), num_tasks=num_tasks, **{**settings, **arguments})


def assert_same_phi(ours, theirs, rtol=1e-11):
    assert ours["phi"].keys() == theirs["phi"].keys()
    for name, value in theirs["phi"].items():
        torch.testing.assert_close(ours["phi"][name], value, rtol=rtol, atol=rtol * float(value.abs().max()))


def assert_processes_agree(processes):
    for other in processes[1:]:
        assert all(torch.equal(value, processes[0]["phi"][name]) for name, value in other["phi"].items())
        assert other["meta_steps"] == processes[0]["meta_steps"]
        assert other["restarts"] == processes[0]["restarts"]
        validation = [name for name in other["metrics"] if name.startswith("val/")]
        assert [other["metrics"][n] for n in validation] == [processes[0]["metrics"][n] for n in validation]


CLIPPED = {"gradient_clip_val": 0.1, "val_check_interval": 5}
ACCUMULATED = {"accumulate_grad_batches": 2, "val_check_interval": 4}


@pytest.mark.parametrize(
    ("devices", "settings", "averaging"),
    [
        pytest.param(2, ACCUMULATED, [], id="2, accumulated"),
        pytest.param(
            4, CLIPPED, [PhiAveraging(decay=0.7)], id="4, clipped and averaged", marks=pytest.mark.slow
        ),
    ],
)
def test_several_processes_give_the_phi_of_one_with_all_their_tasks(
    devices, settings, averaging, tmp_path, in_float64, record_streams
):
    """Rollouts of two tasks and two lengths in uneven windows, in float64."""
    runs, streams = {}, {}
    for number in (1, devices):
        record, folder = record_streams(tmp_path / f"streams-{number}"), tmp_path / str(number)
        callbacks = copy.deepcopy(averaging)
        runs[number] = fit_in_processes(
            make_model(4 // number), folder, number, *callbacks, num_rollouts=6, **settings
        )
        streams[number] = record()
    assert runs[devices][0]["meta_steps"] == runs[1][0]["meta_steps"] >= 7
    assert_processes_agree(runs[devices])
    assert_same_phi(runs[devices][0], runs[1][0])
    for name in ("meta_loss", "val/initial_loss", "val/final_loss", "val/sum_loss"):
        # torchmetrics adds up in float32.
        assert runs[devices][0]["metrics"][name] == pytest.approx(runs[1][0]["metrics"][name], rel=1e-6)

    # No stream is drawn from twice, and together they are the single process's.
    ours, [theirs] = list(streams[devices].values()), streams[1].values()
    drawn = [draw for process in ours for draw in process]
    assert len(ours) == devices
    assert all(ours)
    assert sorted(drawn) == sorted(theirs)
    training = [draw for draw in drawn if draw.startswith("train ")]
    assert len(training) == len(set(training)) == 6 * 4


@pytest.fixture
def record_streams(monkeypatch):
    """Writes down the streams that a run's optimizees draw from; `record(folder)()` reads them back."""
    derive = optimizees.derive_generator

    def record(folder):
        folder.mkdir()

        monkeypatch.setattr(MetaLearner, "try_task", lambda model, data: data.load(model.task))

        def derive_and_record(seed, stream, index):
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            with (folder / str(rank)).open("a") as file:
                file.write(f"{stream} {index}\n")
            return derive(seed, stream, index)

        monkeypatch.setattr(optimizees, "derive_generator", derive_and_record)
        return lambda: {path.name: path.read_text().splitlines() for path in sorted(folder.iterdir())}

    return record


@pytest.mark.parametrize("count", [1, 3, 6])
def test_validation_runs_the_same_optimizees_on_any_number_of_processes(count, tmp_path, record_streams):
    """Fewer than processes, not divisible by them, and of two members."""
    metrics, streams = {}, {}
    for number in (1, 2, 4):
        record = record_streams(tmp_path / f"streams-{number}")
        model = make_model(1, num_validation_optimizees=count, horizon=5, learning_rate=1e-30)
        ended = fit_in_processes(model.float(), tmp_path / str(number), number, num_rollouts=1)
        assert_processes_agree(ended)
        metrics[number] = [ended[0]["metrics"][f"val/{name}_loss"] for name in ("initial", "final", "sum")]
        read = [[d for d in draws if d.startswith("validation")] for draws in record().values()]
        streams[number] = sorted(draw for process in read for draw in process)
        if 2 * max(count // 2, 1) >= number:  # the members' first ones are not all the first process's
            assert all(read)
    expected = [f"validation {index}" for index in range(max(count // 2, 1)) for _ in range(2)]
    for number in (1, 2, 4):
        assert streams[number] == expected
        assert metrics[number] == pytest.approx(metrics[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), (2, 4)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, tmp_path, in_float64):
    """Cut after any meta-step, in mid-rollout and between two, and resumed with as many tasks in all."""
    settings = {"num_rollouts": 4, "limit_val_batches": 0}
    [whole] = fit_in_processes(make_model(4), tmp_path / "whole", 1, **settings)
    every = ModelCheckpoint(tmp_path / "cut", every_n_train_steps=1, save_top_k=-1)
    fit_in_processes(make_model(4 // before), tmp_path / "cut", before, every, **settings)
    checkpoints = sorted((tmp_path / "cut").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert len(checkpoints) == whole["meta_steps"] == 10
    in_progress = [torch.load(path, weights_only=True)["rollouts"] for path in checkpoints]
    assert all(len(rollouts) == before for rollouts in in_progress)
    assert {rollouts[0] is None for rollouts in in_progress} == {True, False}
    for number, path in enumerate(checkpoints[:-1]):
        folder = tmp_path / f"resumed-{number}"
        ended = fit_in_processes(make_model(4 // after), folder, after, ckpt_path=path, **settings)
        assert_processes_agree(ended)
        assert_same_phi(ended[0], whole)


def test_resharding_keeps_every_optimizee_with_its_state():
    rule = make_rule()

    def rollout(indices):
        started = Rollout(rule, Optimizees(NoisyScaledSquare(dim=2), None, 0, "train", indices))
        started.window(2)
        # As if it had been infinite for a moment.
        started.masked = torch.tensor([index == 4 for index in indices])
        return started

    saved = [rollout(range(2 * rank, 2 * rank + 2)).state_dict() for rank in range(3)]
    for rank in range(2):
        mine = range(3 * rank, 3 * rank + 3)
        resumed = Rollout(rule, Optimizees(NoisyScaledSquare(dim=2), None, 9, "train", mine))
        resumed.load_state_dict(reshard(saved, rank, 2))
        expected = rollout(mine)
        assert resumed.steps_done == 2
        assert torch.equal(resumed.masked, expected.masked)
        assert_identical(resumed.window(3).losses, expected.window(3).losses)
        assert_identical(resumed.parts[0].state, expected.parts[0].state)
    with pytest.raises(ValueError, match="6 optimizees cannot be shared out evenly among 4"):
        reshard(saved, 0, 4)


def test_early_stopping_stops_every_process_at_the_same_meta_step(tmp_path):
    ended = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        best = ModelCheckpoint(folder, monitor="val/sum_loss", save_on_train_epoch_end=False)
        stop = EarlyStopping("val/sum_loss", patience=2, check_on_train_epoch_end=False)
        # A rate this small changes nothing, so that the third validation is the second without improvement.
        model = make_model(2 // devices, learning_rate=1e-30).float()
        ended[devices] = fit_in_processes(
            model, folder, devices, best, stop, num_rollouts=50, val_check_interval=2
        )
    assert_processes_agree(ended[2])
    assert ended[2][0]["meta_steps"] == ended[1][0]["meta_steps"] == 6


class NaNOnce(Quadratic):
    """All losses are NaN, at one evaluation."""

    def __init__(self, evaluation):
        super().__init__(dim=3)
        self.evaluation = self.evaluations_left = evaluation

    def losses(self, thetas, batches):
        self.evaluations_left -= torch.is_grad_enabled()
        return super().losses(thetas, batches) * (math.nan if self.evaluations_left == 0 else 1.0)


class KeepPhi(Callback):
    """Every process writes down φ after every meta-step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, *_):
        phi = pl_module.rule.head_weight.detach().clone()
        torch.save(phi, self.folder / f"phi-{trainer.global_step}-{trainer.global_rank}.pt")


@pytest.mark.parametrize("any_better", [True, False])
def test_a_nan_meta_gradient_restarts_every_process(any_better, tmp_path):
    """From the best checkpoint, or from the same fresh draw."""
    best = ModelCheckpoint(tmp_path, monitor="val/sum_loss", save_on_train_epoch_end=False)
    # Of chance = 2 every validation is better, of 0 none.
    guard = CollapseGuard()
    guard.chance = 2.0 if any_better else 0.0
    model = make_model(2, NaNOnce(evaluation=18), horizon=6).float()
    ended = fit_in_processes(
        model, tmp_path, 2, guard, KeepPhi(tmp_path), best, num_rollouts=4, val_check_interval=2
    )
    assert_processes_agree(ended)
    assert sum(ended[0]["restarts"]) == 1
    history = []
    for step in range(1, 9):
        first, last = (torch.load(tmp_path / f"phi-{step}-{rank}.pt") for rank in range(2))
        assert first.isfinite().all()
        assert torch.equal(first, last)
        history.append(first)
    returned = [any(torch.equal(phi, past) for past in history[:step]) for step, phi in enumerate(history)]
    assert sum(returned) == any_better


def test_validations_at_chance_restart_every_process_and_then_stop_them(tmp_path):
    guard = CollapseGuard(start_patience=1, max_restarts=2)
    guard.chance = 0.0  # of which no validation is better
    model = make_model(1).float()
    ended = fit_in_processes(model, tmp_path, 2, guard, num_rollouts=2, val_check_interval=2)
    assert_processes_agree(ended)
    assert sum(ended[0]["restarts"]) == 2
    with pytest.raises(ProcessRaisedException, match=r"MetaTrainingError.*after 2 restarts"):
        fit_in_processes(model, tmp_path, 2, guard, num_rollouts=4, val_check_interval=2)


PAGE = (Path(__file__).parents[2] / "docs/clusters.md").read_text(encoding="utf-8")
TINY = {"data.num_rollouts": 4, "model.horizon": 9, "model.unroll": 3, "model.num_validation_optimizees": 3}
TINY |= {"model.task.dim": 3, "trainer.val_check_interval": 2, "latest.every_n_meta_steps": 2}
TINY |= {"trainer.enable_progress_bar": "false", "trainer.accelerator": "cpu", "wandb": "off"}
TINY |= {f"comparison.num_{which}": 2 for which in ("optimizees", "tuning_optimizees")}
TINY["comparison.baselines"] = "[sgd]"
OPTIONS = [f"--{name}={value}" for name, value in TINY.items()]


def documented(start, **replacements):
    """The page's command that begins so, as arguments, small and on this machine."""
    (block,) = (b for b in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) if b.startswith(start))
    for word, replacement in replacements.items():
        assert word in block
        block = block.replace(word, replacement)
    return block.replace("\\\n", "").replace(
        "--config mnist", shlex.join(["--config", "quadratic", *OPTIONS])
    )


def phi_of(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    return {"phi": {k: v for k, v in saved["state_dict"].items() if k.startswith("rule.")}}, saved[
        "global_step"
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """φ that every way to start two processes must end with: two forked ones', which is one's to rounding."""
    runs = {}
    for devices, arguments in (
        (1, ["--model.num_tasks=4"]),
        (2, ["--model.num_tasks=2", "--trainer.devices=2", "--trainer.strategy=ddp_fork"]),
    ):
        folder = tmp_path_factory.mktemp("whole") / str(devices)
        main(["fit", *OPTIONS, f"--run_folder={folder}", *arguments])
        runs[devices], meta_steps = phi_of(folder / "checkpoints/last.ckpt")
        assert meta_steps == 12
    assert_same_phi(runs[2], runs[1], rtol=1e-5)
    return runs[2]


def assert_ended_as(folder, whole_run):
    ended, meta_steps = phi_of(folder / "checkpoints/last.ckpt")
    assert meta_steps == 12
    assert all(torch.equal(ended["phi"][name], value) for name, value in whole_run["phi"].items())
    assert (folder / "config.yaml").is_file()
    assert (folder / "summary.json").is_file()


@pytest.mark.slow
def test_ddp_starts_its_own_processes(whole_run, tmp_path):
    command = shlex.split(documented("python -m"))
    root = tmp_path / "runs"
    more = ["--model.num_tasks=2", f"--trainer.default_root_dir={root}", "--wandb=offline"]
    [printed] = run_together([([sys.executable, *command[1:], *more], {})])
    (folder,) = root.glob("quadratic/*")
    assert_ended_as(folder, whole_run)
    assert printed.count("Run: ") == printed.count("Tuned on") == 1
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_two_nodes_and_a_killed_process(whole_run, tmp_path):
    """torchrun starts all of them again, and they go on where the last checkpoint was."""
    folder, callback = tmp_path / "run", "--trainer.callbacks+=sudden_death.SuddenDeath"
    dies = [callback, "--trainer.callbacks.rank=1", "--trainer.callbacks.meta_step=5", "--trust=sudden_death"]
    more = ["--model.num_tasks=2", *dies]
    here = {"HOST:29500": f"localhost:{free_port()}", "FOLDER": str(folder)}
    one = {f"{option} 4": f"{option} 1" for option in ("--nproc-per-node", "--trainer.devices")}
    command = documented("TORCH_DISABLE", **here, **one)
    variable, torchrun, *arguments = shlex.split(command)
    assert torchrun == "torchrun"
    arguments = [sys.executable, "-m", "torch.distributed.run", *arguments, *more]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    # The process that is left waits for the other until it is killed, too.
    environment = {"PYTHONPATH": path, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    environment.update([variable.split("=")])
    printed = "".join(run_together(2 * [(arguments, environment)]))
    assert_ended_as(folder, whole_run)
    # The two torchruns may notice it one after another, and start once more in between.
    assert printed.count("The run goes on from") == printed.count("Run: ") - 1 >= 1
    assert printed.count("Tuned on") == 1
    # Logged up to the kill, and on from the checkpoint before it.
    with (folder / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps)


def test_a_run_goes_on_in_its_folder_which_only_a_fit_has(whole_run, tmp_path, capsys, fails):
    assert "--run_folder is where a fit goes on; tune has none" in fails("tune", f"--run_folder={tmp_path}")
    folder = tmp_path / "mine"
    command = ["fit", *OPTIONS, "--model.num_tasks=4", f"--run_folder={folder}"]
    main([*command, "--trainer.max_steps=4", "--model.lr_schedule=constant"])
    first = yaml.safe_load((folder / "config.yaml").read_text())
    main([*command, "--model.lr_schedule=constant", "--trainer.max_steps=-1"])
    assert f"The run goes on from {folder / 'checkpoints/last.ckpt'}" in capsys.readouterr().out
    whole = tmp_path / "whole"
    main(["fit", *OPTIONS, "--model.num_tasks=4", "--model.lr_schedule=constant", f"--run_folder={whole}"])
    (ours, meta_steps), (theirs, _) = (phi_of(run / "checkpoints/last.ckpt") for run in (folder, whole))
    assert meta_steps == 12
    assert all(torch.equal(ours["phi"][name], value) for name, value in theirs["phi"].items())
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    # config.yaml says how it began; what it went on with lies beside it.
    (later,) = folder.glob("config-*.yaml")
    again = yaml.safe_load(later.read_text())
    assert again["trainer"].pop("max_steps") == -1
    assert yaml.safe_load((folder / "config.yaml").read_text()) == first


@pytest.mark.slow
def test_processes_download_one_after_another(tmp_path, monkeypatch):
    log = tmp_path / "log"

    def load_slowly(*_):
        for word in ("begin", "end"):
            with log.open("a") as file:
                file.write(f"{word} ")
            time.sleep(0.2)

    monkeypatch.setattr("l2l_lightning.training.data_module.load_images", load_slowly)
    data = MetaData(root=str(tmp_path / "data"), download=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=data.load, args=(MNISTMLP(),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert log.read_text().split() == 3 * ["begin", "end"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Puts an `srun` and an `scontrol` in the path; the job's script, with this process's python."""
    programs = tmp_path / "bin"
    programs.mkdir()
    srun = """
        export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=2 SLURM_LOCALID=0 SLURM_NODELIST=localhost
        for rank in 0 1; do SLURM_PROCID=$rank SLURM_NODEID=$rank "$@" & done
        wait -n && wait -n
    """
    scontrol = f'echo "$@" > {tmp_path / "requeued"}'
    scripts = {"srun": srun, "scontrol": scontrol, "python": f'exec {sys.executable} "$@"'}
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}")
        (programs / name).chmod(0o755)
    variables = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "MASTER_PORT": str(free_port())}
    for name, value in {**variables, "SLURM_JOB_ID": "1234567", "SLURM_JOB_NAME": "job.sh"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_a_slurm_job_runs_on_two_nodes(whole_run, slurm, tmp_path):
    script = documented(
        "#!/bin/bash",
        **{"--trainer.devices 4": "--trainer.devices 1 --model.num_tasks 2", "runs/job": f"{tmp_path}/job"},
    )
    [printed] = run_together([(["bash", "-c", script], {})])
    assert_ended_as(tmp_path / "job-1234567", whole_run)
    assert printed.count("Run: ") == printed.count("Tuned on") == 1
    assert not (tmp_path / "requeued").exists()


def test_a_slurm_job_is_queued_again_before_its_time_is_up(slurm, tmp_path):
    (tmp_path / "bin/srun").write_text(f"#!/bin/bash\ntouch {tmp_path / 'started'}; sleep 60")
    job = subprocess.Popen(["bash", "-c", documented("#!/bin/bash")], start_new_session=True)
    try:
        while not (tmp_path / "started").exists():
            assert job.poll() is None, "the job has ended before it began"
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=30)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "requeued").read_text() == "requeue 1234567\n"
