"""Checkpoints: none executes code, nothing damaged is read, other options are honoured or refused."""

import copy
import json
import math
import os
import pickle
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from meta_training import fit

from l2l_lightning import CoordinatewiseLSTM, MetaData, MetaLearner, Quadratic, pretrained
from l2l_lightning.cli import main
from l2l_lightning.tasks import FunctionTask, Mixture, SimpleSquare
from l2l_lightning.training import checkpoints
from l2l_lightning.training.callbacks import CollapseGuard, PhiAveraging
from l2l_lightning.training.checkpoints import CheckpointError
from l2l_lightning.training.meta_learner import CheckpointMismatchError


def make_model(task=None, **arguments):
    rule = {"num_layers": 1, "hidden_size": 2, "preprocessing": "identity"} | arguments.pop("rule", {})
    settings = {
        "horizon": 4,
        "unroll": 2,
        "num_tasks": 2,
        "num_validation_optimizees": 2,
        "learning_rate": 0.01,
    }
    torch.manual_seed(0)
    return MetaLearner(task or Quadratic(dim=2), CoordinatewiseLSTM(**rule), **settings | arguments)


def write_checkpoint(folder, task=None, meta_steps=3, num_rollouts=4, **arguments):
    """A run that is cut after so many windows of 2 steps, in rollouts of 4."""
    trainer = fit(
        make_model(task, **arguments),
        folder,
        PhiAveraging(0.5),
        CollapseGuard(),
        max_steps=meta_steps,
        num_rollouts=num_rollouts,
        limit_val_batches=0,
    )
    path = folder / "run" / "checkpoints" / "cut.ckpt"
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def boundary(tmp_path_factory):
    """Written between two rollouts."""
    return write_checkpoint(tmp_path_factory.mktemp("boundary"), meta_steps=2)


@pytest.fixture
def rewrite(checkpoint, tmp_path):
    """Writes the checkpoint anew with a change, as version 1, which needs no digest."""

    def run(change, version=1):
        content = copy.deepcopy(checkpoints.read(checkpoint))
        content["l2l_lightning"]["version"] = version
        change(content)
        path = tmp_path / "changed.ckpt"
        torch.save(content, path)
        return path

    return run


