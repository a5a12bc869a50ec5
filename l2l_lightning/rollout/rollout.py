r"""The inner loop and its meta-gradient, without an unrolled graph.

Along a rollout, g_t = ∇f_t(θ_t) is a constant (first order: second derivatives dropped), and so is x_t, g_t
itself or features of the gradients so far, so that (u_t, s_{t+1}) = m_φ(x_t, s_t), θ_{t+1} = θ_t + u_t and
L = Σ_t w_t f_t(θ_t) give

    ∂L/∂u_t = Σ_{r>t} w_r g_r,

a suffix sum of gradients that the forward pass has already computed. The forward pass therefore runs without
autograd and keeps the rule's states; the meta-gradient is a backward through time over those states alone.
It is exact: the tests hold it to autograd through the unrolled graph at 1e-10.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from l2l_lightning.data.images import Images
from l2l_lightning.rollout.buffers import Workspace
from l2l_lightning.rollout.history import FullHistory, History, HistoryDtype, KeptStates, check_history
from l2l_lightning.rollout.optimizees import Optimizees, evaluate, gather, to_device, unstack
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


@dataclass(frozen=True)
class Window:
    """What a window of T steps gives."""

    meta_loss: Tensor
    """Mean over the K optimizees of Σ_t w_t f_t(θ_t), t = 0 … T: a scalar, differentiable in φ.

    A masked optimizee adds nothing to the sum, which is still divided by K: the mean over several processes
    is what one process would find. With all K masked it is NaN, and so are its derivatives.
    """
    losses: Tensor
    """f_t(θ_t), [T+1, K], detached; NaN for an optimizee that was masked in an earlier window."""
    masked: Tensor
    """Which optimizees are masked, [K] bool on the CPU (see Rollout)."""


class Rollout:
    """K optimizees under one rule, advanced window by window.

    θ, the rule's state, its features' statistics and the generators are carried from one to the next.

    An optimizee that a window finds with a loss or a gradient that is NaN or infinite is masked, in that
    window and for the rest of the rollout: it adds nothing to the meta-loss and its gradient, and the others
    go on as if it were not there.

    Args:
        rule: m_φ.
        optimizees: What it optimises; their θ is advanced in place.
        workspace: Buffers and graphs to reuse (a training run shares one between its rollouts).
        cuda_graphs: Record a window as one CUDA graph and replay it: the same numbers, without a launch for
            every operation. None: on a CUDA device, unless the task cannot be recorded (a warning then says
            why); True: or else an error; False: never.
        checkpoint_every: k: of a window's states only each k-th is kept, from the first on, and the backward
            computes the others again, a chunk of coordinates at a time: the same numbers, T/k states in place
            of T+1, for about another forward's time. With k ≥ T memory grows with the window by its gradients
            alone. None keeps all.
        history_dtype: What kept states are stored in. "float32": as they are computed. "bfloat16": rounded,
            in half the memory; the rollout itself is not touched, and the meta-gradient errs by a fraction
            of bfloat16's unit roundoff, 2⁻⁸.

    Raises:
        ValueError: checkpoint_every < 1, or there is no such history_dtype.

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
        checkpoint_every: int | None = None,
        history_dtype: HistoryDtype = "float32",
    ) -> None:
        check_history(checkpoint_every, history_dtype, second_order=False)
        self.rule = rule
        self.optimizees = optimizees
        self.workspace = workspace or Workspace()
        self.cuda_graphs = cuda_graphs
        self.checkpoint_every = checkpoint_every
        self.history_dtype: HistoryDtype = history_dtype
        self.state = rule.init_state(optimizees.theta.numel())
        self.statistics = rule.init_statistics(optimizees.theta.numel(), optimizees.dtype)
        self.masked = torch.zeros(len(optimizees), dtype=torch.bool)  # on the CPU: the host decides by it
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
            ValueError: unroll < 1, weights that are not [T+1], or second_order with cuda_graphs=True,
                checkpoint_every or a history_dtype.
            CaptureError: cuda_graphs=True, and there is no CUDA device or the task cannot be recorded.
        """
        if unroll < 1:
            raise ValueError(f"unroll must be at least 1, got {unroll}")
        if second_order and self.cuda_graphs:
            raise ValueError("second_order keeps the unrolled graph: cuda_graphs must not be true with it")
        check_history(self.checkpoint_every, self.history_dtype, second_order)
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
        grads = self.workspace.empty("grads", (T + 1, K * N), theta)
        inputs = grads[:-1]
        if rule.features is not None:
            inputs = self.workspace.empty("inputs", (T, rule.features.width, K * N), theta)
        history = self._history(T)
        losses = theta.new_empty(T + 1, K)
        leaves, structure = tree_flatten(optimizees.draw(T + 1))

        def run(theta: Tensor, losses: Tensor, statistics: Tensor, *others: Tensor) -> None:
            states, leaves = others[: len(history.carried)], others[len(history.carried) :]
            batches = unstack(tree_unflatten(leaves, structure), T + 1)
            _inner_loop(
                rule,
                task,
                images,
                theta,
                batches,
                losses,
                statistics,
                history.states(states),
                grads.unbind(),
                inputs.unbind(),
                history.kept,
            )

        key = ("window", *_key(rule, task, images), *history.key, grads.data_ptr(), inputs.data_ptr())
        carried = [theta, losses, self.statistics, *history.carried]
        self.workspace.graphs.run(run, key, carried, leaves, task, self.cuda_graphs)
        with _full_precision(theta):
            return self._finished_window(history, grads, inputs, losses, weights)

    def _finished_window(
        self, history: History, grads: Tensor, inputs: Tensor, losses: Tensor, weights: Tensor
    ) -> Window:
        """The meta-loss and its derivatives, of a window's gradients, inputs and losses.

        Args:
            history: Its states.
            grads: g_0 … g_T, [T+1, K·N].
            inputs: x_0 … x_{T-1}, [T, K·N] or [T, width, K·N].
            losses: f_0 … f_T, [T+1, K].
            weights: w_t, [T+1].
        """
        theta, rule = self.optimizees.theta, self.rule
        T, (K, N) = len(losses) - 1, theta.shape
        history.finish()
        scale = (weights / K).tolist()
        parameters = list(rule.parameters())
        differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        before = self.masked
        totals = to_device(weights, theta.device) @ losses
        value = totals.mean()
        gradients = history.gradient(grads, inputs, scale) if differentiable and not before.any() else []
        # Only now does the host wait for the device, which has all of the window to do.
        self.masked = before | ~_finite(losses, grads.view(T + 1, K, N)).cpu()
        if self.masked.any():
            value = totals[_where(~self.masked, theta.device)].sum() / K
            losses[:, _where(before, theta.device)] = torch.nan
            if differentiable and not self.masked.all():
                # Zero times NaN is NaN: all that the backward reads of a masked optimizee becomes zero.
                for tensor in (grads, inputs, history.stored):
                    per_optimizee = tensor.view(*tensor.shape[:-1], K, N)
                    per_optimizee.index_fill_(-2, _where(self.masked, theta.device), 0)
                gradients = history.gradient(grads, inputs, scale)
        if self.masked.all():
            value, gradients = _undefined(value, parameters)
        if differentiable:
            value = _with_derivatives(value, parameters, gradients)
        return Window(value, losses, self.masked)

    def _history(self, T: int) -> History:
        if self.checkpoint_every is None and self.history_dtype == "float32":
            return FullHistory(self.rule, self.state, T, self.workspace)
        dtype = torch.bfloat16 if self.history_dtype == "bfloat16" else self.state.dtype
        return KeptStates(self.rule, self.state, T, self.workspace, self.checkpoint_every, dtype)

    def _unrolled_window(self, T: int, weights: Tensor) -> Window:
        optimizees = self.optimizees
        theta, state, masked = optimizees.theta.clone(), self.state.clone(), self.masked.clone()
        statistics = self.statistics.clone()
        K, N = theta.shape
        batches = unstack(optimizees.draw(T + 1), T + 1)
        losses = theta.new_full((T + 1, K), torch.nan)
        finite = masked.new_zeros(())
        while not finite.all() and not masked.all():
            # One NaN in the graph makes the derivatives of all NaN: it is unrolled anew for the others.
            rest = _where(~masked, theta.device)
            unrolled, new_theta, new_state, new_statistics, finite = self._unroll(rest, batches)
            theta[rest], losses[:, rest] = new_theta, unrolled.detach()
            for carried, new in ((state, new_state), (statistics, new_statistics)):
                carried.view(*carried.shape[:-1], K, N)[..., rest, :] = new
            masked[rest[~finite].cpu()] = True
        if masked.all():
            parameters = list(self.rule.parameters())
            value, gradients = _undefined(losses.new_empty(()), parameters)
            value = _with_derivatives(value, parameters, gradients)
        else:
            with _full_precision(theta):
                value = (to_device(weights, theta.device) @ unrolled).mean() * (len(rest) / K)
        optimizees.theta, self.state, self.statistics, self.masked = theta, state, statistics, masked
        return Window(value, losses, masked)

    def _unroll(self, rest: Tensor, batches: Sequence[Batch]) -> tuple[Tensor, ...]:
        """The window of some of the K optimizees, with its graph.

        Args:
            rest: Indices of the n that are run.
            batches: Minibatches [K, …] of T+1 evaluations.

        Returns:
            f_t(θ_t) [T+1, n] with the graph. Without: θ [n, N], the state [*state_shape, n, N] and the
            statistics [rows, n, N] after T steps, and which had nothing but finite losses and gradients [n].
        """
        optimizees = self.optimizees
        K, N = optimizees.theta.shape
        theta = optimizees.theta[rest].requires_grad_()
        state, statistics = (
            carried.view(*carried.shape[:-1], K, N)[..., rest, :].flatten(-2)
            for carried in (self.state, self.statistics)
        )
        losses, grads = [], []
        for t, batch in enumerate(batches):
            chosen = tree_map(lambda leaf: leaf[rest], batch)
            gathered = gather(optimizees.task, optimizees.images, chosen, optimizees.dtype)
            losses.append(optimizees.task.losses(theta, gathered).to(theta.dtype))
            last = t + 1 == len(batches)
            (grad,) = torch.autograd.grad(losses[-1].sum(), theta, create_graph=not last, retain_graph=True)
            grads.append(grad.detach())
            if not last:
                with _full_precision(theta):
                    statistics = statistics.clone()  # what the graph has saved of them stays what it is
                    update, state = self.rule.step(self.rule.read(grad.reshape(-1), statistics), state)
                theta = theta + update.view(theta.shape)
        stacked = torch.stack(losses)
        finite = _finite(stacked.detach(), torch.stack(grads))
        carried = (x.detach().view(*x.shape[:-1], *theta.shape) for x in (state, statistics))
        return stacked, theta.detach(), *carried, finite

    def state_dict(self) -> dict[str, Any]:
        """What resuming in mid-rollout needs, as tensors and plain values."""
        return {
            "optimizees": self.optimizees.state_dict(),
            "state": self.state.clone(),
            "statistics": self.statistics.clone(),
            "masked": self.masked.clone(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a rollout of the same rule and optimizees was saved.

        Raises:
            ValueError: It is of other optimizees, or of a rule that reads no features.
        """
        self.optimizees.load_state_dict(state["optimizees"])
        self.state.copy_(state["state"])  # which windows may update in place: the saved one stays what it is
        if "statistics" in state:
            self.statistics.copy_(state["statistics"])
        elif self.statistics.numel():  # an older version's rules had none
            raise ValueError("it lacks the statistics of the rule's features")
        self.masked = state["masked"].cpu()
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
    statistics = rule.init_statistics(theta.numel(), optimizees.dtype)
    losses = theta.new_empty(horizon, len(optimizees))
    for stretch in torch.split(losses, STRETCH):
        count = len(stretch)
        leaves, structure = tree_flatten(optimizees.draw(count))

        def run(
            theta: Tensor,
            state: Tensor,
            statistics: Tensor,
            losses: Tensor,
            *leaves: Tensor,
            count: int = count,
            structure: Any = structure,
        ) -> None:
            batches = unstack(tree_unflatten(leaves, structure), count)
            _inner_loop(rule, task, images, theta, batches, losses, statistics, [state] * (count + 1))

        key = ("run", *_key(rule, task, images))
        graphs.run(run, key, [theta, state, statistics, stretch], leaves, task, cuda_graphs)
    return losses


