"""A rule that needs no tuning: a step size for every tensor, from its shape, gradients and horizon."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2l_lightning.checks import check_switches
from l2l_lightning.rules.base import UpdateRule
from l2l_lightning.rules.layout import Layout
from l2l_lightning.rules.nominal import DIRECTIONS, FACTS, NominalFeatures
from l2l_lightning.rules.orthogonal import orthogonalised

LOG_STEP = (-2.927, -0.018, -0.576, 0.396, -0.232, -0.106, -0.690, -0.003, 0.496, -0.057, 0.069)
MIXING = (0.696, 0.125, 0.036, 0.131)
LOG_POWER, LOG_WARM_UP = -0.230, -2.843
"""Where φ starts: what 80 steps of evolution strategies found on small networks, regressions,
factorisations and quadratics."""


class ZeroShot(UpdateRule):
    r"""u_t = −exp(w · f) σ(t) d_t: direction × step size × schedule, every constant of which is φ.

    With x = 2t/T − 1 and the features of `NominalFeatures`,

        d = N + (a₀ + a₁ x) g/√v̂ + (b₀ + b₁ x) m̂₂/√v̂          the direction
        σ = min(1, t / (ω T) + 0.01) · (1 − t/T)^p              warm-up and decay

    and f are the facts of each tensor; if `orthogonal`, what matrices are moved by is orthogonalised. Nothing
    depends on the gradients' scale as long as their squares are numbers (from about 1e-18 to 1e18 in
    float32), a tensor whose gradient always was zero stays, and so does all from step T on. T must be known.
    The state that a parameter takes is four float32 statistics, 16 bytes.

    It is meant to be trained by evolution strategies (`--model.estimator evolution`): windows are too short
    to tell what a step size costs later.

    Args:
        orthogonal: Orthogonalise the updates of matrices with both sides of 4 and more.

    Raises:
        TypeError: orthogonal is no switch.

    Example:
        >>> from l2l_lightning import LearnedOptimizer
        >>> model = nn.Linear(10, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), ZeroShot(), total_steps=1000)
    """

    state_shape = (0,)

    def __init__(self, orthogonal: bool = True) -> None:
        super().__init__()
        check_switches(orthogonal=orthogonal)
        self.orthogonal = orthogonal
        self.coordinatewise = not orthogonal
        self.features = NominalFeatures()
        self.log_step = nn.Parameter(torch.empty(len(FACTS)))
        self.mixing = nn.Parameter(torch.empty(4))
        self.log_power = nn.Parameter(torch.empty(()))
        self.log_warm_up = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Sets φ to its start, which nothing is drawn for."""
        self.log_step.copy_(torch.tensor(LOG_STEP))
        self.mixing.copy_(torch.tensor(MIXING))
        self.log_power.fill_(LOG_POWER)
        self.log_warm_up.fill_(LOG_WARM_UP)

    def step(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t [15, n], s_t [0, n]) to (u_t [n], s_t)."""
        nominal, gradient, slow, progress = inputs[: len(DIRECTIONS) + 1]
        x = 2 * progress - 1
        a0, a1, b0, b1 = self.mixing.unbind()
        direction = nominal + (a0 + a1 * x) * gradient + (b0 + b1 * x) * slow
        log_size = (self.log_step[:, None] * inputs[len(DIRECTIONS) + 1 :]).sum(0)
        # The first step is taken, however long the warm-up.
        warm_up = (progress / self.log_warm_up.exp() + 0.01).clamp(max=1)
        decay = (1 - progress).clamp(min=0) ** self.log_power.exp()
        return -log_size.clamp(max=3).exp() * warm_up * decay * direction, state.clone()

    def finish(self, update: Tensor, layout: Layout) -> Tensor:
        """The update [n] with its matrices orthogonalised."""
        return orthogonalised(update, layout) if self.orthogonal else update
