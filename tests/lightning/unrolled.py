"""The meta-gradient as a textbook writes it, by autograd through the whole graph: the oracle of `rollout`."""

import torch
from torch.utils._pytree import tree_map

from l2l_lightning.rollout.rollout import Rollout


def unrolled_meta_loss(rule, optimizees, state, T, weights, statistics, second_order):
    """What a textbook writes: the whole graph, differentiated by autograd."""
    K, N = optimizees.theta.shape
    theta = optimizees.theta.detach().requires_grad_()
    total = torch.zeros((), dtype=theta.dtype)
    for t in range(T + 1):
        batches = optimizees.next_batches()
        rows = [tree_map(lambda leaf, k=k: leaf[k], batches) for k in range(K)]
        per_task = torch.stack([optimizees.task.loss(theta[k], row) for k, row in enumerate(rows)])
        total = total + weights[t] * per_task.mean()
        if t < T:
            (grad,) = torch.autograd.grad(per_task.sum(), theta, create_graph=True)
            grad = grad if second_order else grad.detach()
            statistics = statistics.clone()
            update, state = rule.step(rule.read(grad.reshape(-1), statistics), state)
            theta = theta + update.view(K, N)
    return total, theta.detach(), state.detach(), statistics.detach()


def assert_same_gradients(rule, expected, relative=1e-10):
    flat = torch.cat([p.grad.reshape(-1) for p in rule.parameters()])
    expected = torch.cat([g.reshape(-1) for g in expected])
    assert expected.norm() > 0
    assert ((flat - expected).norm() / expected.norm()).item() <= relative


def assert_windows_are_unrolled(rule, optimizees, twin, lengths, second_order=False, **options):
    """Window after window in float64, of two alike optimizees: their meta-losses and meta-gradients agree.

    Returns:
        The rollout, which has advanced `optimizees`, and the unrolled graph's last state.
    """
    rollout, state = Rollout(rule, optimizees, **options), rule.init_state(twin.theta.numel())
    statistics = rule.init_statistics(twin.theta.numel())
    generator = torch.Generator().manual_seed(0)
    for T in lengths:
        weights = torch.rand(T + 1, dtype=torch.float64, generator=generator)
        expected, twin.theta, state, statistics = unrolled_meta_loss(
            rule, twin, state, T, weights, statistics, second_order
        )
        expected_gradients = torch.autograd.grad(expected, list(rule.parameters()))
        rule.zero_grad()
        window = rollout.window(T, weights, second_order)
        window.meta_loss.backward()
        torch.testing.assert_close(window.meta_loss, expected.detach(), rtol=1e-12, atol=0)
        assert_same_gradients(rule, expected_gradients)
    torch.testing.assert_close(rollout.statistics, statistics, rtol=1e-12, atol=1e-14)
    return rollout, state
