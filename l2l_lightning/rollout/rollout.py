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

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from l2l_lightning.data.examples import Examples
from l2l_lightning.errors import CaptureError
from l2l_lightning.rollout.buffers import Workspace
from l2l_lightning.rollout.carried import CarriedRollout
from l2l_lightning.rollout.history import FullHistory, History, HistoryDtype, KeptStates, check_history
from l2l_lightning.rollout.optimizees import Optimizees, evaluate, gather, to_device, unstack
from l2l_lightning.rollout.parts import Part, in_order, parts_of
from l2l_lightning.rules.base import Rule, Step
from l2l_lightning.rules.layout import Layout, Time
from l2l_lightning.tasks.base import Batch, Task

STRETCH = 20
"""`run_rule` draws the minibatches of this many steps at once, and records them as one CUDA graph."""

LEAST_LOSS = 1e-8
"""Losses below have this one's logarithm."""


class _KnownGradient(torch.autograd.Function):
    """Takes a value, n, n parameters and their n known gradients, and returns the value with these."""

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


class Rollout(CarriedRollout):
    """K optimizees under one rule, advanced window by window.

    θ, the rule's state, its features' statistics and the generators are carried from one to the next.

    An optimizee that a window finds with a loss or a gradient that is NaN or infinite is masked, in that
    window and for the rest of the rollout: it adds nothing to the meta-loss and its gradient, and the others
    go on as if it were not there.

    Args:
        rule: m_φ, or a `Grouped` of several.
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
        total_steps: T, the rollout's horizon, for features that read it; None if it is not known.
        held_out_images: Those that windows' last losses are of where they are held out, on the optimizees'
            device, if the task needs any.

    Raises:
        ValueError: checkpoint_every or total_steps < 1, there is no such history_dtype, or the rule has no
            member for one of the task's tensors.

    Example:
        >>> from l2l_lightning.rules import CoordinatewiseLSTM
        >>> from l2l_lightning.tasks import Quadratic
        >>> rule = CoordinatewiseLSTM(preprocessing="identity")
        >>> rollout = Rollout(rule, Optimizees(Quadratic(), None, seed=0, stream="train", indices=range(4)))
        >>> rollout.window(20).meta_loss.backward()
    """

    def __init__(
        self,
        rule: Rule,
        optimizees: Optimizees,
        workspace: Workspace | None = None,
        cuda_graphs: bool | None = None,
        checkpoint_every: int | None = None,
        history_dtype: HistoryDtype = "float32",
        total_steps: int | None = None,
        held_out_images: Examples | None = None,
    ) -> None:
        check_history(checkpoint_every, history_dtype, second_order=False)
        super().__init__(rule, optimizees, total_steps)
        self.workspace = workspace or Workspace()
        self.cuda_graphs = cuda_graphs
        self.checkpoint_every = checkpoint_every
        self.history_dtype: HistoryDtype = history_dtype
        self.held_out_images = held_out_images

    def window(
        self,
        unroll: int,
        weights: Tensor | None = None,
        second_order: bool = False,
        of_logarithms: bool = False,
        held_out: bool = False,
    ) -> Window:
        """Advances every optimizee by `unroll` steps and returns the window's meta-loss.

        The loss is counted at T+1 points, as DeepMind's code does: the last is re-evaluated, on a fresh
        minibatch, as the next window's first. The meta-gradient is truncated at the window's start.

        Args:
            unroll: T ≥ 1.
            weights: w_t, [T+1]; None is all ones.
            second_order: Differentiate the optimizee's gradients too, through the unrolled graph: exact
                second-order meta-gradients at the memory and time of unrolling.
            of_logarithms: Sum w_t log f_t(θ_t), losses below 1e-8 taken as that: problems whose losses are of
                different sizes count alike.
            held_out: Evaluate the last loss, after T steps, on held-out examples.

        Raises:
            ValueError: unroll < 1, weights that are not [T+1], second_order with cuda_graphs=True,
                checkpoint_every, a history_dtype or held_out, or a rule whose windows have no exact
                meta-gradient without it.
            CaptureError: cuda_graphs=True, and there is no CUDA device or the task cannot be recorded.
        """
        if unroll < 1:
            raise ValueError(f"unroll must be at least 1, got {unroll}")
        if not second_order:
            self._check_window_gradient()
        if second_order and self.cuda_graphs:
            raise ValueError("second_order keeps the unrolled graph: cuda_graphs must not be true with it")
        check_history(self.checkpoint_every, self.history_dtype, second_order)
        if weights is None:
            weights = torch.ones(unroll + 1)
        if weights.shape != (unroll + 1,):
            raise ValueError(f"weights must be [unroll + 1] = [{unroll + 1}], got {list(weights.shape)}")
        weights = weights.to(self.optimizees.dtype)
        if second_order:
            if held_out:
                raise ValueError("second_order goes with the losses of minibatches: held_out must be False")
            window = self._unrolled_window(unroll, weights, of_logarithms)
        else:
            window = self._window(unroll, weights, of_logarithms, held_out)
        self.steps_done += unroll
        return window

    def _check_window_gradient(self) -> None:
        """Raises ValueError where the exact meta-gradient of windows cannot be had."""
        for part in self.parts:
            if not part.rule.has_window_gradient:
                raise ValueError(
                    f"windows of {type(part.rule).__name__} have no exact meta-gradient: train it with "
                    "estimator='evolution', or second_order=True"
                )
            if not part.rule.coordinatewise and not self._keeps_all:
                raise ValueError(
                    f"{type(part.rule).__name__} sees whole tensors, and a history that is computed again in "
                    "chunks does not: checkpoint_every must be None, and history_dtype 'float32'"
                )

    @property
    def _keeps_all(self) -> bool:
        return self.checkpoint_every is None and self.history_dtype == "float32"

    def _window(self, T: int, weights: Tensor, of_logarithms: bool, held_out: bool) -> Window:
        optimizees, parts = self.optimizees, self.parts
        task, images, total = optimizees.task, optimizees.images, self.total_steps
        theta = optimizees.theta
        records = [self._record(index, T) for index in range(len(parts))]
        losses = theta.new_empty(T + 1, len(theta))
        time = _time(theta, self.steps_done)
        leaves, structure = tree_flatten(optimizees.draw(T + 1))

        def run(theta: Tensor, losses: Tensor, time: Tensor, *others: Tensor) -> None:
            rest = iter(others)
            tracks = [
                _Track(
                    part,
                    next(rest),
                    record.history.states([next(rest) for _ in record.history.carried]),
                    record.grads.unbind(),
                    record.inputs.unbind(),
                    record.given.unbind(),
                    record.history.kept,
                )
                for part, record in zip(parts, records, strict=True)
            ]
            batches = unstack(tree_unflatten(list(rest), structure), T + 1)
            _inner_loop(tracks, task, images, theta, batches, losses, time, total)

        key = ("window", *_key(self.rule, task, images), total, *(record.key for record in records))
        carried = [theta, losses, time]
        for part, record in zip(parts, records, strict=True):
            carried += [part.statistics, *record.history.carried]
        graphs = allowed_graphs(self.cuda_graphs, optimizees)
        self.workspace.graphs.run(run, key, carried, leaves, task, graphs)
        if held_out:
            losses[T], grad = optimizees.held_out_losses_and_grads(self.held_out_images)
            for part, record in zip(parts, records, strict=True):
                record.grads[T] = part.take(grad)
        with full_precision(theta):
            return self._finished_window(records, losses, weights, of_logarithms)

    def _record(self, index: int, T: int) -> _Record:
        """Takes the buffers of one part's window from the workspace."""
        part, workspace = self.parts[index], self.workspace.of_part(index)
        n = part.state.shape[-1]
        grads = workspace.empty("grads", (T + 1, n), self.optimizees.theta)
        inputs = grads[:-1]
        if part.rule.features is not None:
            inputs = workspace.empty("inputs", (T, part.rule.features.width, n), grads)
        given = grads[:0] if part.rule.coordinatewise else workspace.empty("given", (T, n), grads)
        return _Record(grads, inputs, given, self._history(part, T, workspace))

    def _history(self, part: Part, T: int, workspace: Workspace) -> History:
        if self._keeps_all:
            return FullHistory(part.rule, part.state, T, workspace)
        dtype = torch.bfloat16 if self.history_dtype == "bfloat16" else part.state.dtype
        return KeptStates(part.rule, part.state, T, workspace, self.checkpoint_every, dtype)

    def _finished_window(
        self, records: Sequence[_Record], losses: Tensor, weights: Tensor, of_logarithms: bool
    ) -> Window:
        """Computes the meta-loss and its derivatives from a window's gradients, inputs and losses.

        Args:
            records: What every part's window has left.
            losses: f_0 … f_T, [T+1, K].
            weights: w_t, [T+1].
            of_logarithms: Whether the meta-loss sums log f_t.
        """
        theta, rule, parts = self.optimizees.theta, self.rule, self.parts
        K, of_parts = len(theta), list(zip(parts, records, strict=True))
        for record in records:
            record.history.finish()
        scale = (weights / K).tolist()
        parameters = list(rule.parameters())
        differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)

        def gradient() -> list[Tensor]:
            return in_order(rule, parts, [record.gradient(part, scale, inverse) for part, record in of_parts])

        before = self.masked
        summed = _log(losses) if of_logarithms else losses
        inverse = torch.where(losses > LEAST_LOSS, 1 / losses, 0.0) if of_logarithms else None
        totals = to_device(weights, theta.device) @ summed
        value = totals.mean()
        gradients = gradient() if differentiable and not before.any() else []
        # Only now does the host wait for the device, which has all of the window to do.
        grads = [part.by_optimizee(record.grads) for part, record in of_parts]
        self.masked = before | ~_finite(losses, grads).cpu()
        if self.masked.any():
            value = totals[_where(~self.masked, theta.device)].sum() / K
            losses[:, _where(before, theta.device)] = torch.nan
            if differentiable and not self.masked.all():
                # Zero times NaN is NaN: all that the backward reads of a masked optimizee becomes zero.
                masked = _where(self.masked, theta.device)
                for part, record in of_parts:
                    for tensor in (record.grads, record.inputs, record.given, record.history.stored):
                        part.by_optimizee(tensor).index_fill_(-2, masked, 0)
                gradients = gradient()
        if self.masked.all():
            value, gradients = _undefined(value, parameters)
        if differentiable:
            value = with_derivatives(value, parameters, gradients)
        return Window(value, losses, self.masked)

    def _unrolled_window(self, T: int, weights: Tensor, of_logarithms: bool) -> Window:
        optimizees = self.optimizees
        theta, masked = optimizees.theta.clone(), self.masked.clone()
        carried = [(part.state.clone(), part.statistics.clone()) for part in self.parts]
        batches = unstack(optimizees.draw(T + 1), T + 1)
        losses = theta.new_full((T + 1, len(theta)), torch.nan)
        finite = masked.new_zeros(())
        while not finite.all() and not masked.all():
            # One NaN in the graph makes the derivatives of all NaN: it is unrolled anew for the others.
            rest = _where(~masked, theta.device)
            unrolled, new_theta, new_carried, finite = self._unroll(rest, batches)
            theta[rest], losses[:, rest] = new_theta, unrolled.detach()
            for part, ours, theirs in zip(self.parts, carried, new_carried, strict=True):
                for whole, new in zip(ours, theirs, strict=True):
                    part.by_optimizee(whole)[..., rest, :] = new
            masked[rest[~finite].cpu()] = True
        if masked.all():
            parameters = list(self.rule.parameters())
            value, gradients = _undefined(losses.new_empty(()), parameters)
            value = with_derivatives(value, parameters, gradients)
        else:
            with full_precision(theta):
                summed = _log(unrolled) if of_logarithms else unrolled
                value = (to_device(weights, theta.device) @ summed).mean() * (len(rest) / len(theta))
                # Members that move nothing have a derivative too: DDP waits for every parameter's.
                value = value + 0 * torch.stack([p.sum() for p in self.rule.parameters()]).sum()
        optimizees.theta, self.masked = theta, masked
        for part, (state, statistics) in zip(self.parts, carried, strict=True):
            part.state, part.statistics = state, statistics
        return Window(value, losses, masked)

    def _unroll(
        self, rest: Tensor, batches: Sequence[Batch]
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]], Tensor]:
        """Runs the window of some of the K optimizees with its graph.

        Args:
            rest: Indices of the k that are run.
            batches: Minibatches [K, …] of T+1 evaluations.

        Returns:
            f_t(θ_t) [T+1, k] with the graph. Without: θ [k, N], every part's state [*state_shape, k, n] and
            statistics [rows, k, n] after T steps, and which had nothing but finite losses and gradients [k].
        """
        optimizees, parts = self.optimizees, self.parts
        theta = optimizees.theta[rest].requires_grad_()
        states = [part.by_optimizee(part.state)[..., rest, :].flatten(-2) for part in parts]
        statistics = [part.by_optimizee(part.statistics)[..., rest, :].flatten(-2) for part in parts]
        layouts = [dataclasses.replace(part.layout, copies=len(rest)) for part in parts]
        losses, grads = [], []
        for t, batch in enumerate(batches):
            chosen = tree_map(lambda leaf: leaf[rest.to(leaf.device)], batch)
            gathered = gather(optimizees.task, optimizees.images, theta, chosen)
            losses.append(optimizees.task.losses(theta, gathered).to(theta.dtype))
            last = t + 1 == len(batches)
            (grad,) = torch.autograd.grad(losses[-1].sum(), theta, create_graph=not last, retain_graph=True)
            grads.append(grad.detach())
            if last:
                break
            time = Time(_time(theta, self.steps_done + t), self.total_steps)
            with full_precision(theta):
                for index, (part, layout) in enumerate(zip(parts, layouts, strict=True)):
                    statistics[index] = statistics[index].clone()  # the graph keeps what they were
                    x = part.rule.read(part.take(grad), statistics[index], time, layout)
                    update, states[index] = part.rule.step(x, states[index])
                    if not part.rule.coordinatewise:
                        update = part.rule.finish(update, x, part.take(theta), layout)
                    theta = part.added(theta, update)
        stacked = torch.stack(losses)
        finite = _finite(stacked.detach(), [torch.stack(grads)])

        def by_optimizee(whole: Tensor, layout: Layout) -> Tensor:
            return whole.detach().view(*whole.shape[:-1], layout.copies, layout.num_coordinates)

        carried = [
            (by_optimizee(state, layout), by_optimizee(own, layout))
            for state, own, layout in zip(states, statistics, layouts, strict=True)
        ]
        return stacked, theta.detach(), carried, finite