# What is read.


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory")
@pytest.mark.parametrize(
    ("kind", "count"), [("checkpoint", 1000), ("checkpoint without a digest", 500), ("weights", 500)]
)
def test_a_damaged_file_is_refused_or_read_as_the_original(kind, count, rewrite, checkpoint, tmp_path):
    """Mutants, read in a process of their own with a limit on its memory and on its time."""
    path = tmp_path / "original.safetensors"
    if kind == "weights":
        pretrained.save(make_model().rule, path)
    else:
        path = checkpoint if kind == "checkpoint" else rewrite(lambda c: None)
    kind = kind.partition(" ")[0]
    command = [sys.executable, str(Path(__file__).with_name("fuzz_files.py")), kind, str(path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(done.stdout)
    assert outcome["wrong"] == []
    assert outcome["refused"] + outcome["identical"] == count
    assert outcome["refused"] > 0.8 * count


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def foreign(kind, path):
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("learning_rate: 0.1\n" * 50)
        case "png":
            path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
        case "pickle":
            path.write_bytes(pickle.dumps(Bomb()))
        case "pickle as torch writes it":
            torch.save({"state_dict": Bomb()}, path)
        case "old format of torch":
            torch.save({"state_dict": Bomb()}, path, _use_new_zipfile_serialization=False)
        case "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("readme.txt", "hello")
        case "zip bomb":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/data.pkl", bytes(10**7))
        case "weights of another model":
            torch.save(torch.nn.Linear(3, 2).state_dict(), path)
        case "tensor":
            torch.save(torch.ones(3), path)
        case "checkpoint of another module":
            trainer = Trainer(
                max_steps=1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
            )
            trainer.fit(BoringModel())
            trainer.save_checkpoint(path)


FOREIGN = [
    "empty",
    "text",
    "png",
    "pickle",
    "pickle as torch writes it",
    "old format of torch",
    "zip",
    "zip bomb",
    "weights of another model",
    "tensor",
    "checkpoint of another module",
]


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(kind, tmp_path):
    path = tmp_path / "foreign.ckpt"
    foreign(kind, path)
    with pytest.raises(
        CheckpointError, match=r"foreign\.ckpt is not a checkpoint of this program.*--ckpt_path"
    ):
        MetaLearner.from_checkpoint(path)


def test_what_is_no_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "absent.ckpt"):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {path}.*--ckpt_path"):
            checkpoints.read(path)


def section(**changes):
    return lambda c: c["l2l_lightning"].update(changes)


def model(**changes):
    return lambda c: c["l2l_lightning"]["model"].update(changes)


def rule(**changes):
    return lambda c: c["l2l_lightning"]["model"]["rule"]["init_args"].update(changes)


def weights(key, value):
    return lambda c: c["state_dict"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (section(version=99), "newer version of this program: it has version 99.*Update"),
        (section(version="2"), "its version is '2'"),
        (lambda c: c.pop("l2l_lightning"), "no settings of a MetaLearner"),
        (lambda c: c["l2l_lightning"].pop("seed_everything"), "seed_everything"),
        (lambda c: c["l2l_lightning"].pop("model"), "settings of its model"),
        (lambda c: c["l2l_lightning"].pop("data"), "settings of its data"),
        (lambda c: c["l2l_lightning"]["model"].pop("task"), r"lacks model\.task"),
        (lambda c: c["l2l_lightning"]["model"].pop("rule"), r"lacks model\.rule"),
        (model(colour=1), r"does not know: model\.colour"),
        (model(seed=1), r"does not know: model\.seed"),
        (model(learning_rate=math.nan), r"model\.learning_rate=nan"),
        (model(learning_rate=torch.ones(1)), r"model\.learning_rate=tensor"),
        (model(task="Quadratic"), r"model\.task"),
        (model(rule={"class_path": 1}), r"model\.rule"),
        (rule(hidden_size=4096), "hidden_size must be 1 to 64, got 4096"),
        (rule(colour=1), r"describes no rule \(model\.rule\).*colour"),
        (
            lambda c: c["l2l_lightning"]["model"]["rule"].update(class_path="l2l_lightning.tasks.Quadratic"),
            "is not a UpdateRule",
        ),
        (rule(hidden_size=3), r"of the shape .* in state_dict, its rule"),
        (rule(num_layers=2), r"lacks rule\.bias_1, rule\.weight_1 in state_dict"),
        (lambda c: c.pop("state_dict"), r"weights \(state_dict\)"),
        (lambda c: c["state_dict"].pop("rule.head_bias"), r"lacks rule\.head_bias"),
        (weights("rule.extra", torch.ones(1)), r"its rule has not: rule\.extra"),
        (weights("rule.head_bias", 1.0), r"no tensor in state_dict under rule\.head_bias"),
        (weights("rule.head_bias", torch.ones(2)), r"rule\.head_bias of the shape \[2\]"),
        (weights("rule.head_bias", torch.tensor(1)), r"torch\.int64 in state_dict under rule\.head_bias"),
        (
            weights("rule.head_bias", torch.tensor(math.nan)),
            r"not finite, in state_dict under rule\.head_bias",
        ),
        (
            lambda c: c["current_model_state"].update({"rule.head_bias": torch.tensor(math.inf)}),
            "not finite, in current_model_state",
        ),
        (lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.ones(1)), "optimizer_states"),
        (lambda c: c["optimizer_states"][0]["state"][0]["exp_avg"].fill_(math.nan), "optimizer_states"),
        (lambda c: c["optimizer_states"][0].pop("param_groups"), "optimizer_states"),
        (lambda c: c["lr_schedulers"].clear(), "optimizer_states"),
        (lambda c: c.pop("rollouts"), "rollouts"),
        (lambda c: c["rollouts"][0].pop("state"), "rollouts"),
        (lambda c: c["rollouts"][0]["optimizees"].update(theta=torch.ones(1, 2)), "rollouts"),
        (lambda c: c["rollouts"][0].update(statistics=torch.ones(3, 9)), "rollouts"),
        (lambda c: c["rollouts"][0]["optimizees"]["generators"].pop(), "rollouts"),
        (lambda c: c["rollouts"][0].update(steps_done="2"), "rollouts"),
        (lambda c: c.pop("loops"), "loops"),
        (lambda c: c["loops"]["fit_loop"].pop("epoch_progress"), "loops"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*written by an older version")
def test_what_is_wrong_inside_is_named(change, message, rewrite):
    path = rewrite(change)
    with pytest.raises(CheckpointError, match=message) as refused:
        MetaLearner.from_checkpoint(path)
    assert "changed.ckpt" in str(refused.value)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("model", {"unroll": [9]}, r"unroll \(\[9\]\) must not exceed"),
        ("model", {"unroll": "x"}, "unroll must be a whole number"),
        ("model", {"horizon": 10**12}, "horizon must be at most"),
        ("model", {"horizon": []}, "horizon must be at least 1"),
        ("model", {"num_tasks": 10**9}, "num_tasks must be at most"),
        ("model", {"num_validation_optimizees": 2.5}, "num_validation_optimizees must be a whole number"),
        ("model", {"warmup_steps": [1]}, "warmup_steps must be a whole number"),
        ("model", {"learning_rate": "x"}, "learning_rate must be a number"),
        ("model", {"learning_rate": 0.0}, "learning_rate must be positive"),
        ("model", {"second_order": "yes"}, "second_order must be true or false"),
        ("model", {"lr_schedule": 4}, "lr_schedule must be one of constant, cosine"),
        ("model", {"checkpoint_every": "a"}, "checkpoint_every must be a whole number"),
        ("model", {"history_dtype": 3}, "history_dtype must be one of float32, bfloat16"),
        ("data", {"num_rollouts": 10**9}, "num_rollouts must be at most"),
        ("data", {"num_rollouts": True}, "num_rollouts must be a whole number"),
        ("data", {"root": 3}, "root must be a folder's path"),
        ("data", {"download": "x"}, "download must be true or false"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*written by an older version")
def test_a_checkpoints_settings_pass_the_constructors_own_checks(
    section, settings, message, rewrite, checkpoint
):
    """By the one function that both call: what a file says is refused in the words of the constructor."""
    path = rewrite(lambda c: c["l2l_lightning"][section].update(settings))
    with pytest.raises(CheckpointError, match=rf"changed\.ckpt has settings of its {section} .*{message}"):
        MetaLearner.from_checkpoint(path)
    saved = checkpoints.read(checkpoint)["l2l_lightning"][section] | settings
    make = {"model": lambda **s: MetaLearner(Quadratic(), CoordinatewiseLSTM(), **s), "data": MetaData}[
        section
    ]
    with pytest.raises((TypeError, ValueError), match=message):
        make(**{key: value for key, value in saved.items() if key not in ("task", "rule")})


def test_a_file_without_a_digest_is_read_if_it_is_old_and_with_a_warning(rewrite, checkpoint):
    with pytest.warns(UserWarning, match=r"changed\.ckpt was written by an older version.*CRC-32"):
        old = MetaLearner.from_checkpoint(rewrite(lambda c: None))
    new = MetaLearner.from_checkpoint(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"changed\.ckpt lacks its digest"):
        checkpoints.read(rewrite(lambda c: None, version=2))


def test_torch_reads_what_is_written(checkpoint):
    """The digest is the archive's comment: the file is still one of torch's."""
    whole = torch.load(checkpoint, weights_only=True)
    assert whole["global_step"] == 3
    assert zipfile.ZipFile(checkpoint).comment.startswith(b"l2l_lightning sha256 ")


# How it is written.


def test_a_checkpoint_has_ordinary_permissions_and_replaces_the_old_one_whole(
    checkpoint, tmp_path, monkeypatch
):
    path = tmp_path / "whole.ckpt"
    content = checkpoints.read(checkpoint)
    before = os.umask(0o022)
    try:
        checkpoints.write(content, path)
        pretrained.save(make_model().rule, tmp_path / "rule.safetensors")
    finally:
        os.umask(before)
    for written in (path, tmp_path / "rule.safetensors"):
        assert stat.S_IMODE(written.stat().st_mode) == 0o644
    old = path.read_bytes()

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write({**content, "global_step": 4}, path)
    assert path.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rule.safetensors", "whole.ckpt"]


def test_checkpoints_are_not_written_to_a_folder_named_like_a_url(checkpoint):
    with pytest.raises(CheckpointError, match=r"local disks only \(--checkpoint\.dirpath\)"):
        checkpoints.write(checkpoints.read(checkpoint), "s3://bucket/last.ckpt")


def test_one_rule_gives_one_file(tmp_path):
    for name in ("a", "b"):
        pretrained.save(make_model().rule, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["fit", "validate"])
def test_lightning_reads_by_the_same_way(what, checkpoint, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", inference_mode=False, logger=False, enable_checkpointing=False
    )
    run = getattr(trainer, what)
    with pytest.raises(CheckpointError, match=r"damaged\.ckpt is damaged"):
        run(make_model(), datamodule=MetaData(num_rollouts=4), ckpt_path=damaged)
    with pytest.raises(CheckpointError, match=r"weights_only.*must not be false"):
        run(make_model(), datamodule=MetaData(num_rollouts=4), ckpt_path=checkpoint, weights_only=False)


# Nothing is executed.


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module whose import leaves a mark; returns the mark's path."""
    mark = tmp_path / "mark"
    (tmp_path / "evil_module.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "import torch\nfrom l2l_lightning import CoordinatewiseLSTM, Quadratic\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Task(Quadratic): pass\n"
        "class Rule(CoordinatewiseLSTM): pass\n"
        "class Mine(Callback): pass\n"
        "def f(theta): return theta.square().sum()\n"
        "def init(generator): return torch.ones(2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("evil_module", None)


def named(name, class_path, **init_args):
    return model(**{name: {"class_path": class_path, "init_args": init_args}})


FUNCTION, MODULE = "l2l_lightning.tasks.FunctionTask", "l2l_lightning.tasks.ModuleTask"
NAMED = {
    "task": named("task", "evil_module.Task"),
    "rule": named("rule", "evil_module.Rule", num_layers=1, hidden_size=2, preprocessing="identity"),
    "f": named("task", FUNCTION, f="evil_module.f", dim=2),
    "init": named("task", FUNCTION, f="torch.nn.functional.relu", dim=2, init="evil_module.init"),
    "nested": named("task", FUNCTION, f="evil_module.<locals>.f", dim=2),
    "module": named("task", MODULE, module="evil_module.f"),
    "loss_fn": named("task", MODULE, module="torch.nn.Linear", loss_fn="evil_module.f"),
    "sample": named("task", MODULE, module="torch.nn.Linear", sample="evil_module.f"),
    "member": named(
        "task", "l2l_lightning.tasks.Mixture", tasks=[{"class_path": "evil_module.Task", "init_args": {}}]
    ),
    "elsewhere in the package": named("task", FUNCTION, f="l2l_lightning.cli.main", dim=2),
    "standard library": named("task", FUNCTION, f="os.system", dim=2),
}


@pytest.mark.parametrize("where", NAMED)
@pytest.mark.filterwarnings("ignore:.*written by an older version")
def test_code_that_a_checkpoint_names_is_not_imported(where, rewrite, evil, fails):
    path = rewrite(NAMED[where])
    with pytest.raises(CheckpointError, match=r"names .*: code that is not this package's.*--trust .*trust="):
        MetaLearner.from_checkpoint(path)
    for command in ("test", "compare", "fit"):
        assert "--trust" in fails(command, f"--ckpt_path={path}", "--wandb=off")
    assert not evil.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    "path", ["evil_module./X", "0evil_module.Rule", "evil-module.Rule", "./evil_module.Rule"]
)
@pytest.mark.filterwarnings("ignore:.*written by an older version")
def test_what_is_no_dotted_path_is_not_imported(path, rewrite, evil, tmp_path):
    """An import would take more than Python's names."""
    for name in ("0evil_module", "evil-module"):
        (tmp_path / f"{name}.py").write_bytes((tmp_path / "evil_module.py").read_bytes())
    for where in ("task", "rule"):
        changed = rewrite(named(where, path))
        for trust in ([], ["evil_module", "0evil_module", "evil-module"]):
            with pytest.raises(CheckpointError, match=re.escape(path)):
                MetaLearner.from_checkpoint(changed, trust=trust)
    assert not evil.exists()


@pytest.mark.filterwarnings("ignore:.*written by an older version")
def test_code_that_is_trusted_is_imported(rewrite, evil, tmp_path, capsys):
    path = rewrite(NAMED["task"])
    with pytest.raises(CheckpointError, match=r"names evil_module\.Task"):
        MetaLearner.from_checkpoint(path, trust=["evil"])  # a module's name, not how one begins
    again = MetaLearner.from_checkpoint(path, trust=["evil_module"])
    assert type(again.task).__name__ == "Task"
    path = rewrite(NAMED["f"])
    arguments = [f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    main(["test", *arguments, "--trust=other,evil_module"])
    assert "test/final_loss" in capsys.readouterr().out
    main(["test", *arguments, "--trust", "evil_module.f"])  # one function
    assert "test/final_loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "task",
    [FunctionTask(torch.nn.functional.gelu, dim=1), Mixture([Quadratic(dim=2), SimpleSquare(dim=2)])],
    ids=["function of torch", "mixture"],
)
def test_torchs_functions_and_the_packages_tasks_need_no_trust(task, tmp_path):
    path = tmp_path / "ours.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FunctionTask, "loss", lambda self, theta, batch: self.f(theta).sum())
        fit(make_model(task), tmp_path, limit_val_batches=0).save_checkpoint(path)
    assert MetaLearner.from_checkpoint(path).task.config() == task.config()


EVIL_CONFIGS = {
    "callback": {"trainer": {"callbacks": [{"class_path": "evil_module.Mine"}]}},
    "callback by its name": {"trainer": {"callbacks": "evil_module.Mine"}},
    "logger": {"trainer": {"logger": {"class_path": "evil_module.Mine", "init_args": {}}}},
    "strategy": {"trainer": {"strategy": "evil_module.Mine"}},
    "plugin": {"trainer": {"plugins": ["evil_module.Mine"]}},
    "function": {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                    "init_args": {"on_fit_start": "evil_module.f"},
                }
            ]
        }
    },
}


