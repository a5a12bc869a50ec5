"""Rollouts side by side, each under a rule with a φ of its own: what evolution strategies compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.parts import parts_of
from l2l_lightning.rollout.rollout import full_precision
from l2l_lightning.rules.base import Rule, UpdateRule
from l2l_lightning.rules.layout import Layout, Time


class _Step(nn.Module):
    """One optimizee's step as a module's call, which functional_call makes with other parameters."""

    def __init__(self, rule: UpdateRule, layout: Layout) -> None:
        super().__init__()
        self.rule = rule
        self.layout = layout

    def forward(self, inputs: Tensor, state: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        update, state = self.rule.step(inputs, state)
        if not self.rule.coordinatewise:
            update = self.rule.finish(update, inputs, theta, self.layout)
        return update, state


@torch.no_grad()
def run_perturbed(rule: Rule, phis: Mapping[str, Tensor], optimizees: Optimizees, horizon: int) -> Tensor:
    """Optimises K optimizees, the k-th by the rule with the k-th φ, and returns their losses, [horizon, K].

    Steps are the rule's plain definition, which torch.func.vmap runs for all φ at once: it is for rules of
    few parameters, which many small rollouts are to find.

    Args:
        rule: m_φ, or a `Grouped` of several; its own φ is not read.
        phis: The K values of every parameter by its name in the rule, [K, *shape] each.
        optimizees: What is optimised; their θ is advanced in place.
        horizon: Number of steps, T for features that read it.

    Raises:
        ValueError: horizon < 1, or a parameter lacks its K values.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM, Quadratic
        >>> rule = CoordinatewiseLSTM(1, 4, preprocessing="identity")
        >>> phis = {name: torch.stack([value, 0.5 * value]) for name, value in rule.named_parameters()}
        >>> optimizees = Optimizees(Quadratic(), None, seed=0, stream="train", indices=[0, 0])
        >>> run_perturbed(rule, phis, optimizees, horizon=5).shape
        torch.Size([5, 2])
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    theta = optimizees.theta
    K = len(theta)
    shapes = {name: (K, *parameter.shape) for name, parameter in rule.named_parameters()}
    if shapes != {name: tuple(values.shape) for name, values in phis.items()}:
        raise ValueError(f"phis must hold {shapes}")
    names = {id(parameter): name for name, parameter in rule.named_parameters()}
    moves = [
        (
            part,
            _Step(part.rule, dataclasses.replace(part.layout, copies=1)),
            {f"rule.{name}": phis[names[id(own)]] for name, own in part.rule.named_parameters()},
        )
        for part in parts_of(rule, optimizees)
    ]
    losses = theta.new_empty(horizon, K)
    for t in range(horizon):
        losses[t], grad = optimizees.losses_and_grads()
        grad = grad.to(theta.dtype)
        time = Time(theta.new_tensor(t), horizon)
        with full_precision(theta):
            for part, module, phi in moves:
                x = part.rule.read(part.take(grad), part.statistics, time, part.layout)
                arguments = [
                    part.by_optimizee(values).movedim(-2, 0) for values in (x, part.state, part.take(theta))
                ]
                update, state = vmap(functional_call, in_dims=(None, 0, 0))(module, phi, tuple(arguments))
                part.state = state.movedim(0, -2).flatten(-2)
                part.add_(theta, update)
    return losses
