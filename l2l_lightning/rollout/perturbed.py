"""Rollouts side by side, each under a rule with a φ of its own: what evolution strategies compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from l2l_lightning.rollout.carried import CarriedRollout
from l2l_lightning.rollout.parts import Part
from l2l_lightning.rollout.rollout import full_precision
from l2l_lightning.rules.base import PopulationStep, UpdateRule
from l2l_lightning.rules.layout import Layout, Time

Phis = Mapping[str, Tensor]
"""The K values of every parameter by its name in the rule, [K, *shape] each."""


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


class PerturbedRollout(CarriedRollout):
    """K optimizees, the k-th of which is moved by the rule with the k-th φ, advanced window by window.

    Steps are the rule's plain definition, which torch.func.vmap runs for all φ at once: it is for rules of
    few parameters, which many small rollouts are to find. Nothing is masked: an optimizee that diverges is
    one whose losses say so.

    Args:
        rule: m_φ, or a `Grouped` of several; its own φ is not read.
        optimizees: What is optimised; their θ is advanced in place.
        total_steps: T, the rollout's horizon, for features that read it; None if it is not known.

    Raises:
        ValueError: total_steps < 1, or the rule has no member for one of the task's tensors.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM, Optimizees, Quadratic
        >>> rule = CoordinatewiseLSTM(1, 4, preprocessing="identity")
        >>> phis = {name: torch.stack([value, 0.5 * value]) for name, value in rule.named_parameters()}
        >>> optimizees = Optimizees(Quadratic(), None, seed=0, stream="train", indices=[0, 0])
        >>> PerturbedRollout(rule, optimizees).window(phis, 5).shape
        torch.Size([5, 2])
    """

    @torch.no_grad()
    def window(self, phis: Phis, unroll: int) -> Tensor:
        """Takes `unroll` steps and returns the losses before each, f_t(θ_t), [unroll, K].

        Raises:
            ValueError: unroll < 1, or a parameter lacks its K values.
        """
        if unroll < 1:
            raise ValueError(f"unroll must be at least 1, got {unroll}")
        theta = self.optimizees.theta
        shapes = {name: (len(theta), *phi.shape) for name, phi in self.rule.named_parameters()}
        if shapes != {name: tuple(values.shape) for name, values in phis.items()}:
            raise ValueError(f"phis must hold {shapes}")
        names = {id(phi): name for name, phi in self.rule.named_parameters()}
        steps = []
        for part in self.parts:
            phi = {name: phis[names[id(own)]] for name, own in part.rule.named_parameters()}
            carried = part.statistics, part.state
            steps.append(part.rule.population_step(phi, part.layout, *carried) or _vmapped(part, phi))
        losses = theta.new_empty(unroll, len(theta))
        for t in range(unroll):
            losses[t], grad = self.optimizees.losses_and_grads()
            grad = grad.to(theta.dtype)
            time = Time(theta.new_full((), self.steps_done), self.total_steps)
            with full_precision(theta):
                for part, step in zip(self.parts, steps, strict=True):
                    own = part.take(theta).view(len(theta), -1)
                    step(own, part.take(grad).view_as(own), time)
                    if part.columns is not None:
                        theta[:, part.columns] = own
            self.steps_done += 1
        return losses


def _vmapped(part: Part, phi: Phis) -> PopulationStep:
    """Returns the rule's definition as a step of K optimizees, each with a φ of its own."""
    module = _Step(part.rule, dataclasses.replace(part.layout, copies=1))
    parameters = {f"rule.{name}": values for name, values in phi.items()}

    def step(theta: Tensor, grad: Tensor, time: Time) -> None:
        x = part.rule.read(grad.reshape(-1), part.statistics, time, part.layout)
        arguments = [part.by_optimizee(values).movedim(-2, 0) for values in (x, part.state)]
        update, state = vmap(functional_call, in_dims=(None, 0, 0))(module, parameters, (*arguments, theta))
        part.state = state.movedim(0, -2).flatten(-2)
        theta.add_(update)

    return step