@pytest.mark.parametrize("where", EVIL_CONFIGS)
def test_code_that_the_configuration_beside_a_checkpoint_names_is_not_imported(
    where, checkpoint, evil, fails
):
    config = checkpoint.parent.parent / "config.yaml"
    config.write_text(yaml.safe_dump(EVIL_CONFIGS[where]))
    try:
        printed = fails("fit", f"--ckpt_path={checkpoint}", "--wandb=off")
    finally:
        config.unlink()
    assert f"{config} names evil_module" in printed
    assert not evil.exists()


@pytest.mark.parametrize(
    "content", ["trainer: [", "- 1\n", "!!python/object/apply:os.system [true]", b"\xff\xfe"]
)
def test_a_configuration_beside_a_checkpoint_that_is_none_is_named(content, checkpoint, fails):
    config = checkpoint.parent.parent / "config.yaml"
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        printed = fails("fit", f"--ckpt_path={checkpoint}", "--wandb=off")
    finally:
        config.unlink()
    assert f"error: {config}, which a resumed run reads, is not" in printed
    assert printed.count("\n") == 1


# A resumed run with other options.


class Record(Callback):
    """The rate of every meta-step, and how many optimizees its rollout had."""

    def __init__(self):
        self.rates, self.optimizees = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        rollout = pl_module._rollout
        self.optimizees.append(None if rollout is None else len(rollout.optimizees))


