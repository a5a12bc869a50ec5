"""Wrong calls and the message that each gets: one line that names the option or the argument to change.

A case for every check, however many arguments pass it; what a task or a spec says of its own arguments is in
their tests.
"""

import math
import re

import pytest
import torch
from meta_training import make_rule
from torch import nn
from torch.nn import functional as F

from l2l_lightning import (
    CoordinatewiseLSTM,
    FunctionTask,
    MetaData,
    MetaLearner,
    MetaTrainer,
    Mixture,
    ModuleTask,
    Optimizees,
    Quadratic,
    Rollout,
    pretrained,
    run_rule,
)
from l2l_lightning.comparison.compare import Contender, compare
from l2l_lightning.comparison.tuning import tune
from l2l_lightning.data import DataNotFoundError, load_images
from l2l_lightning.rollout.cuda_graphs import CaptureError
from l2l_lightning.training.callbacks import CollapseGuard
from l2l_lightning.training.checkpoints import CheckpointError
from l2l_lightning.training.latest_checkpoint import LatestCheckpoint

TINY = [
    "--data.num_rollouts=1",
    "--model.num_tasks=1",
    "--model.num_validation_optimizees=1",
    "--comparison.num_optimizees=2",
    "--comparison.num_tuning_optimizees=1",
    "--trainer.enable_progress_bar=false",
    "--wandb=off",
]
FUNCTION = ["--model.task=FunctionTask", "--model.task.dim=2"]

