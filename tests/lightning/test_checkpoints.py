"""Checkpoints: whole or not at all, read or refused by name; what a run that goes on honours or refuses."""

import json
import math
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from meta_training import cut_run, fit, make_small, watchers

from l2l_lightning import CoordinatewiseLSTM, MetaData, MetaLearner, Quadratic, pretrained
from l2l_lightning.tasks import SimpleSquare
from l2l_lightning.training import checkpoints, meta_learner
from l2l_lightning.training.callbacks import PhiAveraging
from l2l_lightning.training.checkpoints import CheckpointError
from l2l_lightning.training.meta_learner import CheckpointMismatchError


@pytest.fixture(scope="module")
def boundary(tmp_path_factory):
    """Written between two rollouts."""
    return cut_run(tmp_path_factory.mktemp("boundary"), meta_steps=2)


# What is read.


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory")
@pytest.mark.parametrize(("kind", "count"), [("checkpoint", 1000), ("weights", 500)])
def test_a_damaged_file_is_refused_or_read_as_the_original(kind, count, checkpoint, tmp_path):
    """Mutants, read in a process of their own with a limit on its memory and on its time."""
    path = tmp_path / "original.safetensors"
    if kind == "weights":
        pretrained.save(make_small().rule, path)
    else:
        path = checkpoint
    command = [sys.executable, str(Path(__file__).with_name("fuzz_files.py")), kind, str(path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(done.stdout)
    assert outcome["wrong"] == []
    assert outcome["refused"] + outcome["identical"] == count
    assert outcome["refused"] > 0.8 * count


def test_what_is_no_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "absent.ckpt", "x" * 5000, "a/" * 3000, "nul\0.ckpt"):
        with pytest.raises(CheckpointError, match=r"no checkpoint at.*--ckpt_path"):
            checkpoints.read(path)


def section(**changes):
    return lambda c: c["l2l_lightning"].update(changes)


def model(**changes):
    return lambda c: c["l2l_lightning"]["model"].update(changes)


def data(**changes):
    return lambda c: c["l2l_lightning"]["data"].update(changes)


def rule(**changes):
    return lambda c: c["l2l_lightning"]["model"]["rule"]["init_args"].update(changes)


def weights(key, value):
    return lambda c: c["state_dict"].__setitem__(key, value)


def without(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (section(version=99), "newer version of this program: it has version 99.*Update"),
        (section(version="2"), "l2l_lightning: version must be a whole number, got '2'"),
        (without("l2l_lightning"), "no settings of a MetaLearner"),
        (without("l2l_lightning", "seed_everything"), "there is no 'seed_everything'"),
        (section(seed_everything=2**40), "seed_everything must be at most"),
        (section(meta_steps="x"), "meta_steps must be a whole number"),
        (without("l2l_lightning", "model"), "model: there is no 'model'"),
        (without("l2l_lightning", "data"), "data: there is no 'data'"),
        (without("l2l_lightning", "model", "task"), r"model\.task: there is no 'task'"),
        (model(task="Quadratic"), r"model\.task"),
        (model(rule={"class_path": 1}), r"model\.rule: it is no rule"),
        (model(rule={"class_path": "l2l_lightning.tasks.Quadratic"}), r"model\.rule: .*not a Rule"),
        (rule(hidden_size=4096), r"model\.rule: hidden_size must be 1 to 64, got 4096"),
        (rule(colour=1), r"model\.rule: .*colour"),
        (rule(gradient_scale=math.inf), "model: Out of range float values are not JSON compliant"),
        (rule(hidden_size=3), r"state_dict\.rule\.weight_0 is a tensor \[8, 3\].*, where .* \[12, 4\]"),
        (without("state_dict"), "state_dict is None"),
        (without("state_dict", "rule.head_bias"), r"state_dict lacks rule\.head_bias"),
        (weights("rule.extra", torch.ones(1)), r"state_dict holds what the rule has not: rule\.extra"),
        (weights("rule.head_bias", 1.0), r"state_dict\.rule\.head_bias is 1\.0, where a tensor"),
        (weights("rule.head_bias", torch.ones(2)), r"rule\.head_bias is a tensor \[2\]"),
        (weights("rule.head_bias", torch.tensor(1)), r"rule\.head_bias is a tensor .*torch\.int64"),
        (weights("rule.head_bias", torch.tensor(math.nan)), r"rule\.head_bias is .* that are not finite"),
        (lambda c: c["current_model_state"]["rule.head_bias"].fill_(math.inf), "current_model_state.*finite"),
    ],
)
def test_what_is_wrong_inside_is_named(change, message, rewrite):
    with pytest.raises(CheckpointError, match=rf"changed\.ckpt.*{message}") as refused:
        MetaLearner.from_checkpoint(rewrite(change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.ones(1)), "optimizer_states or"),
        (
            lambda c: c["optimizer_states"][0]["state"][0]["exp_avg"].fill_(math.nan),
            "meta-step .* not finite",
        ),
        (without("optimizer_states", 0, "param_groups"), "optimizer_states or .*param_groups"),
        (lambda c: c["lr_schedulers"].clear(), "lr_schedulers: "),
        (without("rollouts"), "there is no 'rollouts'"),
        (without("rollouts", 0, "state"), r"progress.state is \[\], where"),
        (
            lambda c: c["rollouts"][0]["optimizees"].update(theta=torch.ones(1, 2)),
            "progress.optimizees.theta is a tensor",
        ),
        (lambda c: c["rollouts"][0].update(statistics=torch.ones(3, 9)), "progress.statistics.0 is a tensor"),
        (without("rollouts", 0, "optimizees", "generators", 0), "progress.optimizees.generators is"),
        (lambda c: c["rollouts"][0].update(steps_done="2"), "progress.steps_done is '2', where 0"),
        (without("loops"), "there is no 'loops'"),
        (without("loops", "fit_loop", "epoch_progress"), "loops.fit_loop lacks epoch_progress"),
    ],
)
def test_what_no_run_can_go_on_with_is_named(change, message, rewrite, tmp_path):
    """It is no reason to refuse the rule."""
    path = rewrite(change)
    with pytest.raises(CheckpointError, match=rf"changed\.ckpt.*--ckpt_path.*{message}"):
        resume(path, tmp_path)
    assert MetaLearner.from_checkpoint(path).horizon == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (model(colour=1), r"does not know the settings colour|unexpected keyword argument 'colour'"),
        (model(unroll=[9]), r"unroll \(\[9\]\) must not exceed"),
        (model(horizon=10**12), "horizon must be at most"),
        (model(horizon=[]), "horizon must be at least 1"),
        (model(num_tasks=10**9), "num_tasks must be at most"),
        (model(warmup_steps=[1]), "warmup_steps must be a whole number"),
        (model(learning_rate=math.nan), "learning_rate must be finite"),
        (model(learning_rate=torch.ones(1)), "learning_rate must be a number"),
        (model(second_order="yes"), "second_order must be true or false"),
        (model(lr_schedule=4), "lr_schedule must be one of constant, cosine"),
        (model(checkpoint_every="a"), "checkpoint_every must be a whole number"),
        (data(num_rollouts=10**9), "num_rollouts must be at most"),
        (data(root=3), "root must be a folder's path"),
    ],
)
def test_a_checkpoints_settings_are_refused_in_the_constructors_words(change, message, rewrite, checkpoint):
    with pytest.raises(CheckpointError, match=rf"changed\.ckpt.*{message}"):
        MetaLearner.from_checkpoint(rewrite(change))
    content = checkpoints.read(checkpoint)
    change(content)
    settings = content["l2l_lightning"]
    settings["model"].update(task=Quadratic(), rule=CoordinatewiseLSTM())
    with pytest.raises((TypeError, ValueError), match=message):
        MetaLearner(**settings["model"]), MetaData(**settings["data"])