def resume(path, folder, task=None, num_rollouts=4, callbacks=(), trainer=None, **arguments):
    record = Record()
    resumed = make_model(task, **arguments)
    fit(
        resumed,
        folder,
        PhiAveraging(0.5),
        CollapseGuard(),
        *callbacks,
        record,
        num_rollouts=num_rollouts,
        ckpt_path=path,
        **{"limit_val_batches": 0, **(trainer or {})},
    )
    return resumed, record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": Quadratic(dim=3)}, r"--model\.task\.dim is 3, the checkpoint's 2"),
        ({"task": SimpleSquare(dim=2)}, r"--model\.task is SimpleSquare, the checkpoint's Quadratic"),
        ({"rule": {"hidden_size": 3}}, r"--model\.rule\.hidden_size is 3, the checkpoint's 2"),
        ({"rule": {"output_scale": 0.5}}, r"--model\.rule\.output_scale is 0\.5, the checkpoint's 0\.1"),
        ({"rule": {"forget_bias": 0.5}}, r"--model\.rule\.forget_bias is 0\.5, the checkpoint's 1\.0"),
        ({"horizon": 6}, r"--model\.horizon is 6, the checkpoint's 4"),
        ({"horizon": [4, 6]}, r"--model\.horizon is \[4, 6\], the checkpoint's 4"),
        ({"unroll": 4}, r"--model\.unroll is \[4\], the checkpoint's \[2\]"),
        ({"num_tasks": 4}, r"--model\.num_tasks is 4 on 1 processes, the checkpoint's 2 on 1"),
        ({"seed": 1}, r"--seed_everything is 1, the checkpoint's 0"),
        ({"num_rollouts": 1}, r"--data\.num_rollouts is 1, the checkpoint's 4, and 3 windows have been run"),
        (
            {
                "start_from": "lstm-mnist",
                "rule": {"num_layers": 2, "hidden_size": 20, "preprocessing": "log_sign"},
            },
            r"--model\.start_from lstm-mnist",
        ),
    ],
)
def test_an_option_that_a_resumed_run_cannot_honour_is_refused(changes, message, checkpoint, tmp_path):
    with pytest.raises(CheckpointMismatchError, match=message):
        resume(checkpoint, tmp_path, **changes)


