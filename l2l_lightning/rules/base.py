"""The contract of an update rule: what is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(θ [n], g_t [n], s_t, s_{t+1}): adds u_t to θ and writes s_{t+1}, as `UpdateRule.step_`."""


class UpdateRule(nn.Module, ABC):
    """A learned optimizer m_φ: (g_t, s_t) to (u_t, s_{t+1}), for every coordinate alike; φ its parameters.

    A rule sees flat coordinates only, never tensor shapes or tasks, so that one launch serves every
    parameter of every optimizee in the batch. Its inputs may depend on gradients and on the rule's own
    running statistics of them, and on nothing else: along a rollout they are constants, which is what lets
    the meta-gradient skip the unrolled graph (see `rollout`).

    A subclass sets `state_shape` and implements `step`; it overrides `stepper` and `segment_gradient` where
    it has something faster.
    """

    state_shape: tuple[int, ...]
    """A state is [*state_shape, n], coordinates innermost."""

    def init_state(self, n: int, dtype: torch.dtype | None = None) -> Tensor:
        """s_0 of n coordinates, [*state_shape, n], on φ's device, in φ's dtype unless another is given."""
        return next(self.parameters()).new_zeros(*self.state_shape, n, dtype=dtype)

    @abstractmethod
    def step(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(g_t [n], s_t) to (u_t [n], s_{t+1}), differentiable in every argument and in φ."""

    def stepper(self) -> Step:
        """`step_` for many steps with one φ: what depends on φ alone is computed here, once.

        Call it under torch.no_grad, and take another one when φ has changed.
        """

        def step(theta: Tensor, grad: Tensor, state: Tensor, new_state: Tensor) -> None:
            update, updated = self.step(grad, state)
            theta.add_(update)
            new_state.copy_(updated)

        return step

    @torch.no_grad()
    def step_(self, theta: Tensor, grad: Tensor, state: Tensor, new_state: Tensor) -> None:
        """In place and without a graph: θ [n] += u_t; s_{t+1} goes into new_state (which may be `state`)."""
        self.stepper()(theta, grad, state, new_state)

    def window_gradient(self, grads: Tensor, history: Tensor, d_updates: Tensor) -> list[Tensor]:
        """d/dφ of Σ_t <d_updates_t, u_t> along a window: `segment_gradient` where nothing comes after it."""
        return self.segment_gradient(grads, history, d_updates)[0]

    def segment_gradient(
        self, grads: Tensor, history: Tensor, d_updates: Tensor, d_final_state: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The derivatives of Σ_t <d_updates_t, u_t> + <d_final_state, s_T> along T steps of a window.

        Walks the states backwards and differentiates one step at a time, so that no more than one step's
        graph is ever held.

        Args:
            grads: g_t, [T, n].
            history: s_0 … s_T, [T+1, *state_shape, n].
            d_updates: ∂L/∂u_t, [T, n].
            d_final_state: ∂L/∂s_T by what comes after these steps, [*state_shape, n]; None is zero.

        Returns:
            d/dφ, one tensor per parameter, in their order; and d/ds_0, [*state_shape, n].
        """
        parameters = list(self.parameters())
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        d_state = torch.zeros_like(history[-1]) if d_final_state is None else d_final_state
        for t in reversed(range(len(grads))):
            with torch.enable_grad():
                state = history[t].detach().requires_grad_()
                outputs = self.step(grads[t], state)
            d_step = torch.autograd.grad(
                outputs, [state, *parameters], [d_updates[t], d_state], materialize_grads=True
            )
            d_state = d_step[0]
            for total, part in zip(totals, d_step[1:], strict=True):
                total.add_(part)
        return totals, d_state

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws φ anew, from the generator or from torch's global stream."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, so that a checkpoint can name them."""
