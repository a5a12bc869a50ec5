"""The trainer's precision: what rounds and what does not, and which there is none of."""

import csv
import math

import pytest
import torch
from l2l_kernels import BackendUnavailableError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from meta_training import fit, make_rule

from l2l_lightning import CoordinatewiseLSTM, MetaLearner, Optimizees, Quadratic, Rollout, pretrained
from l2l_lightning.errors import CheckpointMismatchError
from l2l_lightning.optim.state_dict import digest_of
from l2l_lightning.rules import CorrectedDirection, CorrectedStepSize, RNNprop
from l2l_lightning.training.callbacks import CollapseGuard, MetaTrainingError, PhiAveraging

MIXED = {
    "bf16-mixed": ["--trainer.precision=bf16-mixed"],
    # Lightning takes bfloat16 for it on a CPU, and says so; its plugin does not.
    "16-mixed": ["--trainer.precision=16-mixed"],
    "float16 and a scaler": [
        "--trainer.plugins=MixedPrecision",
        "--trainer.plugins.precision=16-mixed",
        "--trainer.plugins.device=cpu",
    ],
}


def float16():
    return MixedPrecision("16-mixed", "cpu")


def make_model(task=None, rule=None, **arguments):
    settings = {"horizon": 6, "unroll": 4, "num_tasks": 3, "num_validation_optimizees": 2, "seed": 5}
    return MetaLearner(task or Quadratic(dim=3), rule or make_rule(), **{**settings, **arguments})


def rounding_rule(precision="bf16"):
    """A rule whose products are rounded: by the compiled kernels where they can, else by the reference."""
    rule = make_rule(precision=precision)
    try:
        rule.kernels_on(torch.device("cpu"))
    except BackendUnavailableError:
        rule.backend = "reference"
    return rule


@pytest.mark.parametrize(
    ("task", "of_losses", "of_phi"),
    # Its products are rounded to bfloat16, unit roundoff 2^-8: the loss at θ, a square, by two such units.
    # φ, by how far it has moved: Adam's steps of gradients that err by units, a few of them small.
    [("Quadratic", 2**-7, 2**-5), ("NoisyScaledSquare", 0, 0)],  # the second has nothing that is rounded
)
@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'")
def test_mixed_precision_meta_trains_as_float32_does(task, of_losses, of_phi, tiny_fit, tmp_path):
    """`fit` from end to end: what is not the optimizee's own network is the same, bit for bit."""
    start = CoordinatewiseLSTM(preprocessing="identity")
    pretrained.save(start, tmp_path / "start.safetensors")

    def run(*precision):
        folder = tiny_fit(
            f"--model.task={task}",
            f"--model.start_from={tmp_path / 'start.safetensors'}",
            "--trainer.log_every_n_steps=1",
            *precision,
        )
        with (folder / "metrics.csv").open(encoding="utf-8") as file:
            losses = [float(row["meta_loss"]) for row in csv.DictReader(file) if row["meta_loss"]]
        phi = MetaLearner.from_checkpoint(folder / "checkpoints/last.ckpt").rule.phi().detach()
        return torch.tensor(losses, dtype=torch.float64), phi

    losses, phi = run("--trainer.precision=32-true")
    moved = (phi - start.phi()).norm().item()
    assert len(losses) == 4
    assert moved > 0
    for name, arguments in MIXED.items():
        ours, theirs = run(*arguments)
        torch.testing.assert_close(ours, losses, rtol=of_losses, atol=0, msg=name)
        assert (theirs - phi).norm().item() <= of_phi * moved, name


def test_double_precision_is_adam_on_float64_meta_gradients(tmp_path):
    """Its average too; on the optimizees that float32 trains on, for draws do not depend on the precision."""
    model = make_model(lr_schedule="constant", learning_rate=0.01)
    fit(model, tmp_path, PhiAveraging(decay=0.5), precision="64-true", val_check_interval=1)

    rule = make_rule().double()
    adam = torch.optim.Adam(rule.parameters(), lr=0.01)
    history = []
    for rollout in range(2):
        indices = range(3 * rollout, 3 * rollout + 3)
        inner = Rollout(rule, Optimizees(model.task, None, 5, "train", indices, dtype=torch.float64))
        for unroll in (4, 2):
            adam.zero_grad()
            inner.window(unroll).meta_loss.backward()
            adam.step()
            history.append(rule.phi().detach().clone())
    average = history[0]
    for phi in history[1:]:
        average = 0.5 * average + 0.5 * phi
    assert model.rule.phi().dtype == torch.float64
    torch.testing.assert_close(model.rule.phi().detach(), average, rtol=1e-12, atol=1e-14)


def test_a_scaler_that_overflows_is_no_collapse(tmp_path):
    """To second order the factor goes through the optimizee's float16 network, for which it is too large."""
    plugin, guard, model = float16(), CollapseGuard(), make_model(second_order=True)
    fit(model, tmp_path, guard, plugins=plugin, num_rollouts=6, limit_val_batches=0)
    assert guard.restarts == 0
    assert 1 < plugin.scaler.get_scale() < 2**16
    assert model.rule.phi().isfinite().all()
    assert not torch.equal(model.rule.phi(), make_rule().phi())


class Broken(Quadratic):
    """A task whose loss is NaN in training: the trial before a run has one optimizee."""

    def losses(self, thetas, batches):
        return thetas.sum(1) * (1.0 if len(thetas) == 1 else math.nan)


