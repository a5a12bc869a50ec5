"""What a textbook writes, the oracles of `rollout`: autograd through the whole graph, and a plain loop."""

import torch
from torch.utils._pytree import tree_map

from l2l_lightning import LearnedOptimizer
from l2l_lightning.rollout.rollout import Rollout
from l2l_lightning.rules import Layout, Time


def fresh(rule, optimizees):
    """Every tensor's own state and statistics, of all optimizees."""
    members = [rule.members[rule.member_for(tensor)] for tensor in optimizees.task.tensors]
    sizes = [len(optimizees) * tensor.numel for tensor in optimizees.task.tensors]
    dtype = optimizees.dtype
    return [
        (m.init_state(n, dtype), m.init_statistics(n, dtype)) for m, n in zip(members, sizes, strict=True)
    ]


def unrolled_meta_loss(
    rule,
    optimizees,
    carried,
    T,
    weights,
    second_order,
    first_step=0,
    total_steps=None,
    of_logarithms=False,
    held_out=False,
):
    """What a textbook writes: the whole graph, tensor by tensor, differentiated by autograd."""
    tensors = optimizees.task.tensors
    theta = optimizees.theta.detach().requires_grad_()
    carried = list(carried)
    total = torch.zeros((), dtype=theta.dtype)
    for t in range(T + 1):
        batches = optimizees.next_batches()
        if held_out and t == T:
            draws = zip(optimizees._instances, optimizees.generators, strict=True)
            drawn = [optimizees.task.held_out_batch(own, None, generator) for own, generator in draws]
            batches = _in(theta.dtype, optimizees.task.gather(torch.stack(drawn), None))
        rows = [tree_map(lambda leaf, k=k: leaf[k], batches) for k in range(len(theta))]
        per_task = torch.stack([optimizees.task.loss(theta[k], row) for k, row in enumerate(rows)])
        total = total + weights[t] * (per_task.log() if of_logarithms else per_task).mean()
        if t < T:
            (grad,) = torch.autograd.grad(per_task.sum(), theta, create_graph=True)
            grad = grad if second_order else grad.detach()
            time = Time(theta.new_tensor(first_step + t), total_steps)
            moved = []
            for index, (tensor, g) in enumerate(
                zip(tensors, torch.split(grad, [tensor.numel for tensor in tensors], -1), strict=True)
            ):
                state, statistics = carried[index][0], carried[index][1].clone()
                member = rule.members[rule.member_for(tensor)]
                layout = Layout((tensor,), len(theta), len(tensors))
                x = member.read(g.reshape(-1), statistics, time, layout)
                update, state = member.step(x, state)
                if not member.coordinatewise:
                    here = torch.split(theta, [tensor.numel for tensor in tensors], -1)[index].reshape(-1)
                    update = member.finish(update, x, here if second_order else here.detach(), layout)
                carried[index] = state, statistics
                moved.append(update.view(len(theta), -1))
            theta = theta + torch.cat(moved, -1)
    return total, theta.detach(), [(a.detach(), b.detach()) for a, b in carried]


def _in(dtype, batches):
    """Floating tensors in a dtype."""
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batches)


def assert_same_gradients(rule, expected, relative=1e-10):
    flat = torch.cat([p.grad.reshape(-1) for p in rule.parameters()])
    expected = torch.cat([g.reshape(-1) for g in expected])
    assert expected.norm() > 0
    assert ((flat - expected).norm() / expected.norm()).item() <= relative


def assert_windows_are_unrolled(
    rule,
    optimizees,
    twin,
    lengths,
    second_order=False,
    of_logarithms=False,
    held_out=False,
    **options,
):
    """Window after window in float64, of two alike optimizees: their meta-losses and meta-gradients agree.

    Returns:
        The rollout, which has advanced `optimizees`, and what the unrolled graph carries at its end.
    """
    rollout, carried = Rollout(rule, optimizees, **options), fresh(rule, twin)
    generator = torch.Generator().manual_seed(0)
    for T in lengths:
        weights = torch.rand(T + 1, dtype=torch.float64, generator=generator)
        expected, twin.theta, carried = unrolled_meta_loss(
            *(rule, twin, carried, T, weights, second_order),
            *(rollout.steps_done, rollout.total_steps, of_logarithms, held_out),
        )
        expected_gradients = torch.autograd.grad(expected, list(rule.parameters()), materialize_grads=True)
        rule.zero_grad()
        window = rollout.window(T, weights, second_order, of_logarithms, held_out)
        window.meta_loss.backward()
        torch.testing.assert_close(window.meta_loss, expected.detach(), rtol=1e-12, atol=0)
        assert_same_gradients(rule, expected_gradients)
    return rollout, carried


def assert_same_carried(rollout, carried):
    """Every part's state and statistics are those of its tensors, side by side."""
    rule, tensors, K = rollout.rule, rollout.optimizees.task.tensors, len(rollout.optimizees)
    for part in rollout.parts:
        mine = [i for i, t in enumerate(tensors) if rule.members[rule.member_for(t)] is part.rule]
        for which, whole in enumerate((part.state, part.statistics)):
            pieces = [carried[i][which] for i in mine]
            pieces = [piece.view(*piece.shape[:-1], K, -1) for piece in pieces if piece.numel()]
            if pieces:
                expected = torch.cat(pieces, -1).flatten(-2)
                torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-14)


def looped(model, optimizees, rule, steps):
    """A classifier moved by LearnedOptimizer in a plain loop, from one optimizee's θ0 on its minibatches.

    Returns:
        Its losses [steps] and its θ after them, flat.
    """
    losses = []
    torch.nn.utils.vector_to_parameters(optimizees.theta[0], model.parameters())
    optimizer = LearnedOptimizer(model.named_parameters(), rule, total_steps=steps)
    for _ in range(steps):
        x, y = optimizees.next_batches()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[0]), y[0])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.nn.utils.parameters_to_vector(model.parameters()).detach()