def test_files_of_earlier_versions_are_read_and_gone_on_from(rewrite, checkpoint, tmp_path):
    """Version 2 ended with a digest, in the archive's comment; version 1 had neither that nor masks."""
    expected, _ = resume(checkpoint, tmp_path)
    for version in (1, 2):
        path = rewrite(section(version=version))
        if version == 1:
            path = rewrite(lambda c: [section(version=1)(c), c["rollouts"][0].pop("masked")])
        else:
            digest = b"l2l_lightning sha256 " + b"0" * 64
            path.write_bytes(path.read_bytes()[:-2] + len(digest).to_bytes(2, "little") + digest)
        assert torch.equal(
            MetaLearner.from_checkpoint(path).rule.phi(), MetaLearner.from_checkpoint(checkpoint).rule.phi()
        )
        assert torch.equal(resume(path, tmp_path)[0].rule.phi(), expected.rule.phi())


@pytest.mark.parametrize("what", ["fit", "validate"])
def test_lightning_reads_by_the_same_way(what, checkpoint, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    run = getattr(Trainer(max_epochs=1, inference_mode=False, **quiet), what)
    with pytest.raises(CheckpointError, match=r"damaged\.ckpt is .*damaged"):
        run(make_small(), datamodule=MetaData(num_rollouts=4), ckpt_path=damaged)
    with pytest.raises(CheckpointError, match=r"weights_only.*must not be false"):
        run(make_small(), datamodule=MetaData(num_rollouts=4), ckpt_path=checkpoint, weights_only=False)


# How it is written.


def test_a_checkpoint_has_ordinary_permissions_and_replaces_the_old_one_whole(
    checkpoint, tmp_path, monkeypatch
):
    path = tmp_path / "whole.ckpt"
    content = checkpoints.read(checkpoint)
    before = os.umask(0o022)
    try:
        checkpoints.write(content, path)
        pretrained.save(make_small().rule, tmp_path / "rule.safetensors")
    finally:
        os.umask(before)
    for written in (path, tmp_path / "rule.safetensors"):
        assert stat.S_IMODE(written.stat().st_mode) == 0o644
    assert torch.load(path, weights_only=True)["global_step"] == 3
    assert zipfile.ZipFile(path).testzip() is None
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
        pretrained.save(make_small().rule, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# A resumed run with other options.


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def resume(path, folder, task=None, trainer=None, num_rollouts=4, **arguments):
    """The learner that goes on, and the rate of every meta-step."""
    record, resumed = Rates(), make_small(task, **arguments)
    settings = {"num_rollouts": num_rollouts, "limit_val_batches": 0} | (trainer or {})
    fit(resumed, folder, *watchers(folder), record, ckpt_path=path, **settings)
    return resumed, record.rates


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": Quadratic(dim=3)}, r"--model\.task\.dim is 3, the checkpoint's 2"),
        ({"task": SimpleSquare(dim=2)}, r"--model\.task is SimpleSquare, the checkpoint's Quadratic"),
        ({"rule": {"hidden_size": 3}}, r"--model\.rule\.hidden_size is 3, the checkpoint's 2"),
        ({"rule": {"forget_bias": 0.5}}, r"--model\.rule\.forget_bias is 0\.5, the checkpoint's 1\.0"),
        ({"horizon": [4, 6]}, r"--model\.horizon is \[4, 6\], the checkpoint's 4"),
        ({"unroll": 4}, r"--model\.unroll is \[4\], the checkpoint's \[2\]"),
        ({"num_tasks": 4}, r"--model\.num_tasks is 4 on 1 processes, the checkpoint's 2 on 1"),
        ({"seed": 1}, r"--seed_everything is 1, the checkpoint's 0"),
        ({"num_rollouts": 1}, r"--data\.num_rollouts is 1, the checkpoint's 4, and 3 windows have been run"),
        (
            {"start_from": "lstm-mnist", "rule": CoordinatewiseLSTM().config()},
            r"--model\.start_from lstm-mnist",
        ),
    ],
)
def test_an_option_that_a_resumed_run_cannot_honour_is_refused(changes, message, checkpoint, tmp_path):
    with pytest.raises(CheckpointMismatchError, match=message):
        resume(checkpoint, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The run was cut at 3 of its 8 meta-steps, and had been told that they were 3.
        ({}, lambda t: 0.01 * 0.5 * (1 + math.cos(math.pi * t / 8))),
        ({"learning_rate": 0.02}, lambda t: 0.02 * 0.5 * (1 + math.cos(math.pi * t / 8))),
        ({"lr_schedule": "constant"}, lambda t: 0.01),
        ({"lr_schedule": "constant", "warmup_steps": 9}, lambda t: 0.01 * (t + 1) / 10),
        ({"num_rollouts": 6}, lambda t: 0.01 * 0.5 * (1 + math.cos(math.pi * t / 12))),
    ],
)
def test_the_rate_of_a_resumed_run_is_the_one_given(changes, expected, checkpoint, tmp_path):
    _, rates = resume(checkpoint, tmp_path, **changes)
    steps = range(3, 2 * changes.get("num_rollouts", 4))
    assert rates == pytest.approx([expected(t) for t in steps], abs=1e-15)


