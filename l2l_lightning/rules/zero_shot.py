"""A rule that needs no tuning: a step size for every tensor, from its shape, gradients and horizon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from l2l_lightning.checks import check_switches
from l2l_lightning.rules.base import PopulationStep, TensorStep, UpdateRule
from l2l_lightning.rules.layout import Layout
from l2l_lightning.rules.nominal import (
    DIRECTIONS,
    FACTS,
    FAN_IN,
    HORIZON,
    MOST_DECAY,
    SNR,
    NominalFeatures,
    log_gain,
)
from l2l_lightning.rules.orthogonal import is_orthogonalised, orthogonalised
from l2l_lightning.rules.zero_shot_population import ZeroShotPopulation
from l2l_lightning.rules.zero_shot_step import ZeroShotStep

LOG_STEP, MIXING, DECAY = (-3.0, *[0.0] * (len(FACTS) - 1)), (0.0, 0.0, 0.0, 0.0), (-4.0, 0.0, 0.0, 0.0)
LOG_POWER, LOG_WARM_UP = 0.0, -3.0
"""Where φ starts: NAdam's direction, one step size of 0.05, a warm-up of a twentieth, and linear decay."""


class ZeroShot(UpdateRule):
    r"""u_t = −η_t (d_t + λ_t θ_t): a direction and a decay, and a step size η for each tensor at each step.

    With x = 2t/T − 1 and the directions N, g/√v̂ and m̂₂/√v̂ and the facts f of `NominalFeatures`,

        d = N + (a₀ + a₁ x) g/√v̂ + (b₀ + b₁ x) m̂₂/√v̂                    the direction
        η = exp(w · f) · min(1, t / (ω T) + 0.01) · (1 − t/T)^p           facts, warm-up, decay of the step
        λ = min(exp(l · f'), 0.1 / η)                                     decay of the weights

    with f' the first 2 or all 4 of DECAY_FACTS: 1, and the logarithms of the signal to noise, of the gain
    (√fan-in times the root mean square of the tensor, see `log_gain`) and of the horizon. d is orthogonalised
    for matrices with both sides of 4 and more (if `orthogonal`), and λ is 0 for all other tensors. φ is w, a,
    b, ω, p and l. Nothing depends on the gradients' scale as long as their squares are numbers (from about
    1e-18 to 1e18 in float32); a coordinate whose gradient always was zero stays, in a matrix that is not
    orthogonalised or whose row has none either; and all stays from step T on, if T is known. The state that a
    parameter takes is three float32 statistics, 12 bytes, or 8 where it is compact.

    A fresh one is NAdam with one step size; `pretrained.load("zero-shot")` is trained. It is trained by
    evolution strategies (`fit --config zero_shot`): windows are too short to tell what a step size costs
    later.

    Args:
        orthogonal: Orthogonalise the updates of matrices with both sides of 4 and more.
        horizon_free: Go without T, which the rule otherwise needs (see `NominalFeatures`).
        compact: Keep the two means of gradients in bfloat16.
        decay_facts: How many of DECAY_FACTS the decay of the weights follows: 4, or the 2 that it had first.

    Raises:
        TypeError: A switch is none.
        ValueError: decay_facts is neither 2 nor 4.

    Example:
        >>> from l2l_lightning import LearnedOptimizer
        >>> model = nn.Linear(10, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), "zero-shot", total_steps=1000)
    """

    features: NominalFeatures
    state_shape = (0,)
    coordinatewise = False
    finishes_shards = True

    def __init__(
        self,
        orthogonal: bool = True,
        horizon_free: bool = False,
        compact: bool = False,
        decay_facts: Literal[2, 4] = 2,
    ) -> None:
        super().__init__()
        check_switches(orthogonal=orthogonal, horizon_free=horizon_free, compact=compact)
        if decay_facts not in (2, 4):
            raise ValueError(f"decay_facts must be 2 or 4, got {decay_facts!r}")
        self.orthogonal = orthogonal
        self.horizon_free = horizon_free
        self.compact = compact
        self.decay_facts = decay_facts
        self.features = NominalFeatures(horizon_free, compact)
        self.log_step = nn.Parameter(torch.empty(len(FACTS)))
        self.mixing = nn.Parameter(torch.empty(4))
        self.decay = nn.Parameter(torch.empty(decay_facts))
        self.log_power = nn.Parameter(torch.empty(()))
        self.log_warm_up = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Sets φ to its start, which nothing is drawn for."""
        self.log_step.copy_(torch.tensor(LOG_STEP))
        self.mixing.copy_(torch.tensor(MIXING))
        self.decay.copy_(torch.tensor(DECAY[: self.decay_facts]))
        self.log_power.fill_(LOG_POWER)
        self.log_warm_up.fill_(LOG_WARM_UP)

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, without those of later versions that are at their defaults.

        State dicts know a rule by a hash of these, and those of earlier versions have no others.
        """
        later = {"compact": False, "decay_facts": 2}
        return {k: v for k, v in super().config().items() if k not in later or v != later[k]}

    def compacted(self) -> ZeroShot:
        """Returns the same rule with compact statistics; a subclass, which may read them, as it is."""
        if self.compact or type(self) is not ZeroShot:
            return self
        arguments = {**self.config(), "compact": True}
        other = ZeroShot(**arguments).to(self.log_step)
        other.load_state_dict(self.state_dict())
        return other

    def step(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t [15, n], s_t [0, n]) to (−η d [n], s_t)."""
        return -self.step_size(inputs) * self.direction(inputs), state.clone()

    def direction(self, inputs: Tensor) -> Tensor:
        """Returns d [n] of x_t [15, n], not yet orthogonalised."""
        nominal, gradient, slow, progress = inputs[: len(DIRECTIONS) + 1]
        x = 2 * progress - 1
        a0, a1, b0, b1 = self.mixing.unbind()
        direction: Tensor = nominal + (a0 + a1 * x) * gradient + (b0 + b1 * x) * slow
        return direction

    def step_size(self, inputs: Tensor) -> Tensor:
        """Returns η [n] of x_t [15, n]."""
        progress, facts = inputs[len(DIRECTIONS)], inputs[-len(FACTS) :]
        log_size = (self.log_step[:, None] * facts).sum(0)
        # The first step is taken, however long the warm-up.
        warm_up = (progress / self.log_warm_up.exp() + 0.01).clamp(max=1)
        cool_down = (1 - progress).clamp(min=0) ** self.log_power.exp()
        return log_size.clamp(max=3).exp() * warm_up * cool_down

    def population_step(
        self, phis: Mapping[str, Tensor], layout: Layout, statistics: Tensor, state: Tensor
    ) -> PopulationStep | None:
        """Steps of K optimizees; None of compact statistics, and of a subclass, which may define others."""
        if self.compact or type(self) is not ZeroShot:
            return None
        return ZeroShotPopulation(self, phis, layout, statistics)

    def tensor_step(self, layout: Layout, statistics: Tensor) -> TensorStep | None:
        """The fused step; None of a subclass, in float64 on CUDA, and where shards are to be put together."""
        in_shards = self.orthogonal and any(t.cuts and is_orthogonalised(t) for t in layout.tensors)
        if (
            type(self) is not ZeroShot
            or in_shards
            or (statistics.is_cuda and statistics.dtype == torch.float64)
        ):
            return None
        return ZeroShotStep(self, layout, statistics)

    def finish(self, update: Tensor, inputs: Tensor, theta: Tensor, layout: Layout) -> Tensor:
        """−η d [n], orthogonalised if that is wished, to −η (d + λ θ)."""
        decays_here, facts = inputs[len(DIRECTIONS) + 1], inputs[-len(FACTS) :]
        first, of_snr, *others = self.decay.unbind()
        log_decay = first + of_snr * facts[SNR]
        if others:
            of_gain, of_horizon = others
            mean_square = layout.mean(theta.to(update.dtype).square())
            log_decay = log_decay + of_gain * log_gain(mean_square, facts[FAN_IN])
            log_decay = log_decay + of_horizon * facts[HORIZON]
        shrink = (self.step_size(inputs) * log_decay.exp()).clamp(max=MOST_DECAY) * decays_here
        direction = orthogonalised(update, layout) if self.orthogonal else update
        return direction - shrink * theta