def test_a_run_resumed_with_its_own_options_honours_its_schedule(checkpoint, tmp_path):
    _, record = resume(checkpoint, tmp_path)
    # The run was cut at 3 of its 8 meta-steps, and had been told that they were 3.
    expected = [0.01 * 0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(3, 8)]
    assert record.rates == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": 0.02}, lambda t: 0.02 * 0.5 * (1 + math.cos(math.pi * t / 8))),
        ({"lr_schedule": "constant"}, lambda t: 0.01),
        ({"lr_schedule": "constant", "warmup_steps": 9}, lambda t: 0.01 * (t + 1) / 10),
        ({"num_rollouts": 6}, lambda t: 0.01 * 0.5 * (1 + math.cos(math.pi * t / 12))),
    ],
)
def test_the_rate_of_a_resumed_run_is_the_one_given(changes, expected, checkpoint, tmp_path):
    _, record = resume(checkpoint, tmp_path, **changes)
    steps = range(3, 2 * changes.get("num_rollouts", 4))
    assert record.rates == pytest.approx([expected(t) for t in steps], abs=1e-15)


def test_a_rate_that_a_restart_has_halved_stays_half_of_the_one_given(rewrite, tmp_path):
    def halve(content):
        content["lr_schedulers"][0]["base_lrs"] = [0.005]

    with pytest.warns(UserWarning, match="older version"):
        _, record = resume(rewrite(halve), tmp_path, learning_rate=0.04, lr_schedule="constant")
    assert record.rates == pytest.approx([0.02] * 5)