FIT = [
    # Options, presets, configurations.
    (["extra"], "unrecognized arguments: extra"),
    (["--config"], "--config needs the name of a preset or a path"),
    (["--config=mnst"], "--config mnst: no such file or preset; the presets are .*mnist"),
    (["--config=FOLDER"], "--config .*: no such file or preset"),
    (["--config=SYNTAX"], r"--config .*syntax\.yaml is not YAML: .*line 1"),
    (["--config=BINARY"], r"--config .*binary\.yaml is not YAML"),
    (["--config=LIST"], r"--config .*list\.yaml is not a configuration of this program"),
    (["--config=UNKNOWN"], r"does not accept option 'model\.horizn'"),
    # The learner, its rule and its data.
    (["--model.horizon=0"], "horizon must be at least 1, got 0"),
    (["--model.horizon=1.5"], r"model\.horizon.*int.*1\.5"),
    (["--model.horizon"], r"--model\.horizon.*expected one argument"),
    (["--model.unroll=101"], r"unroll \(101\) must not exceed horizon \(100\)"),
    (["--model.learning_rate=0"], r"learning_rate must be positive, got 0\.0"),
    (["--model.cuda_graphs=true"], r"--model\.cuda_graphs\) must not be true here.*CUDA device"),
    (["--model.start_from=lstm-mars"], "no rule 'lstm-mars': choose one of lstm-mnist"),
    (["--model.start_from=lstm-mnist"], "start_from=lstm-mnist is a rule of another shape"),
    (["--model.start_from=absent.safetensors"], r"absent\.safetensors cannot be read"),
    (["--model.seed=3"], '"model.seed" must be given via "seed_everything"'),
    (["--seed_everything=-1"], r"--seed_everything must be in \[0, 2\^32\), got -1"),
    (["--seed_everything=true"], "--seed_everything must be a whole number"),
    (["--model.rule.hidden_size=65"], "hidden_size must be 1 to 64, got 65"),
    (["--model.rule.backend=cuda"], "backend must be one of triton, cpu, reference, got 'cuda'"),
    (["--model.rule.backend=triton", "--trainer.accelerator=cpu"], "'triton' cannot run on cpu"),
    (["--model.rule.precision=tf32"], r"precision.*Expected a typing\.Literal\['bf16'\].*tf32"),
    (["--model.rule.precision=bf16", "--trainer.precision=64-true"], r"precision='bf16' is for φ in float32"),
    (["--data.num_rollouts=0"], "num_rollouts must be at least 1, got 0"),
    (["--config=mnist", "--data.root=FOLDER"], r"MNIST is not in .*--data\.root.*--data\.download true"),
    (["--config=mnist", "--data.download=true"], r"--data\.download true needs a folder.*--data\.root"),
    (["--config=mnist", "--data.root=DAMAGED"], "MNIST in .* are corrupted or truncated.*--data.download"),
    # The task.
    (["--model.task=Quadratik"], "Quadratik"),
    (["--model.task=torch.nn.Linear"], r"torch\.nn\.Linear does not correspond to a subclass of Task"),
    (["--model.task.colour=1"], r"model\.task.*'colour' is not accepted"),
    (["--model.task=FunctionTask"], "arguments are required: f, dim"),
    ([*FUNCTION, "--model.task.f=bad_tasks.absent"], r"f='bad_tasks\.absent' cannot be imported"),
    ([*FUNCTION, "--model.task.f=bad_tasks.vector"], r"--model\.task .*must return a scalar.*shape \[2\]"),
    ([*FUNCTION, "--model.task.f=bad_tasks.constant"], r"--model\.task .*cannot be differentiated"),
    ([*FUNCTION, "--model.task.f=bad_tasks.breaks"], r"--model\.task .*RuntimeError: it breaks"),
    ([*FUNCTION, "--model.task.f=bad_tasks.nan"], r"--model\.task .*no finite loss and gradient at θ0"),
    ([*FUNCTION, "--model.task.f=bad_tasks.inf"], r"--model\.task .*no finite loss and gradient at θ0"),
    (["--model.task=ModuleTask", "--model.task.module=torch.nn.Linear"], "called without arguments"),
    (["--model.task=ImageMLP", "--model.task.dataset=smiles"], r"set --data\.root \(or .* L2L_SMILES"),
    # The trainer.
    (["--trainer.accelerator=abacus"], r"accelerator='abacus'.*--trainer\.accelerator"),
    (["--trainer.accelerator=cpu", "--trainer.devices=two"], r"devices.*--trainer\.devices"),
    (["--trainer.precision=16-true"], r"--trainer\.precision must not be 16-true.*use 32-true"),
    (["--trainer.plugins=HalfPrecision"], r"--trainer\.precision must not be 16-true.*use 32-true"),
    (["--trainer.strategy=ddp_spawn"], r"--trainer\.strategy must not .*\(spawn\).*: ddp runs"),
    (["--trainer.strategy=deepspeed"], r"install -U deepspeed.*\(--trainer\.strategy\)"),
    (["--trainer.enable_checkpointing=false"], r"--trainer\.enable_checkpointing must not be false"),
    (["--trainer.barebones=true"], r"--trainer\.barebones must not be true"),
    (["--trainer.check_val_every_n_epoch=2"], r"every_n_epoch must be 1, got 2.*val_check_interval"),
    (["--run_folder=FOLDER", "--latest.dirpath=FOLDER"], r"--latest\.dirpath must not be .* --run_folder"),
    (["--trainer.val_check_interval=0"], r"--trainer\.val_check_interval must be positive, got 0"),
    (["--trainer.val_check_interval=1.5"], r"1\.5 for val_check_interval"),
    (["--trainer.max_epochs=0"], r"--trainer\.max_epochs must be at least 1"),
    (["--trainer.max_steps=0"], r"--trainer\.max_steps must be at least 1"),
    (["--trainer.accumulate_grad_batches=0"], r"--trainer\.accumulate_grad_batches must be at least 1"),
    (["--trainer.gradient_clip_val=-1"], r"--trainer\.gradient_clip_val must be at least 0, got -1"),
    (["--trainer.limit_train_batches=0"], r"--trainer\.limit_train_batches 0 leaves none of .* 5 meta-st"),
    (["--trainer.overfit_batches=0.5"], r"--trainer\.overfit_batches must be a whole number, got 0\.5"),
    (["--trainer.max_time=soon"], r"Timer.*'soon'.*\(--trainer.*max_time\)"),
    (["--trainer.default_root_dir=SYNTAX/runs"], r"Not a directory.*--trainer\.default_root_dir"),
    # What watches and compares.
    (["--wandb=yes"], "wandb.*'offline', 'online', 'off'.*yes"),
    (["--averaging.decay=1"], r"averaging\.decay must be in \[0, 1\), got 1"),
    (["--collapse.patience=0"], r"collapse\.patience must be at least 1, got 0"),
    (["--collapse.chance=2"], r"collapse\.chance must be in \(0, 1\], got 2"),
    (["--latest.every_n_meta_steps=0"], r"latest\.every_n_meta_steps must be at least 1, got 0"),
    (["--early_stopping.patience=-1"], r"--early_stopping\.patience must be at least 0"),
    (["--checkpoint.save_top_k=-3"], "save_top_k=-3"),
    (["--comparison.num_optimizees=0"], r"comparison\.num_optimizees must be at least 1"),
    (["--comparison.baselines=[]"], r"comparison\.baselines must name at least one of sgd"),
    (["--comparison.baselines=[lbfgs]"], r"comparison\.baselines must be one of sgd.*'lbfgs'"),
    # Checkpoints.
    (["--ckpt_path="], "give the path of a .ckpt file with --ckpt_path"),
    (["--ckpt_path=SYNTAX"], "is not a checkpoint of this program.*--ckpt_path"),
]