@torch.no_grad()
def _inner_loop(
    rule: UpdateRule,
    task: Task,
    images: Images | None,
    theta: Tensor,
    batches: Sequence[Batch],
    losses: Tensor,
    statistics: Tensor,
    states: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    inputs: Sequence[Tensor] | None = None,
    kept: Mapping[int, Tensor] | None = None,
) -> None:
    """Evaluates θ [K, N] on minibatch after minibatch, with a step of the rule in between, in place.

    A window has as many states as minibatches: it ends with an evaluation. One state more, and it ends with a
    step. Writes f_t(θ_t) into losses [len(batches), K], s_{t+1} into states[t + 1] and, if they are kept, g_t
    into grads[t], [K·N], features x_t into inputs[t], [width, K·N], and s_t into kept[t]; brings the
    statistics [rows, K·N] up to date. Nothing here may depend on a tensor's value or make the host wait for
    the device.
    """
    with _full_precision(theta):
        step = rule.stepper()
    flat = theta.view(-1)
    found = []
    for t, batch in enumerate(batches):
        loss, grad = evaluate(task, images, theta, batch)
        found.append(loss.to(theta.dtype))
        grad = grad.reshape(-1).to(theta.dtype)
        if grads is not None:
            grad = grads[t].copy_(grad)
        if kept is not None and t in kept:
            kept[t].copy_(states[t])
        if t + 1 < len(states):
            with _full_precision(theta):
                x = rule.read(grad, statistics)
                if inputs is not None and x is not grad:
                    inputs[t].copy_(x)
                step(flat, x, states[t], states[t + 1])
    torch.stack(found, out=losses)