def test_a_rate_that_a_restart_has_halved_stays_half_of_the_one_given(rewrite, tmp_path):
    path = rewrite(lambda c: c["lr_schedulers"][0].update(base_lrs=[0.005]))
    _, rates = resume(path, tmp_path, learning_rate=0.04, lr_schedule="constant")
    assert rates == pytest.approx([0.02] * 5)


def test_the_number_of_optimizees_in_all_must_stay(boundary, rewrite, tmp_path):
    """Between two rollouts too: the streams of those to come would overlap with those of the earlier ones."""
    with pytest.raises(CheckpointMismatchError, match=r"--model\.num_tasks is 5"):
        resume(boundary, tmp_path, num_tasks=5)
    path = rewrite(lambda c: c.update(rollouts=c["rollouts"] * 2))
    with pytest.raises(CheckpointMismatchError, match=r"is 2 on 1 processes.*2 on 2.*--trainer\.devices"):
        resume(path, tmp_path)


def test_a_run_can_be_shortened_to_what_it_has_done(boundary, tmp_path):
    resumed = make_small()
    fit(resumed, tmp_path, PhiAveraging(0.5), num_rollouts=1, limit_val_batches=0, ckpt_path=boundary)
    assert torch.equal(resumed.rule.phi(), MetaLearner.from_checkpoint(boundary).rule.phi())


