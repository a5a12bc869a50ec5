"""A window of T steps keeps some of the rule's states, from which its meta-gradient is computed.

`FullHistory` keeps s_0 … s_T as the steps write them: nothing is computed twice. `KeptStates` lets the steps
run in place and keeps every k-th state (or all of them, rounded). As a rule is coordinatewise and the
gradients g_t are there, its backward can go from one chunk of coordinates to the next: it computes a chunk's
states again from a kept one on, goes back through them, and hands the cotangent of the kept state to the
segment before. What is held at once, besides the kept states and the gradients, is one segment of one chunk,
however many coordinates and steps there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from l2l_lightning.checks import check_choice, check_whole_numbers
from l2l_lightning.rollout.buffers import Workspace
from l2l_lightning.rollout.optimizees import to_device
from l2l_lightning.rules.base import Step, UpdateRule

HistoryDtype = Literal["float32", "bfloat16"]
"""Kept states are stored as they are computed ("float32"; float64 if φ is), or rounded ("bfloat16")."""

Through = Callable[[Tensor], Tensor]

CHUNK_BYTES = 256 * 2**20
"""A chunk's states take at most this: tens of thousands of coordinates, which keep a launch busy, in
little memory beside what 10⁶ coordinates keep anyway."""
CHUNK_MULTIPLE = 1024
"""A chunk is a multiple of this: whole slices of the CPU kernels' threads, whole GPU blocks, aligned rows."""


def check_history(checkpoint_every: int | None, history_dtype: HistoryDtype, second_order: bool) -> None:
    """Raises for options of a window's history that are out of range or don't go together.

    Raises:
        TypeError: checkpoint_every is no whole number.
        ValueError: A value is out of its range, or needs another one.
    """
    if checkpoint_every is not None:
        check_whole_numbers(1, 10**7, checkpoint_every=checkpoint_every)
    check_choice(get_args(HistoryDtype), history_dtype=history_dtype)
    if second_order and (checkpoint_every is not None or history_dtype != "float32"):
        raise ValueError(
            "second_order keeps the unrolled graph and no history: checkpoint_every and history_dtype "
            "must not be set with it"
        )


