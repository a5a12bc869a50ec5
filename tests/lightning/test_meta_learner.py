"""Meta-training in Lightning: what a training step does, what is logged, and what a collapse does."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from meta_training import fit, make_rule

from l2l_lightning import MetaLearner, Optimizees, Quadratic, Rollout, pretrained, run_rule
from l2l_lightning.rollout.optimizees import TaskError
from l2l_lightning.rules import RNNprop
from l2l_lightning.training.callbacks import CollapseGuard, MetaTrainingError, PhiAveraging, RuleSnapshots
from l2l_lightning.training.data_module import WindowIndex, WindowLoader


def make_model(task=None, rule=None, **arguments):
    settings = {
        "horizon": 6,
        "unroll": 4,
        "num_tasks": 3,
        "learning_rate": 0.01,
        "num_validation_optimizees": 3,
        "lr_schedule": "constant",
    }
    return MetaLearner(task or Quadratic(dim=3), rule or make_rule(), **{**settings, **arguments})


def test_fit_is_adam_on_the_windows_meta_gradients(tmp_path):
    """Lightning's automatic optimisation against the same loop written out by hand."""
    model = make_model(seed=5)
    fit(model, tmp_path, gradient_clip_val=0.5, limit_val_batches=0)

    rule = make_rule()
    adam = torch.optim.Adam(rule.parameters(), lr=0.01)
    for rollout in range(2):
        optimizees = Optimizees(model.task, None, 5, "train", range(3 * rollout, 3 * rollout + 3))
        inner = Rollout(rule, optimizees)
        for unroll in (4, 2):  # the last window is what the horizon leaves
            adam.zero_grad()
            inner.window(unroll).meta_loss.backward()
            torch.nn.utils.clip_grad_norm_(rule.parameters(), 0.5)
            adam.step()
    for ours, by_hand in zip(model.rule.parameters(), rule.parameters(), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-7)


def test_final_weighting_counts_the_last_loss_only():
    assert make_model(loss_weights="final").weights(3).tolist() == [0, 0, 0, 1]
    assert make_model().weights(3).tolist() == [1, 1, 1, 1]


