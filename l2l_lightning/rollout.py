r"""The inner loop and its meta-gradient, without an unrolled graph.

Along a rollout, g_t = ∇f_t(θ_t) is a constant input (first order: second derivatives dropped), so that
(u_t, s_{t+1}) = m_φ(g_t, s_t), θ_{t+1} = θ_t + u_t and L = Σ_t w_t f_t(θ_t) give

    ∂L/∂u_t = Σ_{r>t} w_r g_r,

a suffix sum of gradients that the forward pass has already computed. The forward pass therefore runs without
autograd and keeps the rule's states; the meta-gradient is a backward through time over those states alone.
It is exact: the tests hold it to autograd through the unrolled graph at 1e-10.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from l2l_lightning.cuda_graphs import GraphCache, Recorder
from l2l_lightning.data.images import Images
from l2l_lightning.optimizees import Optimizees, evaluate, to_device, unstack
from l2l_lightning.rules.base import UpdateRule
from l2l_lightning.tasks.base import Batch, Task

STRETCH = 20
"""Steps of `run_rule` whose minibatches are drawn, and which are recorded as a CUDA graph, at once."""


class _KnownGradient(torch.autograd.Function):
    """A scalar whose derivatives are already known: its value, n, then n parameters and their n gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *d_values: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [d_values[0] * gradient for gradient in ctx.saved_tensors]
        return None, None, *gradients, *(None for _ in gradients)


class Workspace:
    """Preallocated window buffers and recorded CUDA graphs, reused from window to window.

    A window's history is hundreds of MiB; handing it back to the system and faulting it in again would cost
    as much as computing it. A copy of a workspace, pickled or deep, is a fresh one.

    Args:
        recorder: What records graphs; None is torch.cuda.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._buffers: dict[str, Tensor] = {}
        self.graphs = GraphCache(recorder)

    def __reduce__(self) -> tuple[Any, ...]:
        return Workspace, ()

    def empty(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """The named buffer in this shape, with like's dtype and device; its contents are arbitrary."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.numel() < size
            or (buffer.dtype, buffer.device) != (like.dtype, like.device)
        ):
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(*shape)


@dataclass(frozen=True)
class Window:
    """What a window of T steps gives."""

    meta_loss: Tensor
    """Mean over the K optimizees of Σ_t w_t f_t(θ_t), t = 0 … T: a scalar, differentiable in φ."""
    losses: Tensor
    """f_t(θ_t), [T+1, K], detached."""