def test_between_two_rollouts_their_number_of_optimizees_must_stay_too(boundary, tmp_path):
    """The streams of the rollouts to come would overlap with those of the earlier ones."""
    with pytest.raises(CheckpointMismatchError, match=r"--model\.num_tasks is 5"):
        resume(boundary, tmp_path, num_tasks=5)


def test_a_run_can_be_shortened_to_what_it_has_done(boundary, tmp_path):
    resumed, record = resume(boundary, tmp_path, num_rollouts=1)
    assert record.rates == []
    assert torch.equal(resumed.rule.head_weight, MetaLearner.from_checkpoint(boundary).rule.head_weight)


@pytest.mark.parametrize(
    "changes", [{"loss_weights": "final"}, {"second_order": True}], ids=["loss_weights", "second_order"]
)
def test_how_meta_gradients_are_taken_can_change(changes, checkpoint, tmp_path):
    plain, _ = resume(checkpoint, tmp_path)
    other, _ = resume(checkpoint, tmp_path, **changes)
    assert not torch.equal(plain.rule.head_weight, other.rule.head_weight)


def test_how_many_optimizees_are_validated_can_change(checkpoint, tmp_path, monkeypatch):
    counts = []
    import l2l_lightning.training.meta_learner as module

    original = module.run_rule
    monkeypatch.setattr(
        module,
        "run_rule",
        lambda rule, optimizees, *rest: counts.append(len(optimizees)) or original(rule, optimizees, *rest),
    )
    resume(checkpoint, tmp_path, num_validation_optimizees=7, trainer={"limit_val_batches": 1})
    assert set(counts) == {7}


