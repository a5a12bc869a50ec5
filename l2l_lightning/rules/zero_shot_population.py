"""`ZeroShot`'s steps of K optimizees, each under a φ of its own; `ZeroShot` itself is the definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2l_lightning.rules.layout import Layout, Time
from l2l_lightning.rules.nominal import (
    FAN_IN,
    FAST,
    HORIZON,
    MOST_DECAY,
    SNR,
    decays_of_means,
    log_gain,
    log_snr,
    shape_facts,
)
from l2l_lightning.rules.orthogonal import orthogonalised

if TYPE_CHECKING:
    from l2l_lightning.rules.zero_shot import ZeroShot


class ZeroShotPopulation:
    """Moves K optimizees of the same tensors, the k-th by the k-th φ, all at once.

    What a tensor has one of is computed once for it, where torch.func.vmap of the definition has it for every
    coordinate; θ goes to the same places, to rounding.

    Args:
        rule: Which ZeroShot; its own φ is not read.
        phis: The K values of every parameter by its name, [K, *shape] each.
        layout: The tensors, of K copies.
        statistics: m, m₂ and v, [3, K · n], which steps bring up to date in place.
    """

    def __init__(
        self, rule: ZeroShot, phis: Mapping[str, Tensor], layout: Layout, statistics: Tensor
    ) -> None:
        self.rule = rule
        self.phis = phis
        self.layout = layout
        self.statistics = statistics.view(3, layout.copies, layout.num_coordinates)
        self.decays = decays_of_means(statistics.dtype, statistics.device)[..., None]
        facts = shape_facts(layout, statistics.dtype, statistics.device)  # [7, tensors]
        self.decays_here, self.facts = facts[:1], facts[1:]
        self.sizes = [tensor.numel for tensor in layout.tensors]
        self.numels = torch.tensor(self.sizes, dtype=statistics.dtype, device=statistics.device)
        tensors = torch.arange(len(self.sizes), device=statistics.device)
        repeats, total = torch.tensor(self.sizes, device=tensors.device), sum(self.sizes)
        self.tensor_of = torch.repeat_interleave(tensors, repeats, output_size=total)  # told: nobody waits

    def __call__(self, theta: Tensor, grad: Tensor, time: Time) -> None:
        """Moves θ [K, n], in place, after gradients g_t [K, n]."""
        phis, step = self.phis, time.step
        total = self.rule.features.total(time)
        progress = (step / total).clamp(max=1)
        x = 2 * progress - 1
        sizes, shrink = self.sizes_of(self.inputs(step, total, progress), theta)

        self.statistics.lerp_(torch.stack([grad, grad, grad * grad]), 1 - self.decays)
        fast, slow, square = self.statistics
        of_fast, of_slow, of_square = (1 / (1 - self.decays ** (step + 1))).unbind()
        square = square * of_square
        inverse = torch.where(square > 0, square.clamp(min=torch.finfo(grad.dtype).tiny).rsqrt(), 0.0)
        a0, a1, b0, b1 = phis["mixing"].T[..., None]
        direction = FAST * of_fast * fast + (1 - FAST + a0 + a1 * x) * grad
        direction = direction.addcmul_((b0 + b1 * x) * of_slow, slow).mul_(inverse)
        size = sizes[:, self.tensor_of]
        update = direction.mul_(size)
        if self.rule.orthogonal:
            update = orthogonalised(update.flatten(), self.layout).view_as(theta)
        theta.sub_(update.addcmul_(shrink[:, self.tensor_of] * (inverse > 0), theta))

    def inputs(self, step: Tensor, total: Tensor, progress: Tensor) -> Tensor:
        """What a tensor's coordinates have in common of x_t, [K, 12, tensors]: progress, decay and facts."""
        before = self.statistics / (1 - self.decays**step).clamp(min=torch.finfo(progress.dtype).tiny)
        powers = torch.stack([before[0].square(), before[1].square(), before[2]])
        fast, slow, power = self.means(powers)  # [K, tensors] each
        snr, slow_snr = log_snr(fast, power), log_snr(slow, power)
        one, *shape = self.facts.unbind()
        horizon = (total / 300).log().expand_as(one)
        fixed = torch.stack([progress.expand_as(one), self.decays_here[0], one, horizon, *shape])
        moving = torch.stack([snr, slow_snr, (2 * progress - 1) * snr], 1)  # [K, 3, tensors]
        return torch.cat([fixed.expand(len(moving), -1, -1), moving], 1)

    def means(self, values: Tensor) -> Tensor:
        """The means [..., tensors] over every tensor of values [..., n]."""
        return torch.stack([part.sum(-1) for part in torch.split(values, self.sizes, -1)], -1) / self.numels

    def sizes_of(self, inputs: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """η and η λ of every tensor, [K, tensors] each, of what its coordinates have in common, and of θ."""
        phis = self.phis
        progress, decays_here, facts = inputs[:, 0, :1], inputs[:, 1], inputs[:, 2:]
        log_size = (phis["log_step"][..., None] * facts).sum(1)
        warm_up = (progress / phis["log_warm_up"].exp()[:, None] + 0.01).clamp(max=1)
        cool_down = (1 - progress).clamp(min=0) ** phis["log_power"].exp()[:, None]
        size = log_size.clamp(max=3).exp() * warm_up * cool_down
        first, of_snr, *others = phis["decay"].unsqueeze(-1).unbind(1)
        log_decay = first + of_snr * facts[:, SNR]
        if others:
            of_gain, of_horizon = others
            log_decay = log_decay + of_gain * log_gain(self.means(theta.square()), facts[:, FAN_IN])
            log_decay = log_decay + of_horizon * facts[:, HORIZON]
        return size, (size * log_decay.exp()).clamp(max=MOST_DECAY) * decays_here
