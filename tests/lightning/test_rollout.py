"""Rollouts and windows; that meta-gradients are the unrolled graph's, two contracts hold for all members."""

import pytest
import torch
from problems import Rosenbrock, gradient

from l2l_lightning.data import load_images
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.rollout import Rollout, Workspace, run_rule
from l2l_lightning.rules import CoordinatewiseLSTM
from l2l_lightning.tasks import ImageMLP


def make(rule=None, indices=range(3)):
    torch.manual_seed(0)
    rule = rule or CoordinatewiseLSTM(hidden_size=5, p=4.0).double()
    return rule, Optimizees(Rosenbrock(), None, 0, "train", indices, dtype=torch.float64)


def test_a_window_counts_the_loss_at_unroll_plus_one_points():
    rule, optimizees = make()
    _, twin = make(rule)
    window = Rollout(rule, optimizees).window(5)
    assert window.losses.shape == (6, 3)
    torch.testing.assert_close(window.losses[:5], run_rule(rule, twin, 5))
    torch.testing.assert_close(window.meta_loss.detach(), window.losses.sum(0).mean())


def test_windows_share_one_workspace_without_corrupting_earlier_gradients():
    rule, optimizees = make()
    workspace = Workspace()
    first = Rollout(rule, optimizees, workspace).window(4)
    Rollout(rule, make(rule, indices=[7, 8, 9])[1], workspace).window(4)
    assert torch.equal(gradient(rule, first), gradient(rule, Rollout(rule, make(rule)[1]).window(4)))


def test_gradients_are_scaled_before_anything_else():
    torch.manual_seed(0)
    plain = CoordinatewiseLSTM(hidden_size=4, preprocessing="identity")
    scaled = CoordinatewiseLSTM(hidden_size=4, preprocessing="identity", gradient_scale=100.0)
    scaled.load_state_dict(plain.state_dict())
    grad, state = torch.randn(7), torch.randn(*plain.state_shape, 7)
    torch.testing.assert_close(scaled.step(grad, state), plain.step(100 * grad, state))


@pytest.mark.parametrize(
    ("dtype", "second_order"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)]
)
def test_mixed_precision_reaches_the_optimizees_network_alone(dtype, second_order):
    """The meta-loss is the float64 sum of its losses; a scaler's factor multiplies its derivatives exactly.

    The losses are those of a network in reduced precision: within 2^-7 of float32's, a unit of bfloat16. To
    second order the derivatives go through that network as well, and are its float16's to round.
    """
    task = ImageMLP("digits", hidden_sizes=[8])
    images = load_images("digits").train

    def window(enabled, scale):
        torch.manual_seed(0)
        rollout = Rollout(CoordinatewiseLSTM(hidden_size=5), Optimizees(task, images, 0, "train", range(3)))
        with torch.autocast("cpu", dtype, enabled=enabled):
            result = rollout.window(4, second_order=second_order)
            (scale * result.meta_loss).backward()
        return result, [parameter.grad for parameter in rollout.rule.parameters()]

    mixed, gradients = window(True, 1.0)
    full, _ = window(False, 1.0)
    _, scaled = window(True, 2.0**16)
    assert mixed.meta_loss.dtype == mixed.losses.dtype == torch.float32
    exact = mixed.losses.double().sum(0).mean()
    assert mixed.meta_loss.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(mixed.losses, full.losses, rtol=2**-7, atol=0)
    for ours, theirs in zip(scaled, gradients, strict=True):
        assert ours.isfinite().all()
        if not second_order:
            torch.testing.assert_close(ours, 2.0**16 * theirs, rtol=1e-6, atol=0)


def test_a_workspaces_buffers_are_nobodys_inference_tensors():
    """A validation under inference mode may be the first to ask for one that a fit then writes into."""
    workspace = Workspace()
    with torch.inference_mode():
        buffer = workspace.empty("history", (3, 2), torch.ones(1))
    assert not buffer.is_inference()
