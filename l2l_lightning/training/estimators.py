"""Evolution strategies: a meta-gradient of whole rollouts, for what acts over the whole horizon.

A window's exact first-order gradient credits an update with the losses of its window alone. What acts over
the whole horizon (a step size, its schedule) is better judged by whole rollouts: a pair of them, under φ + σε
and φ − σε on the same θ0 and the same minibatches, tells by its difference d which is better, and

    g = 1/P Σ_p d_p ε_p / (2σ)

estimates the gradient of the smoothed meta-loss from P pairs, one ε a pair and rollout. Windows of such
rollouts, each with the ε that its rollout began with, give an estimate at every window (NRES); φ moves on in
between, so that a rollout's later windows are of a θ that earlier φ have led to.

Source: Salimans et al. 2017, "Evolution strategies as a scalable alternative to reinforcement learning", with
antithetic pairs; Li et al. 2023, "Noise-reuse in online evolution strategies" (NRES).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from l2l_lightning.comparison.statistics import FINAL_STEPS
from l2l_lightning.data.examples import Examples
from l2l_lightning.rollout.optimizees import derive_generator
from l2l_lightning.rollout.perturbed import PerturbedRollout
from l2l_lightning.rollout.rollout import full_precision
from l2l_lightning.rules.base import Rule


def relative_differences(losses: Tensor, final: bool) -> Tensor:
    """Returns how much worse the first of each pair does than the second, d [P], in [-2, 2].

    d = 2 (a − b) / (|a| + |b|), which does not depend on the losses' scale and is log(a / b) for a ≈ b > 0; a
    and b are means over the last 10 losses if `final`, else d is the mean over all steps. A loss that is not
    finite is worse than any other, and as bad as another that is not.

    Args:
        losses: f_t(θ_t), [steps, 2P]: the two of each pair side by side.
        final: Compare the final losses alone.

    Example:
        >>> relative_differences(torch.tensor([[3.0, 1.0, torch.inf, 1.0]]), final=True)
        tensor([1., 2.])
    """
    # Half of the largest number, so that a sum of two is one.
    most = torch.finfo(losses.dtype).max / 2
    losses = losses.nan_to_num(nan=most, posinf=most, neginf=-most).clamp(-most, most)
    if final:
        losses = (losses[-FINAL_STEPS:] / min(FINAL_STEPS, len(losses))).sum(0, keepdim=True)
    a, b = losses[:, ::2], losses[:, 1::2]
    size = (a.abs() + b.abs()).clamp(min=torch.finfo(losses.dtype).tiny)
    return (2 * ((a / size) - (b / size))).mean(0)


LIMIT = 0.5
"""Where held-out losses are compared, a difference counts for this much at most: losses of problems without
noise, which differ by orders of magnitude, would drown all others."""


def evolution_gradient(
    rollout: PerturbedRollout,
    unroll: int,
    perturbations: Sequence[dict[str, Tensor]],
    sigma: float,
    compared: Literal["uniform", "final", "held_out"] = "uniform",
    held_out: Examples | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the mean of all finite losses and the estimated d/dφ, one tensor per parameter, in their order.

    Args:
        rollout: Of 2P optimizees, the two of each pair side by side; it is advanced by a window.
        unroll: The window's steps: all of the rollout, or with NRES fewer.
        perturbations: ε of each of the P pairs, [*shape] for every parameter by its name.
        sigma: σ.
        compared: d is, with `relative_differences`, of all losses ("uniform"), of the final ones ("final"),
            or of the losses on held-out examples after the last step plus half of that of all losses
            ("held_out"), both within [-LIMIT, LIMIT].
        held_out: The images that are held out, if the task needs any.
    """
    phi = {name: value.detach() for name, value in rollout.rule.named_parameters()}
    stacked = {name: torch.stack([epsilon[name] for epsilon in perturbations]) for name in phi}
    phis = {
        name: torch.stack([value + sigma * stacked[name], value - sigma * stacked[name]], 1).flatten(0, 1)
        for name, value in phi.items()
    }
    losses = rollout.window(phis, unroll)
    d = relative_differences(losses, compared == "final")
    if compared == "held_out":
        at_the_end = rollout.optimizees.held_out_losses(held_out)[None]
        d = relative_differences(at_the_end, final=True).clamp(-LIMIT, LIMIT) + 0.5 * d.clamp(-LIMIT, LIMIT)
    with full_precision(d):
        gradients = [
            torch.tensordot(d.to(epsilon.dtype), epsilon, 1) / (2 * sigma * len(d))
            for epsilon in stacked.values()
        ]
    return losses[losses.isfinite()].mean(), gradients


def perturbation(rule: Rule, seed: int, index: int) -> dict[str, Tensor]:
    """Returns the run's index-th ε ~ N(0, 1), [*shape] for every parameter of the rule by its name.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM
        >>> len(perturbation(CoordinatewiseLSTM(1, 4), seed=0, index=3))
        4
    """
    generator = derive_generator(seed, "perturbation", index)
    return {
        name: torch.randn(phi.shape, generator=generator).to(phi.device, phi.dtype)
        for name, phi in rule.named_parameters()
    }