def test_how_meta_gradients_are_taken_can_change(checkpoint, tmp_path):
    plain = resume(checkpoint, tmp_path)[0].rule
    for changes in ({"loss_weights": "final"}, {"second_order": True}):
        assert not torch.equal(plain.phi(), resume(checkpoint, tmp_path, **changes)[0].rule.phi())
    other = resume(checkpoint, tmp_path, rule={"backend": "reference"})[0].rule
    assert other.backend == "reference"


def test_how_many_optimizees_are_validated_can_change(checkpoint, tmp_path, monkeypatch):
    counts, run_rule = [], meta_learner.run_rule

    def count(rule, optimizees, *rest):
        counts.append(len(optimizees))
        return run_rule(rule, optimizees, *rest)

    monkeypatch.setattr(meta_learner, "run_rule", count)
    resume(checkpoint, tmp_path, num_validation_optimizees=7, trainer={"limit_val_batches": 1})
    assert set(counts) == {7}


def test_the_patience_of_early_stopping_can_change(checkpoint, tmp_path):
    callback = EarlyStopping("meta_loss", patience=9, check_on_train_epoch_end=True)
    fit(make_small(), tmp_path, callback, num_rollouts=4, limit_val_batches=0, ckpt_path=checkpoint)
    assert checkpoints.read(checkpoint)["callbacks"][callback.state_key]["patience"] == 30
    assert callback.patience == 9


def test_a_checkpoint_of_weights_alone_cannot_be_resumed_from(tmp_path):
    trainer = fit(make_small(), tmp_path, limit_val_batches=0)
    path = tmp_path / "weights.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    assert MetaLearner.from_checkpoint(path).horizon == 4
    with pytest.raises(CheckpointError, match=r"weights only.*--checkpoint\.save_weights_only"):
        fit(make_small(), tmp_path, ckpt_path=path)


def test_a_finished_run_is_not_made_longer(tmp_path):
    """Lightning takes the end of a run's epoch for its end: it would go on with nothing, in silence."""
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1)
    trainer = fit(make_small(), tmp_path, kept, num_rollouts=2, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for path in (kept.last_model_path, tmp_path / "after.ckpt"):
        with pytest.raises(
            CheckpointMismatchError,
            match=r"over after 4 windows.* 8 .--data.num_rollouts.*--model\.start_from",
        ):
            fit(make_small(), tmp_path, num_rollouts=4, limit_val_batches=0, ckpt_path=path)
        again = make_small()
        fit(again, tmp_path, num_rollouts=2, limit_val_batches=0, ckpt_path=path)
        assert torch.equal(again.rule.phi(), MetaLearner.from_checkpoint(path).rule.phi())


def test_the_command_line_names_the_option_that_a_resumed_run_refuses(checkpoint, fails, tmp_path):
    options = ["--model.num_tasks=4", "--wandb=off", f"--trainer.default_root_dir={tmp_path}"]
    printed = fails("fit", f"--ckpt_path={checkpoint}", *options)
    assert "--model.num_tasks is 4 on 1 processes, the checkpoint's 2" in printed
    assert printed.startswith("error: ")
