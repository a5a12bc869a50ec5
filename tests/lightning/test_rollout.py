"""The meta-gradient against autograd through the unrolled graph, in float64."""

import pytest
import torch
from learned_momentum import LearnedMomentum

from l2l_lightning.data import load_images
from l2l_lightning.optimizees import Optimizees
from l2l_lightning.rollout import Rollout, Workspace, run_rule
from l2l_lightning.rules import CoordinatewiseLSTM
from l2l_lightning.tasks import (
    MNISTMLP,
    FunctionTask,
    ImageMLP,
    ModuleTask,
    NoisyScaledSquare,
    Quadratic,
    SimpleSquare,
    Task,
)


class Rosenbrock(Task):
    """A non-quadratic with constants of its own and noise in every evaluation."""

    num_coordinates = 4

    def init(self, generator):
        return torch.randn(4, generator=generator)

    def instance(self, generator):
        return torch.rand(4, generator=generator)

    def batch(self, instance, images, generator):
        return instance, torch.randn(4, generator=generator)

    def loss(self, theta, batch):
        scale, noise = batch
        valley = (theta[1:] - theta[:-1] ** 2).square().sum() + (1 - theta[:-1]).square().sum()
        return valley + (scale * theta * noise).sum().sin()

    def config(self):
        return {}


def make(rule=None, indices=range(3), task=None):
    torch.manual_seed(0)
    rule = rule or CoordinatewiseLSTM(hidden_size=5, p=4.0)
    task = task or Rosenbrock()
    optimizees = Optimizees(task, None, 0, "train", indices, dtype=torch.float64)
    return rule.double(), optimizees


def unrolled_meta_loss(rule, optimizees, state, T, weights, second_order):
    """What a textbook writes: the whole graph, differentiated by autograd."""
    K, N = optimizees.theta.shape
    theta = optimizees.theta.detach().requires_grad_()
    total = torch.zeros((), dtype=theta.dtype)
    for t in range(T + 1):
        batches = optimizees.next_batches()
        per_task = torch.stack(
            [
                optimizees.task.loss(theta[k], torch.utils._pytree.tree_map(lambda b, k=k: b[k], batches))
                for k in range(K)
            ]
        )
        total = total + weights[t] * per_task.mean()
        if t < T:
            (grad,) = torch.autograd.grad(per_task.sum(), theta, create_graph=True)
            grad = grad if second_order else grad.detach()
            update, state = rule.step(grad.reshape(-1), state)
            theta = theta + update.view(K, N)
    return total, theta.detach(), state.detach()