def test_the_learning_rate_warms_up_and_decays(tmp_path):
    rates = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])

    model = make_model(learning_rate=1.0, warmup_steps=3, lr_schedule="cosine")
    fit(model, tmp_path, Record(), num_rollouts=4, limit_val_batches=0)
    expected = [min(1, (t + 1) / 4) * 0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(1, 9)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_validation_runs_the_rule_on_held_out_optimizees(tmp_path):
    model = make_model()
    trainer = fit(model, tmp_path)
    losses = run_rule(model.rule, Optimizees(model.task, None, 0, "validation", range(3)), 6)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val/sum_loss"] == pytest.approx(float(losses.sum(0).mean()), rel=1e-5)
    assert logged["val/final_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert logged["val/initial_loss"] == pytest.approx(float(losses[0].mean()), rel=1e-5)


def test_the_average_of_phi_is_what_is_validated_and_kept(tmp_path):
    averaging = PhiAveraging(decay=0.5)
    history = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            history.append(pl_module.rule.head_weight.detach().clone())

    model = make_model()
    fit(model, tmp_path, Record(), averaging, limit_val_batches=0)
    average = history[0]
    for value in history[1:]:
        average = 0.5 * average + 0.5 * value
    torch.testing.assert_close(model.rule.head_weight.detach(), average)


def test_early_stopping_and_the_best_checkpoint(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/sum_loss", save_on_train_epoch_end=False)
    stop = EarlyStopping("val/sum_loss", patience=2, check_on_train_epoch_end=False)
    # A rate this small changes nothing, so that the third validation is the second without improvement.
    model = make_model(learning_rate=1e-30)
    trainer = fit(model, tmp_path, best, stop, num_rollouts=50, val_check_interval=2)
    assert trainer.global_step == 6
    assert best.best_model_path


class Broken(Quadratic):
    """A task whose gradient is NaN after its good evaluations; the trial before a run is the first."""

    def __init__(self, good_evaluations=0):
        super().__init__(dim=3)
        self.evaluations_left = good_evaluations

    def losses(self, thetas, batches):
        self.evaluations_left -= 1
        return thetas.square().sum(1) * (math.nan if self.evaluations_left < 0 else 1.0)


def test_a_task_that_is_never_finite_is_refused_before_a_run(tmp_path):
    model = make_model(Broken())
    phi = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(TaskError, match=r"no finite loss and gradient at θ0.*four.*\[nan, nan, nan, nan\]"):
        fit(model, tmp_path, limit_val_batches=0)
    assert all(map(torch.equal, phi, model.parameters()))


@pytest.mark.parametrize(("options", "restarts"), [({"max_restarts": 2}, 2), ({"action": "stop"}, 0)])
def test_nan_gradients_stop_with_a_clear_error_after_the_restarts(options, restarts, tmp_path):
    guard = CollapseGuard(**options)
    with pytest.raises(MetaTrainingError, match=rf"after {restarts} restarts.*NaN or inf.*model.learning"):
        fit(make_model(Broken(1)), tmp_path, guard, limit_val_batches=0, num_rollouts=9)


def test_a_nan_gradient_never_reaches_phi_and_a_restart_halves_the_rate(tmp_path):
    model = make_model(Broken(good_evaluations=5))
    before = [p.clone() for p in model.parameters()]
    guard = CollapseGuard(max_restarts=1)
    with pytest.raises(MetaTrainingError):
        fit(model, tmp_path, guard, limit_val_batches=0, num_rollouts=9)
    assert guard.restarts == 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_run_at_chance_restarts_and_says_so(tmp_path):
    class AtChance(Quadratic):
        """No rule can lower this."""

        def losses(self, thetas, batches):
            return 1 + 0 * thetas.sum(1)

    guard = CollapseGuard(start_patience=2, max_restarts=1)
    with pytest.raises(MetaTrainingError, match=r"2 validations in a row.*no better than chance"):
        fit(make_model(AtChance()), tmp_path, guard, num_rollouts=20, val_check_interval=2)
    assert guard.restarts == 1


def test_a_checkpoint_gives_the_learner_back(tmp_path):
    model = make_model(unroll=[2, 6], seed=9)
    trainer = fit(model, tmp_path, ModelCheckpoint(tmp_path), limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    again = MetaLearner.from_checkpoint(tmp_path / "whole.ckpt")
    assert again.settings() == model.settings()
    assert again.seed == 9
    gradient, state = torch.randn(4), torch.randn(*model.rule.state_shape, 4)
    torch.testing.assert_close(again.rule.step(gradient, state), model.rule.step(gradient, state))


def test_windows_come_in_order_and_resume_anywhere():
    loader = WindowLoader(num_rollouts=2, horizon=7, unrolls=[3])
    everything = list(loader)
    assert everything == [WindowIndex(r, start, T) for r in range(2) for start, T in ((0, 3), (3, 3), (6, 1))]
    assert len(loader) == 6
    iterator = iter(loader)
    head = [next(iterator) for _ in range(4)]
    resumed = WindowLoader(num_rollouts=2, horizon=7, unrolls=[3])
    resumed.load_state_dict(loader.state_dict())
    assert head + list(resumed) == everything


def test_several_unroll_lengths_divide_the_run():
    windows = list(WindowLoader(num_rollouts=4, horizon=6, unrolls=[3, 6]))
    lengths = [[w.length for w in windows if w.rollout == rollout] for rollout in range(4)]
    assert lengths == [[3, 3], [3, 3], [6], [6]]


def test_rollouts_of_several_lengths_take_turns():
    windows = list(WindowLoader(num_rollouts=6, horizon=[4, 9], unrolls=[4]))
    lengths = {r: sum(w.length for w in windows if w.rollout == r) for r in range(6)}
    assert sorted(lengths.values()) == [4, 4, 4, 9, 9, 9]
    for pair in ((0, 1), (2, 3), (4, 5)):
        assert {lengths[r] for r in pair} == {4, 9}
    model = make_model(horizon=[9, 6], unroll=6)
    assert model.horizon == 9
    assert model.settings()["horizon"] == [9, 6]
    with pytest.raises(ValueError, match="must not exceed horizon"):
        make_model(horizon=[9, 6], unroll=7)


def test_a_long_run_takes_no_memory_for_its_windows():
    """5·10¹⁰ windows here: only the rollouts' ends are kept, 8 bytes for each."""
    loader = WindowLoader(num_rollouts=10**4, horizon=[10**7, 10], unrolls=[1, 2])
    assert len(loader) == (10**7 + 10) * 2500 + (10**7 + 10) * 2500 // 2
    assert loader[len(loader) - 1].rollout == 10**4 - 1
    small = WindowLoader(num_rollouts=6, horizon=[4, 9], unrolls=[3, 4])
    assert [small[index] for index in range(len(small))] == list(small)
    with pytest.raises(IndexError):
        small[len(small)]


@pytest.mark.parametrize("rule", [make_rule, lambda: RNNprop(hidden_size=3)], ids=["LSTM", "RNNprop"])
def test_a_run_resumes_after_any_window(rule, tmp_path):
    """Cut within a rollout or between two, whatever their lengths, it ends where the whole run ends."""

    def make():
        torch.manual_seed(0)
        return make_model(rule=rule(), horizon=[4, 12], unroll=4, seed=3)

    whole = make()
    fit(whole, tmp_path / "whole", num_rollouts=4, limit_val_batches=0)
    every = ModelCheckpoint(tmp_path / "cut", every_n_train_steps=1, save_top_k=-1)
    fit(make(), tmp_path / "cut", every, num_rollouts=4, limit_val_batches=0)
    checkpoints = list((tmp_path / "cut").glob("*.ckpt"))
    assert len(checkpoints) == 8
    for path in checkpoints:
        resumed = make()
        fit(resumed, tmp_path / "resumed", num_rollouts=4, limit_val_batches=0, ckpt_path=path)
        for ours, theirs in zip(resumed.rule.parameters(), whole.rule.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_meta_training_starts_from_a_trained_rule(tmp_path):
    start = make_rule(head_init_scale=0.5)
    pretrained.save(start, tmp_path / "start.safetensors")
    model = make_model(start_from=str(tmp_path / "start.safetensors"))
    for ours, theirs in zip(model.rule.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    trainer = fit(model, tmp_path, ModelCheckpoint(tmp_path), limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    (tmp_path / "start.safetensors").unlink()  # the checkpoint does without
    again = MetaLearner.from_checkpoint(tmp_path / "whole.ckpt")
    assert torch.equal(again.rule.head_weight, model.rule.head_weight)
    with pytest.raises(ValueError, match="start_from=lstm-mnist is a rule of another shape"):
        make_model(start_from="lstm-mnist")
    with pytest.raises(pretrained.WeightsError, match="no rule 'lstm-mars'"):
        make_model(start_from="lstm-mars")


def test_snapshots_are_the_averaged_rule_after_that_many_rollouts(tmp_path):
    averaging = PhiAveraging(decay=0.5)
    snapshots = RuleSnapshots(averaging, [1, 3], tmp_path / "snapshots")
    averages = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            averages.append(averaging.rule.head_weight.detach().clone())

    # Rollouts of 6 steps in windows of 4 and 2.
    fit(make_model(), tmp_path, averaging, snapshots, Record(), num_rollouts=4, limit_val_batches=0)
    written = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert written == ["after-1.safetensors", "after-3.safetensors"]
    for name, meta_steps in zip(written, (2, 6), strict=True):
        rule = pretrained.load(tmp_path / "snapshots" / name)
        assert torch.equal(rule.head_weight, averages[meta_steps - 1])