def test_a_scaler_does_not_hide_a_collapse(tmp_path):
    """Its factor is 1 after 16 halvings, which it is not to blame for; a restart, and the next is the end."""
    with pytest.raises(MetaTrainingError, match=r"after 1 restarts; at meta-step 18: .*NaN or infinite"):
        fit(
            make_model(Broken(dim=3)),
            tmp_path,
            CollapseGuard(max_restarts=1),
            plugins=float16(),
            num_rollouts=12,
            limit_val_batches=0,
        )


@pytest.mark.parametrize(
    "precision",
    [lambda: {"plugins": float16()}, lambda: {"precision": "64-true"}],
    ids=["16-mixed", "64-true"],
)
def test_a_run_resumes_bit_for_bit(precision, tmp_path):
    """To second order the scaler's factor is halved on the way: it is a part of the run."""
    whole, resumed = make_model(second_order=True), make_model(second_order=True)
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(whole, tmp_path, PhiAveraging(), every, num_rollouts=4, **precision())
    path = tmp_path / "step=3.ckpt"
    fit(resumed, tmp_path, PhiAveraging(), num_rollouts=4, ckpt_path=path, **precision())
    assert torch.equal(resumed.rule.phi(), whole.rule.phi())


@pytest.mark.parametrize(
    "precision",
    [{"precision": "16-true"}, {"precision": "bf16-true"}, {"plugins": HalfPrecision("16-true")}],
    ids=["16-true", "bf16-true", "a plugin"],  # no object's address: processes of pytest-xdist compare them
)
def test_a_precision_that_rounds_phi_is_refused(precision, tmp_path):
    model = make_model()
    with pytest.raises(
        MisconfigurationException, match=r"^--trainer\.precision must not be b?f?16-true.*32-t"
    ):
        fit(model, tmp_path, **precision)
    assert model.rule.phi().dtype == torch.float32


def test_double_precision_is_refused_where_the_kernels_have_none(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = make_model()
    model.rule.backend = "triton"
    with pytest.raises(MisconfigurationException, match=r"64-true on cpu needs --model\.rule\.backend refer"):
        fit(model, tmp_path, precision="64-true")


def test_a_trainer_that_logs_nothing_leaves_nothing_to_guard(tmp_path):
    bare = {"barebones": True, "enable_progress_bar": None, "enable_model_summary": None}
    fit(make_model(), tmp_path, **bare)
    with pytest.raises(MisconfigurationException, match=r"CollapseGuard.*barebones=True"):
        fit(make_model(), tmp_path, CollapseGuard(), **bare)


def window(rule):
    """The meta-loss and the meta-gradient of a rule's window."""
    rollout = Rollout(rule, Optimizees(Quadratic(dim=3), None, 0, "train", range(20), "cpu"))
    loss = rollout.window(10).meta_loss
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.reshape(-1) for parameter in rule.parameters()])


def test_a_rules_precision_rounds_its_windows_products_and_nothing_else():
    """By bfloat16's roundoff, 2^-8, for each of two operands at most; and can be set to what it was."""
    loss, gradient = window(make_rule())
    rounding = rounding_rule()
    assert rounding.precision == rounding.spec.precision == rounding.config()["precision"] == "bf16"
    rounded_loss, rounded_gradient = window(rounding)
    assert 0 < abs(rounded_loss / loss - 1) < 2 * 2**-8
    assert 1e-5 < float((rounded_gradient - gradient).norm() / gradient.norm()) < 2 * 2**-8
    assert rounded_gradient.dtype == torch.float32
    rounding = rounding_rule()
    rounding.precision = None
    again = window(rounding)
    if rounding.backend is None:
        assert again[0] == loss
        assert torch.equal(again[1], gradient)
    with pytest.raises(ValueError, match="precision must be None or"):
        rounding.precision = "tf32"


def test_a_run_of_rounded_products_resumes_bit_for_bit_and_in_no_other_precision(tmp_path):
    def model(precision="bf16"):
        return make_model(rule=rounding_rule(precision))

    whole, resumed = model(), model()
    settings = {"num_rollouts": 4, "limit_val_batches": 0}
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(whole, tmp_path, PhiAveraging(), every, **settings)
    path = tmp_path / "step=3.ckpt"
    fit(resumed, tmp_path, PhiAveraging(), ckpt_path=path, **settings)
    assert torch.equal(resumed.rule.phi(), whole.rule.phi())
    assert MetaLearner.from_checkpoint(path).rule.precision == "bf16"
    with pytest.raises(CheckpointMismatchError, match=r"--model\.rule\.precision is None.*'?bf16"):
        fit(model(None), tmp_path, PhiAveraging(), ckpt_path=path, **settings)


def test_a_state_of_one_precision_goes_on_in_the_other():
    """It is a machine's choice, as the backend is: a rule's name does not depend on it."""
    assert digest_of(rounding_rule()) == digest_of(make_rule())


@pytest.mark.parametrize("make", [RNNprop, CorrectedDirection, CorrectedStepSize])
def test_every_rule_on_the_fused_lstm_has_the_precision(make):
    rule = make(hidden_size=3, precision="bf16")
    assert rule.spec.precision == rule.config()["precision"] == "bf16"
    assert make(hidden_size=3).spec.precision is None