def test_the_backend_can_change(checkpoint, tmp_path):
    resumed, _ = resume(checkpoint, tmp_path, rule={"backend": "reference"})
    assert resumed.rule.backend == "reference"


def test_the_patience_of_early_stopping_can_change(tmp_path):
    def stopping(patience):
        return EarlyStopping("meta_loss", patience=patience, check_on_train_epoch_end=True)

    trainer = fit(make_model(), tmp_path, stopping(3), max_steps=3, num_rollouts=4, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    callback = stopping(9)
    fit(
        make_model(), tmp_path, callback, num_rollouts=4, limit_val_batches=0, ckpt_path=tmp_path / "cut.ckpt"
    )
    assert callback.patience == 9


def test_another_number_of_optimizees_in_all_cannot_go_on(rewrite, tmp_path):
    def two_processes(content):
        content["rollouts"] *= 2

    with (
        pytest.warns(UserWarning, match="older version"),
        pytest.raises(
            CheckpointMismatchError, match=r"num_tasks is 2 on 1 processes.*2 on 2.*--trainer\.devices"
        ),
    ):
        resume(rewrite(two_processes), tmp_path)


def test_a_checkpoint_of_weights_alone_cannot_be_resumed_from(tmp_path):
    trainer = fit(make_model(), tmp_path, limit_val_batches=0)
    path = tmp_path / "weights.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    assert MetaLearner.from_checkpoint(path).horizon == 4
    with pytest.raises(CheckpointError, match=r"weights only.*--checkpoint\.save_weights_only"):
        fit(make_model(), tmp_path, ckpt_path=path)


def test_a_finished_run_goes_on_when_it_is_made_longer(tmp_path):
    """As long as the learning rate does not depend on the length, it ends where a run of that length ends."""
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1)
    settings = {"lr_schedule": "constant"}
    fit(make_model(**settings), tmp_path, kept, num_rollouts=2, limit_val_batches=0)
    longer, whole = make_model(**settings), make_model(**settings)
    fit(longer, tmp_path, num_rollouts=4, limit_val_batches=0, ckpt_path=kept.last_model_path)
    fit(whole, tmp_path, num_rollouts=4, limit_val_batches=0)
    for ours, theirs in zip(longer.rule.parameters(), whole.rule.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_command_line_names_the_option_that_a_resumed_run_refuses(checkpoint, fails, tmp_path):
    printed = fails(
        "fit",
        f"--ckpt_path={checkpoint}",
        "--model.num_tasks=4",
        "--wandb=off",
        f"--trainer.default_root_dir={tmp_path}",
    )
    assert "--model.num_tasks is 4 on 1 processes, the checkpoint's 2" in printed
    assert printed.startswith("error: ")