def _full_precision(theta: Tensor) -> AbstractContextManager[Any]:
    """What the rule and the meta-loss are computed in: autocast is for the optimizees' own networks."""
    device = theta.device.type
    # Entering autocast takes a good part of a small optimizee's step, even to switch off what is not on.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _finite(losses: Tensor, grads: Tensor) -> Tensor:
    """Which optimizees' losses [T+1, K] and gradients [T+1, K, N] are all finite, [K]."""
    # NaN wins both, and neither needs memory: isfinite of the gradients would take as much as they do.
    extremes = torch.stack([losses, grads.amax(-1), grads.amin(-1)])
    return extremes.isfinite().all(0).all(0)


def _where(chosen: Tensor, device: torch.device) -> Tensor:
    """The indices of those chosen, on a device."""
    return chosen.nonzero().flatten().to(device)


def _undefined(value: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A meta-loss and its derivatives where no optimizee is left: NaN."""
    return torch.full_like(value, torch.nan), [torch.full_like(p, torch.nan) for p in parameters]


def _with_derivatives(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The value, with these as its derivatives in the parameters."""
    return cast(Tensor, _KnownGradient.apply(value, len(parameters), *parameters, *gradients))


def _key(rule: UpdateRule, task: Task, images: Images | None) -> tuple[Hashable, ...]:
    """What a recorded inner loop depends on besides its arguments and buffers: objects, and where φ lies."""
    phi = tuple((x.data_ptr(), x.dtype) for x in itertools.chain(rule.parameters(), rule.buffers()))
    return id(rule), id(task), id(images), phi