def assert_same_gradients(rule, expected, relative=1e-10):
    flat = torch.cat([p.grad.reshape(-1) for p in rule.parameters()])
    expected = torch.cat([g.reshape(-1) for g in expected])
    assert expected.norm() > 0
    assert ((flat - expected).norm() / expected.norm()).item() <= relative


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(
    "rule_arguments",
    [
        {},
        {"num_layers": 1, "preprocessing": "identity"},
        {"num_layers": 3},
        {"preprocessing": "identity", "gradient_scale": 10.0},
    ],
)
def test_meta_gradient_equals_the_unrolled_graph_across_windows(rule_arguments, second_order):
    rule, optimizees = make(CoordinatewiseLSTM(hidden_size=5, **rule_arguments))
    _, twin = make(rule)
    rollout, state = Rollout(rule, optimizees), rule.init_state(twin.theta.numel())
    for T in (4, 1, 3):
        weights = torch.rand(T + 1, dtype=torch.float64)
        expected, twin.theta, state = unrolled_meta_loss(rule, twin, state, T, weights, second_order)
        expected_gradients = torch.autograd.grad(expected, list(rule.parameters()))
        rule.zero_grad()
        window = rollout.window(T, weights, second_order)
        window.meta_loss.backward()
        torch.testing.assert_close(window.meta_loss, expected.detach(), rtol=1e-12, atol=0)
        assert_same_gradients(rule, expected_gradients)
        torch.testing.assert_close(optimizees.theta, twin.theta, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(rollout.state, state, rtol=1e-12, atol=1e-14)


TASKS = {
    "quadratic": lambda: Quadratic(dim=3),
    "quadratic of DeepMind's code": lambda: Quadratic(dim=2, variant="deepmind", batch_size=3),
    "noisy scaled square": lambda: NoisyScaledSquare(dim=3),
    "simple square": SimpleSquare,
    "function": lambda: FunctionTask(lambda theta: (theta[0] * theta[1] - 1) ** 2 + theta[2] ** 4, dim=3),
    "module": lambda: ModuleTask(lambda: torch.nn.Linear(784, 2), batch_size=3, loss_fn=first_two_classes),
    **{
        f"MNIST MLP, {activation}": lambda activation=activation: MNISTMLP([2, 3], activation, batch_size=4)
        for activation in ("sigmoid", "relu", "tanh", "elu")
    },
}


def first_two_classes(output, targets):
    return torch.nn.functional.cross_entropy(output, targets % 2)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("make_rule", [lambda: CoordinatewiseLSTM(hidden_size=3), LearnedMomentum])
@pytest.mark.parametrize("name", TASKS)
def test_meta_gradient_equals_the_unrolled_graph_on_every_task(name, make_rule, second_order):
    torch.manual_seed(1)
    task, rule = TASKS[name](), make_rule().double()
    images = load_images("mnist").train if task.dataset else None
    optimizees, twin = (Optimizees(task, images, 3, "train", range(2), dtype=torch.float64) for _ in range(2))
    rollout, state = Rollout(rule, optimizees), rule.init_state(twin.theta.numel())
    for T in (2, 3):
        weights = torch.rand(T + 1, dtype=torch.float64)
        expected, twin.theta, state = unrolled_meta_loss(rule, twin, state, T, weights, second_order)
        expected_gradients = torch.autograd.grad(expected, list(rule.parameters()))
        rule.zero_grad()
        rollout.window(T, weights, second_order).meta_loss.backward()
        assert_same_gradients(rule, expected_gradients)


def test_the_generic_segment_gradient_equals_the_fused_one():
    rule, _ = make()
    T, n = 6, 11
    grads = torch.randn(T, n, dtype=torch.float64) * 10.0 ** torch.linspace(-6, 2, n, dtype=torch.float64)
    history = torch.zeros(T + 1, *rule.state_shape, n, dtype=torch.float64)
    theta = torch.zeros(n, dtype=torch.float64)
    for t in range(T):
        rule.step_(theta, grads[t], history[t], history[t + 1])
    d_updates = torch.randn(T, n, dtype=torch.float64)
    d_final_state = torch.randn_like(history[0])
    for d_final in (None, d_final_state):
        fused, d_state = rule.segment_gradient(grads, history, d_updates, d_final)
        generic, d_expected = super(CoordinatewiseLSTM, rule).segment_gradient(
            grads, history, d_updates, d_final
        )
        for a, b in zip([*fused, d_state], [*generic, d_expected], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_meta_gradient_scales_with_the_cotangent():
    rule, optimizees = make()
    window = Rollout(rule, optimizees).window(3)
    (3 * window.meta_loss).backward()
    scaled = [p.grad.clone() for p in rule.parameters()]
    rule, optimizees = make(rule)
    rule.zero_grad()
    Rollout(rule, optimizees).window(3).meta_loss.backward()
    for a, p in zip(scaled, rule.parameters(), strict=True):
        torch.testing.assert_close(a, 3 * p.grad)


def test_several_tasks_average_what_each_gives_alone():
    rule, optimizees = make(indices=range(3))
    rule.zero_grad()
    Rollout(rule, optimizees).window(4).meta_loss.backward()
    together = [p.grad.clone() for p in rule.parameters()]
    rule.zero_grad()
    for index in range(3):
        _, single = make(rule, indices=[index])
        (Rollout(rule, single).window(4).meta_loss / 3).backward()
    for a, p in zip(together, rule.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-10, atol=1e-12)


def test_a_window_counts_the_loss_at_unroll_plus_one_points():
    rule, optimizees = make()
    _, twin = make(rule)
    window = Rollout(rule, optimizees).window(5)
    assert window.losses.shape == (6, 3)
    torch.testing.assert_close(window.losses[:5], run_rule(rule, twin, 5))
    torch.testing.assert_close(window.meta_loss.detach(), window.losses.sum(0).mean())


def test_windows_share_one_workspace_without_corrupting_earlier_gradients():
    rule, optimizees = make()
    _, twin = make(rule)
    workspace = Workspace()
    first = Rollout(rule, optimizees, workspace).window(4)
    Rollout(rule, make(rule, indices=[7, 8, 9])[1], workspace).window(4)
    first.meta_loss.backward()
    shared = [p.grad.clone() for p in rule.parameters()]
    rule.zero_grad()
    Rollout(rule, twin).window(4).meta_loss.backward()
    for a, p in zip(shared, rule.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=0, atol=0)


def test_a_rollout_resumes_bit_identically_in_the_middle():
    rule, optimizees = make()
    rollout = Rollout(rule, optimizees)
    rollout.window(3)
    saved = rollout.state_dict()
    expected = rollout.window(4)
    resumed = Rollout(rule, make(rule)[1])
    resumed.load_state_dict(saved)
    window = resumed.window(4)
    assert torch.equal(window.losses, expected.losses)
    assert resumed.steps_done == 7


def test_inputs_of_the_rule_carry_no_gradient():
    """The contract behind the missing graph: what reaches the rule is detached."""
    rule, optimizees = make()
    seen, step = [], rule.stepper()
    rule.stepper = lambda: (
        lambda theta, grad, state, new: (
            seen.append((theta.requires_grad, grad.requires_grad, state.requires_grad)),
            step(theta, grad, state, new),
        )
    )
    Rollout(rule, optimizees).window(2)
    assert seen == [(False, False, False)] * 2


@pytest.mark.parametrize(("unroll", "weights"), [(0, None), (3, torch.ones(3))])
def test_impossible_windows_are_named(unroll, weights):
    with pytest.raises(ValueError, match="unroll"):
        Rollout(*make()).window(unroll, weights)


def test_gradients_are_scaled_before_anything_else():
    torch.manual_seed(0)
    plain = CoordinatewiseLSTM(hidden_size=4, preprocessing="identity")
    scaled = CoordinatewiseLSTM(hidden_size=4, preprocessing="identity", gradient_scale=100.0)
    scaled.load_state_dict(plain.state_dict())
    grad, state = torch.randn(7), torch.randn(*plain.state_shape, 7)
    for ours, theirs in zip(scaled.step(grad, state), plain.step(100 * grad, state), strict=True):
        torch.testing.assert_close(ours, theirs)
    theta, new_state = torch.zeros(7), torch.empty_like(state)
    scaled.step_(theta, grad, state, new_state)
    torch.testing.assert_close(theta, plain.step(100 * grad, state)[0])
    assert scaled.config()["gradient_scale"] == 100.0
    with pytest.raises(ValueError, match="gradient_scale must be positive, got 0"):
        CoordinatewiseLSTM(gradient_scale=0.0)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
    assert torch.equal(buffer.zero_().add_(1), torch.ones(3, 2))
