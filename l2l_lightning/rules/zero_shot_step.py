"""`ZeroShot`'s step in one pass over memory; `ZeroShot` itself and `NominalFeatures` are the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from l2l_kernels import Coefficients, SizeHead, nominal_sizes, nominal_step, nominal_sums
from torch import Tensor

from l2l_lightning.rules.layout import Layout
from l2l_lightning.rules.nominal import (
    FACTS,
    FAST,
    MOST_DECAY,
    UNKNOWN_FROM,
    decays_of_means,
    log_gain,
    shape_facts,
)
from l2l_lightning.rules.orthogonal import is_orthogonalised, newton_schulz, with_size_of

if TYPE_CHECKING:
    from l2l_lightning.rules.zero_shot import ZeroShot

MOVING = ("log T", "log SNR", "log slow SNR", "progress · log SNR")
"""Those FACTS that change from step to step."""


class ZeroShotStep:
    """Moves tensors where they are: the statistics, θ and the next step's sums in one pass.

    A tensor's step size depends on the sums of m², m₂² and v over it as they were before this gradient, which
    the step before has left. They are formed anew, by the same routine and so bit for bit, where there is no
    step before: at the start, of a run that is resumed, and if others have written into the statistics.

    For tensors that are orthogonalised the pass writes directions, 4 bytes a coordinate for the time of the
    step; Newton and Schulz's iteration follows, of all matrices of a shape at once, on CUDA in bfloat16.

    Args:
        rule: φ.
        layout: The tensors.
        statistics: m, m₂ and v, [3, n], or [2, n] where they are compact.
    """

    def __init__(self, rule: ZeroShot, layout: Layout, statistics: Tensor) -> None:
        self.rule = rule
        self.layout = layout
        self.statistics = statistics
        self.counts = [tensor.numel_here for tensor in layout.tensors]
        self.offsets = list(accumulate(self.counts[:-1], initial=0))
        self.decays = decays_of_means(statistics.dtype, torch.device("cpu"))[:, 0].tolist()
        self.newest = 1 - self.decays[0], 1 - self.decays[1], 1 - self.decays[2]
        w = dict(zip(FACTS, rule.log_step.tolist(), strict=True))
        self.of_horizon = w["log T"]
        self.of_snr = w["log SNR"], w["progress · log SNR"], w["log slow SNR"]
        self.mixing = rule.mixing.tolist()
        first, self.decay_of_snr, *others = rule.decay.tolist()
        self.later_decay: list[float] = others  # of the gain and of the horizon, if there are
        self.warm_up, self.power = rule.log_warm_up.exp().item(), rule.log_power.exp().item()
        decays_here, *shape = shape_facts(layout, statistics.dtype, statistics.device)
        self.decay: Tensor = math.exp(first) * decays_here
        known = dict(zip((fact for fact in FACTS if fact not in MOVING), shape, strict=True))
        self.log_size = torch.stack([w[name] * fact for name, fact in known.items()]).sum(0)
        self.fan_in = known["log fan-in"]
        self.numels = self.fan_in.new_tensor([float(max(tensor.numel, 1)) for tensor in layout.tensors])
        self.matrices: dict[tuple[int, int], list[int]] = {}  # what is orthogonalised, by rows and columns
        self.sharded: dict[Callable[[Tensor], Tensor], list[int]] = {}
        for index, tensor in enumerate(layout.tensors):
            if rule.orthogonal and is_orthogonalised(tensor):
                sides = tensor.shape[0], tensor.numel // tensor.shape[0]
                self.matrices.setdefault(sides, []).append(index)
            if tensor.sum_over_shards is not None:
                self.sharded.setdefault(tensor.sum_over_shards, []).append(index)
        self._sums: Tensor | None = None  # [tensors, 3], over what this process holds
        self._version = -1  # of the statistics that they are of

    def __call__(
        self,
        chosen: Sequence[int],
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        step: int,
        total: int | None,
        lr: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        """Moves the chosen tensors: see `TensorStep`."""
        if self._sums is None or self._version != self.statistics._version:
            self._sums = nominal_sums(self.statistics, self.offsets, self.counts)
        total = max(2 * (step + 1), UNKNOWN_FROM) if self.rule.horizon_free else total
        assert total is not None  # LearnedOptimizer has checked that
        progress = min(step / total, 1.0)
        x = 2 * progress - 1
        rows = None if len(chosen) == len(self.counts) else torch.tensor(chosen, device=self._sums.device)
        sizes = self._sizes(self._sums, self._decays(thetas, rows, total), step, total, x, lr)
        counts = [1 - decay ** (step + 1) for decay in self.decays]
        a0, a1, b0, b1 = self.mixing
        coefficients = Coefficients(
            *self.newest,
            fast=FAST / counts[0],
            gradient=1 - FAST + a0 + a1 * x,
            slow=(b0 + b1 * x) / counts[1],
            square=1 / counts[2],
            shrink=lr * weight_decay,
        )
        theta_of = dict(zip(chosen, thetas, strict=True))
        stacks = {
            shape: (present, sizes.new_empty(len(present), *shape))
            for shape, members in self.matrices.items()
            if (present := [index for index in members if index in theta_of])
        }
        directions = {
            index: part.view(theta_of[index].shape)
            for present, stack in stacks.values()
            for index, part in zip(present, stack.unbind(), strict=True)
        }
        targets = [directions.get(index, theta) for index, theta in theta_of.items()]
        moves = [index not in directions for index in chosen]
        offsets = [self.offsets[index] for index in chosen]
        sums = nominal_step(
            targets,
            grads,
            self.statistics,
            offsets,
            sizes if rows is None else sizes[rows],
            moves,
            coefficients,
            maximize,
        )
        self._sums = sums if rows is None else self._sums.index_copy(0, rows, sums)
        self._version = self.statistics._version
        for present, stack in stacks.values():
            self._move([theta_of[index] for index in present], present, stack, sizes, coefficients.shrink)

    def _decays(self, thetas: Sequence[Tensor], rows: Tensor | None, total: int) -> Tensor:
        """Returns λ of each tensor but for what follows the gradients, [tensors].

        Args:
            thetas: Those that move.
            rows: Where they are among all tensors; None is all of them, in order.
            total: The horizon.
        """
        if not self.later_decay:
            return self.decay
        of_gain, of_horizon = self.later_decay
        norms = torch.stack(torch._foreach_norm(list(thetas), dtype=self.decay.dtype))
        if rows is not None:
            norms = self.decay.new_zeros(len(self.decay)).index_copy(0, rows, norms)
        mean_square = self._summed(norms.square()) / self.numels
        later = of_gain * log_gain(mean_square, self.fan_in) + of_horizon * math.log(total / 300)
        return self.decay * later.exp()

    def _sizes(self, sums: Tensor, decay: Tensor, step: int, total: int, x: float, lr: float) -> Tensor:
        """Returns lr · η and lr · η · λ of each tensor, [tensors, 2], of the sums and `_decays`."""
        sums = self._summed(sums)
        # Of the weights in each mean; at step 0 all sums are zero.
        fast, slow, square = ((1 - decay**step) or 1.0 for decay in self.decays)
        of_snr, of_progress, of_slow = self.of_snr
        progress, of_horizon = (x + 1) / 2, self.of_horizon * math.log(total / 300)
        schedule = min(progress / self.warm_up + 0.01, 1.0) * (1 - progress) ** self.power
        head = SizeHead(
            of_counts_fast=math.log(square / fast**2 / 0.2),
            of_counts_slow=math.log(square / slow**2 / 0.2),
            low=math.log(1e-3 / 0.2),
            high=math.log(1 / 0.2),
            of_fast=of_snr + of_progress * x,
            of_slow=of_slow,
            limit=3 - of_horizon,
            scale=math.exp(of_horizon) * schedule * lr,
            of_decay=self.decay_of_snr,
            most_decay=MOST_DECAY * lr,
        )
        return nominal_sizes(sums, self.log_size, decay, head)

    def _summed(self, sums: Tensor) -> Tensor:
        """Adds up over shards what this process has of each tensor, [tensors, …]."""
        for add_up, indices in self.sharded.items():
            places = torch.tensor(indices, device=sums.device)
            sums = sums.index_copy(0, places, add_up(sums[places]))
        return sums

    def _move(
        self, thetas: list[Tensor], indices: list[int], directions: Tensor, sizes: Tensor, shrink: float
    ) -> None:
        """Moves k matrices, each along its part of the directions [k, rows, columns], orthogonalised."""
        rounded = directions.bfloat16() if directions.is_cuda else directions
        updates = with_size_of(directions, newton_schulz(rounded).to(directions.dtype))
        for theta, index, update in zip(thetas, indices, updates, strict=True):
            size, decay = sizes[index]
            square = self.statistics[-1, self.offsets[index] :][: update.numel()].view(theta.shape)
            seen = (square > 0) & (square < math.inf)
            theta.sub_(torch.where(seen, shrink + decay, shrink) * theta + size * update.view(theta.shape))