class History(ABC):
    """Says where a window's steps read and write the state, and computes the meta-gradient afterwards."""

    carried: list[Tensor]
    """The steps update these tensors, which outlive the window."""
    kept: dict[int, Tensor]
    """s_t is copied into kept[t], where there is one."""
    stored: Tensor
    """This tensor holds all the states that are kept, [..., n]."""
    key: tuple[Hashable, ...]
    """A CUDA graph of the steps depends on this."""

    @abstractmethod
    def states(self, carried: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns where s_0 … s_T are read and written, given the tensors that stand for `carried`."""

    @abstractmethod
    def finish(self) -> None:
        """Brings the rollout's state up to s_T, after the steps."""

    @abstractmethod
    def gradient(
        self, grads: Tensor, inputs: Tensor, scale: Sequence[float], through: Through | None = None
    ) -> list[Tensor]:
        """Returns d/dφ of Σ_t scale_t f_t(θ_t), one tensor per parameter.

        Args:
            grads: g_0 … g_T, [T+1, n].
            inputs: What the rule read, x_0 … x_{T-1}, [T, n] or [T, width, n].
            scale: Of each loss, T+1 of them.
            through: Maps the derivatives in the updates to those in what `step` gave, [T, n] both, of a rule
                that finishes it.
        """


class FullHistory(History):
    """Keeps s_0 … s_T, each where its step has written it.

    Args:
        rule: m_φ.
        state: The rollout's state, [*state_shape, n].
        T: Steps of the window.
        workspace: Where the buffers come from.
    """

    def __init__(self, rule: UpdateRule, state: Tensor, T: int, workspace: Workspace) -> None:
        self.rule = rule
        self.state = state
        self.workspace = workspace
        self.carried, self.kept = [], {}
        self.stored = workspace.empty("history", (T + 1, *state.shape), state)
        self.stored[0] = state
        self.key = ("full", self.stored.data_ptr())

    def states(self, carried: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the rows of the history."""
        return self.stored.unbind()

    def finish(self) -> None:
        """Copies s_T."""
        self.state.copy_(self.stored[-1])

    def gradient(
        self, grads: Tensor, inputs: Tensor, scale: Sequence[float], through: Through | None = None
    ) -> list[Tensor]:
        """Runs one backward through the whole window."""
        d_updates = self.workspace.empty("d_updates", grads[1:].shape, grads)
        suffix_sums(grads, scale, d_updates)
        if through is not None:
            d_updates = through(d_updates)
        return self.rule.window_gradient(inputs, self.stored, d_updates)


class KeptStates(History):
    """Keeps every k-th state of a window, from s_0 on; without a k, all of them.

    Args:
        rule: m_φ.
        state: The rollout's state, [*state_shape, n]; the steps update it in place.
        T: Steps of the window.
        workspace: Where the buffers come from.
        every: k.
        dtype: What the states are rounded to when they are kept.
    """

    def __init__(
        self,
        rule: UpdateRule,
        state: Tensor,
        T: int,
        workspace: Workspace,
        every: int | None,
        dtype: torch.dtype,
    ) -> None:
        self.rule = rule
        self.state = state
        self.workspace = workspace
        self.carried = [state]
        self.T = T
        self.every = every
        times = range(T + 1) if every is None else range(0, T, every)
        self.stored = workspace.empty("kept", (len(times), *state.shape), state.new_empty(0, dtype=dtype))
        self.kept = dict(zip(times, self.stored.unbind(), strict=True))
        self.key = ("kept", every, dtype, self.stored.data_ptr())

    def states(self, carried: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns one and the same tensor for every step."""
        return list(carried) * (self.T + 1)

    def finish(self) -> None:
        """Does nothing, as the state is s_T already."""

    @torch.no_grad()
    def gradient(
        self, grads: Tensor, inputs: Tensor, scale: Sequence[float], through: Through | None = None
    ) -> list[Tensor]:
        """Goes from chunk to chunk, and in each from the last segment to the first."""
        if through is not None:
            raise ValueError("chunks of coordinates are no whole tensors, which the rule's finish sees")
        totals = [torch.zeros_like(parameter) for parameter in self.rule.parameters()]
        step = self.rule.stepper()
        segment = self.every or self.T
        for part in self._chunks(min(segment, self.T)):
            n = part.stop - part.start
            d_updates = self.workspace.empty("d_updates", (self.T, n), grads)
            suffix_sums(grads[:, part], scale, d_updates)
            d_state = None
            for first in reversed(range(0, self.T, segment)):
                steps = slice(first, min(first + segment, self.T))
                states = self._states(step, inputs, steps, part)
                d_phi, d_state = self.rule.segment_gradient(
                    inputs[steps, ..., part], states, d_updates[steps], d_state
                )
                for total, gradient in zip(totals, d_phi, strict=True):
                    total.add_(gradient)
        return totals

    def _chunks(self, segment: int) -> Iterator[slice]:
        """Yields slices of the coordinates, of which the states of so many steps fit in CHUNK_BYTES."""
        n = self.state.shape[-1]
        per_coordinate = (segment + 1) * self.state[..., 0].numel() * self.state.element_size()
        size = max(CHUNK_BYTES // per_coordinate // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def _states(self, step: Step, inputs: Tensor, steps: slice, part: slice) -> Tensor:
        """Returns a chunk's states before and after these steps, those that were not kept computed anew."""
        n = part.stop - part.start
        shape = (steps.stop - steps.start + 1, *self.state.shape[:-1], n)
        states = self.workspace.empty("segment", shape, self.state)
        theta = self.workspace.empty("discarded theta", (n,), inputs).zero_()
        for t in range(steps.start, steps.stop + 1):
            new = states[t - steps.start]
            if t in self.kept:
                new.copy_(self.kept[t][..., part])
            else:
                step(theta, inputs[t - 1, ..., part], states[t - 1 - steps.start], new)
        return states


SCANNED = 2**24
"""So many numbers, 64 MiB of float32, are summed on a GPU in a few launches, at three times their memory."""


def suffix_sums(grads: Tensor, scale: Sequence[float], out: Tensor) -> None:
    """Writes out[t] = Σ_{r>t} scale_r g_r, [T, n], accumulated from the end; grads is [T+1, n]."""
    if out.is_cuda and out.numel() <= SCANNED:
        scanned_suffix_sums(grads, scale, out)
        return
    g, d = grads.unbind(), out.unbind()
    T = len(d)
    torch.mul(g[T], scale[T], out=d[T - 1])
    for t in reversed(range(1, T)):
        torch.add(d[t], g[t], alpha=scale[t], out=d[t - 1])


def scanned_suffix_sums(grads: Tensor, scale: Sequence[float], out: Tensor) -> None:
    """Does what `suffix_sums` does by a scan: four launches for any T, where a loop has T of them."""
    factors = to_device(grads.new_tensor(scale[1:], device="cpu"), grads.device)
    out.copy_((grads[1:] * factors[:, None]).flip(0).cumsum(0).flip(0))