class Rollout:
    """K optimizees under one rule, advanced window by window; θ, the state and the generators are carried.

    Args:
        rule: m_φ.
        optimizees: What it optimises; their θ is advanced in place.
        workspace: Buffers and graphs to reuse (a training run shares one between its rollouts).
        cuda_graphs: Record a window as one CUDA graph and replay it: the same numbers, without a launch for
            every operation. None: on a CUDA device, unless the task cannot be recorded (a warning then says
            why); True: or else an error; False: never.

    Example:
        >>> from l2l_lightning.rules import CoordinatewiseLSTM
        >>> from l2l_lightning.tasks import Quadratic
        >>> rule = CoordinatewiseLSTM(preprocessing="identity")
        >>> rollout = Rollout(rule, Optimizees(Quadratic(), None, seed=0, stream="train", indices=range(4)))
        >>> rollout.window(20).meta_loss.backward()
    """

    def __init__(
        self,
        rule: UpdateRule,
        optimizees: Optimizees,
        workspace: Workspace | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        self.rule = rule
        self.optimizees = optimizees
        self.workspace = workspace or Workspace()
        self.cuda_graphs = cuda_graphs
        self.state = rule.init_state(optimizees.theta.numel())
        self.steps_done = 0

    def window(self, unroll: int, weights: Tensor | None = None, second_order: bool = False) -> Window:
        """Advances every optimizee by `unroll` steps and returns the window's meta-loss.

        The loss is counted at T+1 points, as DeepMind's code does: the last is re-evaluated, on a fresh
        minibatch, as the next window's first. The meta-gradient is truncated at the window's start.

        Args:
            unroll: T ≥ 1.
            weights: w_t, [T+1]; None is all ones.
            second_order: Differentiate the optimizee's gradients too, through the unrolled graph: exact
                second-order meta-gradients at the memory and time of unrolling.

        Raises:
            ValueError: unroll < 1, weights that are not [T+1], or second_order with cuda_graphs=True.
            CaptureError: cuda_graphs=True, and there is no CUDA device or the task cannot be recorded.
        """
        if unroll < 1:
            raise ValueError(f"unroll must be at least 1, got {unroll}")
        if second_order and self.cuda_graphs:
            raise ValueError("second_order keeps the unrolled graph: cuda_graphs must not be true with it")
        if weights is None:
            weights = torch.ones(unroll + 1)
        if weights.shape != (unroll + 1,):
            raise ValueError(f"weights must be [unroll + 1] = [{unroll + 1}], got {list(weights.shape)}")
        run = self._unrolled_window if second_order else self._window
        window = run(unroll, weights.to(self.optimizees.dtype))
        self.steps_done += unroll
        return window

    def _window(self, T: int, weights: Tensor) -> Window:
        optimizees, rule = self.optimizees, self.rule
        task, images = optimizees.task, optimizees.images
        theta = optimizees.theta
        K, N = theta.shape
        buffer = self.workspace.empty
        history = buffer("history", (T + 1, *self.state.shape), self.state)
        grads = buffer("grads", (T + 1, K * N), theta)
        losses = theta.new_empty(T + 1, K)
        leaves, structure = tree_flatten(optimizees.draw(T + 1))

        def run(theta: Tensor, losses: Tensor, *leaves: Tensor) -> None:
            batches = unstack(tree_unflatten(leaves, structure), T + 1)
            _inner_loop(rule, task, images, theta, batches, losses, history.unbind(), grads.unbind())

        history[0] = self.state
        key = ("window", *_key(rule, task, images), history.data_ptr(), grads.data_ptr())
        self.workspace.graphs.run(run, key, [theta, losses], leaves, task, self.cuda_graphs)
        self.state.copy_(history[T])
        value = (to_device(weights, theta.device) @ losses).mean()

        parameters = list(rule.parameters())
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
            return Window(value, losses)
        # d_updates[t] = Σ_{r>t} w_r g_r / K, accumulated from the end.
        d_updates = buffer("d_updates", (T, K * N), theta)
        scale = (weights / K).tolist()
        g, d = grads.unbind(), d_updates.unbind()
        torch.mul(g[T], scale[T], out=d[T - 1])
        for t in reversed(range(1, T)):
            torch.add(d[t], g[t], alpha=scale[t], out=d[t - 1])
        gradients = rule.window_gradient(grads[:T], history, d_updates)
        attached = _KnownGradient.apply(value, len(parameters), *parameters, *gradients)
        return Window(cast(Tensor, attached), losses)

    def _unrolled_window(self, T: int, weights: Tensor) -> Window:
        optimizees = self.optimizees
        K, N = optimizees.theta.shape
        theta, state = optimizees.theta.detach().requires_grad_(), self.state
        losses: list[Tensor] = []
        for t in range(T + 1):
            losses.append(optimizees.task.losses(theta, optimizees.next_batches()))
            if t < T:
                (grad,) = torch.autograd.grad(losses[-1].sum(), theta, create_graph=True)
                update, state = self.rule.step(grad.reshape(-1), state)
                theta = theta + update.view(K, N)
        optimizees.theta, self.state = theta.detach(), state.detach()
        stacked = torch.stack(losses)
        value = (to_device(weights, stacked.device) @ stacked).mean()
        return Window(value, stacked.detach())

    def state_dict(self) -> dict[str, Any]:
        """What resuming in mid-rollout needs, as tensors and plain values."""
        return {
            "optimizees": self.optimizees.state_dict(),
            "state": self.state.clone(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a rollout of the same rule and optimizees was saved."""
        self.optimizees.load_state_dict(state["optimizees"])
        self.state = state["state"].to(self.state)
        self.steps_done = state["steps_done"]


@torch.no_grad()
def run_rule(
    rule: UpdateRule,
    optimizees: Optimizees,
    horizon: int,
    workspace: Workspace | None = None,
    cuda_graphs: bool | None = False,
) -> Tensor:
    """Optimises with a trained rule and no meta-gradient: f_t(θ_t) for t = 0 … horizon-1, [horizon, K].

    The state is updated in place, so that memory does not grow with the horizon.

    Args:
        rule: m_φ.
        optimizees: What it optimises; their θ is advanced in place.
        horizon: Number of steps.
        workspace: Where CUDA graphs are kept from one run to the next.
        cuda_graphs: As for Rollout, a stretch of 20 steps at a time. Recording takes longer than two
            stretches do: it pays if a workspace is at hand.

    Raises:
        ValueError: horizon < 1.
        CaptureError: cuda_graphs=True, and there is no CUDA device or the task cannot be recorded.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    graphs = (workspace or Workspace()).graphs
    task, images, theta = optimizees.task, optimizees.images, optimizees.theta
    state = rule.init_state(theta.numel())
    losses = theta.new_empty(horizon, len(optimizees))
    for stretch in torch.split(losses, STRETCH):
        count = len(stretch)
        leaves, structure = tree_flatten(optimizees.draw(count))

        def run(
            theta: Tensor,
            state: Tensor,
            losses: Tensor,
            *leaves: Tensor,
            count: int = count,
            structure: Any = structure,
        ) -> None:
            batches = unstack(tree_unflatten(leaves, structure), count)
            _inner_loop(rule, task, images, theta, batches, losses, [state] * (count + 1))

        key = ("run", *_key(rule, task, images))
        graphs.run(run, key, [theta, state, stretch], leaves, task, cuda_graphs)
    return losses


@torch.no_grad()
def _inner_loop(
    rule: UpdateRule,
    task: Task,
    images: Images | None,
    theta: Tensor,
    batches: Sequence[Batch],
    losses: Tensor,
    states: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
) -> None:
    """Evaluates θ [K, N] on minibatch after minibatch, with a step of the rule in between, in place.

    A window has as many states as minibatches: it ends with an evaluation. One state more, and it ends with a
    step. Writes f_t(θ_t) into losses [len(batches), K], s_{t+1} into states[t + 1] and, if they are kept, g_t
    into grads[t], [K·N]. Nothing here may depend on a tensor's value or make the host wait for the device.
    """
    step, flat = rule.stepper(), theta.view(-1)
    found = []
    for t, batch in enumerate(batches):
        loss, grad = evaluate(task, images, theta, batch)
        found.append(loss)
        grad = grad.reshape(-1)
        if grads is not None:
            grad = grads[t].copy_(grad)
        if t + 1 < len(states):
            step(flat, grad, states[t], states[t + 1])
    torch.stack(found, out=losses)


def _key(rule: UpdateRule, task: Task, images: Images | None) -> tuple[Hashable, ...]:
    """What a recorded inner loop depends on besides its arguments and buffers: objects, and where φ lies."""
    phi = tuple((x.data_ptr(), x.dtype) for x in itertools.chain(rule.parameters(), rule.buffers()))
    return id(rule), id(task), id(images), phi