@torch.no_grad()
def run_rule(
    rule: Rule,
    optimizees: Optimizees,
    horizon: int,
    workspace: Workspace | None = None,
    cuda_graphs: bool | None = False,
) -> Tensor:
    """Optimises with a trained rule and no meta-gradient: f_t(θ_t) for t = 0 … horizon-1, [horizon, K].

    The state is updated in place, so that memory does not grow with the horizon.

    Args:
        rule: m_φ, or a `Grouped` of several.
        optimizees: What it optimises; their θ is advanced in place.
        horizon: Number of steps, T for features that read it.
        workspace: Where CUDA graphs are kept from one run to the next.
        cuda_graphs: As for Rollout, a stretch of 20 steps at a time. Recording takes longer than two
            stretches do: it pays if a workspace is at hand.

    Raises:
        ValueError: horizon < 1, or the rule has no member for one of the task's tensors.
        CaptureError: cuda_graphs=True, and there is no CUDA device or the task cannot be recorded.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    graphs = (workspace or Workspace()).graphs
    task, images, theta = optimizees.task, optimizees.images, optimizees.theta
    parts = parts_of(rule, optimizees)
    time = _time(theta, 0)
    losses = theta.new_empty(horizon, len(optimizees))
    for stretch in torch.split(losses, STRETCH):
        count = len(stretch)
        leaves, structure = tree_flatten(optimizees.draw(count))

        def run(
            theta: Tensor,
            losses: Tensor,
            time: Tensor,
            *others: Tensor,
            count: int = count,
            structure: Any = structure,
        ) -> None:
            rest = iter(others)
            tracks = [_Track(part, next(rest), [next(rest)] * (count + 1)) for part in parts]
            batches = unstack(tree_unflatten(list(rest), structure), count)
            _inner_loop(tracks, task, images, theta, batches, losses, time, horizon)

        key = ("run", *_key(rule, task, images), horizon)
        carried = [theta, stretch, time]
        for part in parts:
            carried += [part.statistics, part.state]
        graphs.run(run, key, carried, leaves, task, allowed_graphs(cuda_graphs, optimizees))
    return losses


@dataclass(frozen=True)
class _Record:
    """A window keeps these tensors of one part."""

    grads: Tensor
    """g_0 … g_T, [T+1, K·n]."""
    inputs: Tensor
    """x_0 … x_{T-1}, [T, K·n] or [T, width, K·n]."""
    given: Tensor
    """What `step` gave, [T, K·n], of a rule that finishes it; else [0, K·n]."""
    history: History

    @property
    def key(self) -> tuple[Hashable, ...]:
        """A recorded CUDA graph depends on this."""
        return (*self.history.key, *(x.data_ptr() for x in (self.grads, self.inputs, self.given)))

    def gradient(self, part: Part, scale: Sequence[float], of_each: Tensor | None) -> list[Tensor]:
        """Returns d/dφ of Σ_t scale_t f_t(θ_t), one tensor per parameter of the part's rule.

        With of_each [T+1, K], a number for each loss, f_t counts so many times more.
        """
        through, grads = None, self.grads
        if len(self.given):
            through = functools.partial(
                part.rule.finish_gradient, given=self.given, inputs=self.inputs, layout=part.layout
            )
        if of_each is not None:  # not in place: of a rule without features they are its inputs
            grads = (part.by_optimizee(grads) * of_each[..., None]).view_as(grads)
        return self.history.gradient(grads, self.inputs, scale, through)


@dataclass(frozen=True)
class _Track:
    """Where the inner loop reads and writes what one part carries."""

    part: Part
    statistics: Tensor
    """[rows, K·n]."""
    states: Sequence[Tensor]
    """s_t is read from states[t], s_{t+1} goes into states[t + 1]; [*state_shape, K·n] each."""
    grads: Sequence[Tensor] = ()
    """g_t goes into grads[t], [K·n]."""
    inputs: Sequence[Tensor] = ()
    """Features x_t go into inputs[t], [width, K·n]."""
    given: Sequence[Tensor] = ()
    """What `step` gives goes into given[t], [K·n], of a rule that finishes it."""
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """s_t is copied into kept[t]."""

    def advance(self, t: int, theta: Tensor, grad: Tensor, step: Step, time: Time) -> None:
        """Moves the part's coordinates of θ [K, N] by its rule, in place, unless t has no step.

        Args:
            t: Counts from the first step of the window.
            theta: θ, [K, N].
            grad: g_t, [K, N].
            step: The rule's stepper.
            time: How far the rollout has come.
        """
        grad = self.part.take(grad)
        if self.grads:
            grad = self.grads[t].copy_(grad)
        if t in self.kept:
            self.kept[t].copy_(self.states[t])
        if t + 1 == len(self.states):
            return
        with full_precision(theta):
            x = self.part.rule.read(grad, self.statistics, time, self.part.layout)
            if self.inputs and x is not grad:
                self.inputs[t].copy_(x)
            rule, columns = self.part.rule, self.part.columns
            if columns is None and rule.coordinatewise:
                step(theta.view(-1), x, self.states[t], self.states[t + 1])
                return
            update = self.given[t].zero_() if self.given else torch.zeros_like(grad)
            step(update, x, self.states[t], self.states[t + 1])
            if not rule.coordinatewise:
                update = rule.finish(update, x, self.part.take(theta), self.part.layout)
            self.part.add_(theta, update)


@torch.no_grad()
def _inner_loop(
    tracks: Sequence[_Track],
    task: Task,
    images: Examples | None,
    theta: Tensor,
    batches: Sequence[Batch],
    losses: Tensor,
    time: Tensor,
    total_steps: int | None,
) -> None:
    """Evaluates θ [K, N] on minibatch after minibatch, with a step of the rule in between, in place.

    A window has as many states as minibatches: it ends with an evaluation. One state more, and it ends with a
    step. Writes f_t(θ_t) into losses [len(batches), K] and what the tracks say; counts time, a scalar, on.
    Nothing here may depend on a tensor's value or make the host wait for the device.
    """
    with full_precision(theta):
        steppers = [track.part.rule.stepper() for track in tracks]
    reads_time = any(track.part.rule.features is not None for track in tracks)
    found = []
    for t, batch in enumerate(batches):
        loss, grad = evaluate(task, images, theta, batch)
        found.append(loss.to(theta.dtype))
        grad = grad.to(theta.dtype)
        for track, step in zip(tracks, steppers, strict=True):
            track.advance(t, theta, grad, step, Time(time, total_steps))
        if reads_time:
            time.add_(1)
    torch.stack(found, out=losses)


def _time(theta: Tensor, step: int) -> Tensor:
    """The number of steps as a scalar, in float32 at least: bfloat16 counts no further than 256."""
    # Filled on the device, which the host would wait for to copy a number there.
    return theta.new_full((), step, dtype=torch.promote_types(theta.dtype, torch.float32))


def full_precision(theta: Tensor) -> AbstractContextManager[Any]:
    """Within this context the rule and the meta-loss are computed: autocast is for the optimizees alone."""
    device = theta.device.type
    # Entering autocast takes a good part of a small optimizee's step, even to switch off what is not on.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _log(losses: Tensor) -> Tensor:
    """Returns the logarithms of losses, of LEAST_LOSS where they are less."""
    return losses.clamp(min=LEAST_LOSS).log()


def _finite(losses: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """Returns which optimizees' losses [T+1, K] and gradients, [T+1, K, n] a part, are all finite, [K]."""
    # NaN wins both, and neither needs memory: isfinite of the gradients would take as much as they do.
    extremes = torch.stack([losses, *(found for g in grads for found in (g.amax(-1), g.amin(-1)))])
    return extremes.isfinite().all(0).all(0)


