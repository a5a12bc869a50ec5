"""Evolution strategies: a meta-gradient of whole rollouts, for what acts over the whole horizon.

A window's exact first-order gradient credits an update with the losses of its window alone. What acts over
the whole horizon (a step size, its schedule) is better judged by whole rollouts: a pair of them, under φ + σε
and φ − σε on the same θ0 and the same minibatches, tells by its difference d which is better, and

    g = 1/P Σ_p d_p ε_p / (2σ)

estimates the gradient of the smoothed meta-loss from P pairs, one ε a pair and rollout.

Source: Salimans et al. 2017, "Evolution strategies as a scalable alternative to reinforcement learning"; the
pairs are antithetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l2l_lightning.comparison.statistics import FINAL_STEPS
from l2l_lightning.rollout.optimizees import Optimizees, derive_generator
from l2l_lightning.rollout.perturbed import run_perturbed
from l2l_lightning.rollout.rollout import full_precision
from l2l_lightning.rules.base import Rule


def relative_differences(losses: Tensor, final: bool) -> Tensor:
    """Returns how much worse the first of each pair does than the second, d [P], in [-2, 2].

    d = 2 (a − b) / (|a| + |b|), which does not depend on the losses' scale and is log(a / b) for a ≈ b > 0; a
    and b are means over the last 10 losses if `final`, else d is the mean over all steps. A loss that is not
    finite is worse than any other, and as bad as another that is not.

    Args:
        losses: f_t(θ_t), [horizon, 2P]: the first ones of all pairs, then the second ones in the same order.
        final: Compare the final losses alone.

    Example:
        >>> relative_differences(torch.tensor([[3.0, torch.inf, 1.0, 1.0]]), final=True)
        tensor([1., 2.])
    """
    # Half of the largest number, so that a sum of two is one.
    most = torch.finfo(losses.dtype).max / 2
    losses = losses.nan_to_num(nan=most, posinf=most, neginf=-most).clamp(-most, most)
    if final:
        losses = (losses[-FINAL_STEPS:] / min(FINAL_STEPS, len(losses))).sum(0, keepdim=True)
    a, b = losses.tensor_split(2, dim=1)
    size = (a.abs() + b.abs()).clamp(min=torch.finfo(losses.dtype).tiny)
    return (2 * ((a / size) - (b / size))).mean(0)


def evolution_gradient(
    rule: Rule,
    optimizees: Optimizees,
    horizon: int,
    perturbations: Sequence[dict[str, Tensor]],
    sigma: float,
    final: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the mean of all finite losses and the estimated d/dφ, one tensor per parameter, in their order.

    Args:
        rule: m_φ at φ.
        optimizees: 2P of them: those of the pairs' first rollouts, then the same once more.
        horizon: Steps of a rollout.
        perturbations: ε of each of the P pairs, [*shape] for every parameter by its name.
        sigma: σ.
        final: See `relative_differences`.
    """
    stacked = {
        name: torch.stack([epsilon[name] for epsilon in perturbations]) for name, _ in rule.named_parameters()
    }
    phis = {
        name: torch.cat([phi + sigma * stacked[name], phi - sigma * stacked[name]])
        for name, phi in rule.named_parameters()
    }
    losses = run_perturbed(rule, {name: phi.detach() for name, phi in phis.items()}, optimizees, horizon)
    d = relative_differences(losses, final)
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