OTHER_COMMANDS = [
    ([], "no command was given: choose from fit, validate"),
    (["FIT"], "there is no command FIT: choose from fit, .*, reproduce, export, info"),
    (["info", "more"], r"unrecognized arguments: more \(.* info --help lists the options"),
    (["validate"], "validate needs a trained rule.*--ckpt_path"),
    (["compare", "--ckpt_path=SYNTAX"], "is not a checkpoint of this program.*--ckpt_path"),
    (["tune", "--config=mnist_mixture", "--data.root=FOLDER"], r"MNIST is not in .*--data\.root"),
    (["reproduce"], "arguments are required: names"),
    (["reproduce", "everything"], "invalid choice: 'everything'.*'quadratic'"),
    (["reproduce", "quadratic", "--num-optimizees=0"], "--num-optimizees must be at least 2, got 0"),
    (["reproduce", "quadratic", "--out=BINARY/out"], r"binary\.yaml.*\(--out says where"),
    (["reproduce", "mnist", "--data-root=FOLDER", "--out=FOLDER/out"], "MNIST is not in .*--data-root"),
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What the tables name in capitals."""
    for name, content in {
        "syntax": b"model: [unclosed\n",
        "binary": b"\xff\xfe\x00",
        "list": b"- 1\n",
        "unknown": b"model:\n  horizn: 3\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
    (tmp_path / "bad_tasks.py").write_text(
        "import torch\n"
        "def vector(theta): return 2 * theta\n"
        "def constant(theta): return torch.tensor(1.0)\n"
        "def breaks(theta): raise RuntimeError('it breaks')\n"
        "def nan(theta): return theta.sum() * float('nan')\n"
        "def inf(theta): return theta.sum() * float('inf')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "folder").mkdir()
    damaged = tmp_path / "damaged/MNIST/raw"
    damaged.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (damaged / f"{part}-ubyte").write_bytes(b"\0\0\x08\x03" + bytes(20))
    names = {name.upper(): tmp_path / f"{name}.yaml" for name in ("syntax", "binary", "list", "unknown")}
    return names | {"FOLDER": tmp_path / "folder", "DAMAGED": tmp_path / "damaged"}


def filled_in(arguments, files):
    return [
        re.sub(r"\b[A-Z]{4,}\b", lambda m: str(files.get(m[0], m[0])), argument) for argument in arguments
    ]


def check(printed, message):
    assert re.search(message, printed), printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1, printed


@pytest.mark.parametrize(("arguments", "message"), FIT, ids=[" ".join(arguments) for arguments, _ in FIT])
def test_a_wrong_fit_is_named_in_one_line_and_leaves_no_run(arguments, message, files, fails, tmp_path):
    root = tmp_path / "runs"
    check(fails("fit", *TINY, f"--trainer.default_root_dir={root}", *filled_in(arguments, files)), message)
    assert not root.exists()


@pytest.mark.parametrize(
    ("arguments", "message"), OTHER_COMMANDS, ids=[" ".join(arguments) for arguments, _ in OTHER_COMMANDS]
)
def test_a_wrong_command_is_named_in_one_line(arguments, message, files, fails):
    check(fails(*filled_in(arguments, files)), message)


@pytest.mark.parametrize("option", ["early_stopping", "checkpoint"])
def test_a_quantity_that_is_not_logged_is_named(option, fails, tmp_path):
    printed = fails(
        "fit",
        *TINY,
        f"--trainer.default_root_dir={tmp_path}",
        f"--{option}.monitor=val/nothing",
        "--model.horizon=2",
        "--model.unroll=2",
        "--trainer.accelerator=cpu",
    )
    assert re.search(r"val/nothing.*val/sum_loss", printed)
    assert "Traceback" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_there_is_named(fails, tmp_path):
    for arguments in (["--trainer.accelerator=gpu"], ["--trainer.accelerator=cuda", "--trainer.devices=3"]):
        printed = fails("fit", *TINY, f"--trainer.default_root_dir={tmp_path}", *arguments)
        check(printed, r"--trainer\.accelerator")


# In Python.

SQUARE = Quadratic(dim=2)
STEPS = FunctionTask(lambda theta: (theta > 0).sum(), dim=2)


def optimizees(task=SQUARE, images=None, seed=0, stream="test", indices=range(2), **others):
    return Optimizees(task, images, seed, stream, indices, **others)


def learner(task=SQUARE, rule=None, **arguments):
    return MetaLearner(task, rule or make_rule(), **{"horizon": 2, "unroll": 2, "num_tasks": 1} | arguments)


def trainer(**arguments):
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 1}
    return MetaTrainer(**quiet | {"inference_mode": False, "enable_progress_bar": False} | arguments)


def rollout(**arguments):
    return Rollout(make_rule(), optimizees(), **arguments)


def validate(**arguments):
    trainer(**arguments).validate(learner(), datamodule=MetaData(num_rollouts=1))


def learned():
    return Contender("learned", lambda optimizees, horizon: run_rule(make_rule(), optimizees, horizon))


PYTHON = [
    (lambda: CoordinatewiseLSTM(hidden_size="20"), TypeError, "hidden_size must be a whole .*'20'"),
    (lambda: CoordinatewiseLSTM(output_scale=math.nan), ValueError, "output_scale must be finite"),
    (lambda: CoordinatewiseLSTM(gradient_scale=0), ValueError, "gradient_scale must be positive"),
    (lambda: Quadratic(dim="3"), TypeError, "dim must be a number, got '3'"),
    (lambda: optimizees(STEPS).losses_and_grads(), ValueError, "cannot be .*: it does not depend on θ"),
    (lambda: ModuleTask(nn.Linear), TypeError, "cannot be called without arguments.*lambda"),
    (lambda: ModuleTask(lambda: nn.Linear(3, 1), F.mse_loss, sample=3), TypeError, "sample must be callable"),
    (lambda: Mixture(["Quadratic"]), TypeError, "tasks must hold tasks, got 'Quadratic'"),
    (lambda: optimizees(torch.sum), TypeError, "task must be a Task .FunctionTask makes one"),
    (lambda: optimizees(indices=[]), ValueError, "indices must name at least one optimizee"),
    (lambda: optimizees(indices=[-1]), ValueError, "must not be negative.*index -1"),
    (lambda: optimizees(stream="tests"), ValueError, "stream must be one of train.*'tests'"),
    (lambda: optimizees(dtype=torch.int32), ValueError, "dtype must be a floating-point type"),
    (lambda: rollout().window(0), ValueError, "unroll must be at least 1"),
    (lambda: rollout().window(2, torch.ones(2)), ValueError, r"must be \[unroll \+ 1\] = \[3\], got \[2\]"),
    (lambda: rollout(cuda_graphs=True).window(2), CaptureError, "cuda_graphs .*must not be true here"),
    (lambda: run_rule(make_rule(), optimizees(), 0), ValueError, "horizon must be at least 1, got 0"),
    (lambda: learner(torch.sum), TypeError, "task must be of the class Task"),
    (lambda: learner(rule=nn.Linear(1, 1)), TypeError, "rule must be of the class"),
    (lambda: learner(unroll=[2, 0]), ValueError, "unroll must be at least 1"),
    (lambda: learner(warmup_steps=-1), ValueError, "warmup_steps must not be negative, got -1"),
    (lambda: learner(seed=-1), ValueError, "seed must not be negative, got -1"),
    (lambda: MetaData(num_rollouts="3"), TypeError, "num_rollouts must be a whole number, got '3'"),
    (lambda: load_images("mnist", "/absent"), DataNotFoundError, "MNIST is not in /absent.*--data.root"),
    (lambda: trainer().fit(learner()), TypeError, r"runs with datamodule=MetaData\(\.\.\.\), got None"),
    (lambda: validate(inference_mode=True), ValueError, r"Trainer\(inference_mode=False\)"),
    (lambda: trainer().compare(learner(), MetaData(), ckpt_path="/a.ckpt"), CheckpointError, "no checkpoint"),
    (lambda: compare([], optimizees, 5, seed=0), ValueError, "contenders must hold at least one"),
    (lambda: compare([learned()], optimizees, 0, seed=0), ValueError, "horizon must be at least 1"),
    (lambda: tune(SQUARE, None, [5], 0, num_optimizees=0), ValueError, "at least one optimizee"),
    (lambda: CollapseGuard(action="x"), ValueError, r"collapse\.action must be one of restart, stop"),
    (lambda: LatestCheckpoint(1.5), TypeError, r"latest\.every_n_meta_steps must be a whole number"),
    (lambda: pretrained.save(make_rule(), "rule.pt"), ValueError, r"path must end in \.safetensors"),
    (lambda: pretrained.card("lstm-mars"), pretrained.WeightsError, "no rule 'lstm-mars'"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "error", "message"), PYTHON, ids=[message for _, _, message in PYTHON])
def test_a_wrong_call_is_named(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert raised.type is error