def _where(chosen: Tensor, device: torch.device) -> Tensor:
    """Returns the indices of the True ones, on a device."""
    return chosen.nonzero().flatten().to(device)


def _undefined(value: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns NaN as the meta-loss and its derivatives, for where no optimizee is left."""
    return torch.full_like(value, torch.nan), [torch.full_like(p, torch.nan) for p in parameters]


def with_derivatives(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Returns the value with these gradients as its derivatives in the parameters."""
    return cast(Tensor, _KnownGradient.apply(value, len(parameters), *parameters, *gradients))


def allowed_graphs(cuda_graphs: bool | None, optimizees: Optimizees) -> bool | None:
    """Returns cuda_graphs, or False where examples come from the CPU: a graph would repeat the same ones.

    Raises:
        CaptureError: They do, and cuda_graphs is True.
    """
    if optimizees.gathers_on_device:
        return cuda_graphs
    if cuda_graphs:
        raise CaptureError(
            "cuda_graphs (--model.cuda_graphs) must not be true with examples that are not on the device: "
            "set a larger memory_limit (--data.memory_limit)"
        )
    return False


def _key(rule: Rule, task: Task, images: Examples | None) -> tuple[Hashable, ...]:
    """Returns what a recorded inner loop depends on besides its arguments and buffers."""
    phi = tuple((x.data_ptr(), x.dtype) for x in itertools.chain(rule.parameters(), rule.buffers()))
    return id(rule), id(task), id(images), phi
