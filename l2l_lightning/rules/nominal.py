"""What a step size can be made of: the nominal direction, and facts of the tensor and of the horizon."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from l2l_lightning.rules.features import Features
from l2l_lightning.rules.layout import Layout, Time

FAST, SLOW, SQUARE = 0.9, 0.99, 0.98
"""The decays of the running means of g_t, of a slower one, and of g_t²."""

DIRECTIONS = ("nominal", "gradient", "slow")
"""The first inputs, in the order of their rows: each in units of √v̂."""

FACTS = (
    "one",
    "log T",
    "log fan-in",
    "log fan-out",
    "is vector",
    "log size",
    "log tensors",
    "log SNR",
    "log slow SNR",
    "progress · log SNR",
    "log density",
)
"""What the logarithm of a tensor's step size is linear in; the last inputs."""


class NominalFeatures(Features):
    r"""Directions that do not depend on the gradient's scale, the progress, and facts of each tensor.

    With bias-corrected running means m̂ (β 0.9), m̂₂ (0.99) of g_t and v̂ (0.98) of g_t², the directions are
    N = (0.9 m̂ + 0.1 g) / √v̂ (NAdam's), g / √v̂ and m̂₂ / √v̂, zero where v̂ is; the progress is t / T. The facts
    are FACTS: logarithms of the horizon and of the tensor's shape, and of three means over the tensor, its
    signal to noise mean(m̂²) / mean(v̂), the same of m̂₂, and the share of gradients that are not zero. They are
    centred on a common network, so that the weight of "one" is the step size there.

    Raises:
        ValueError: T is not known (when they are read).

    Source: the direction is that of Dozat 2016, "Incorporating Nesterov momentum into Adam".
    """

    width = len(DIRECTIONS) + 1 + len(FACTS)
    rows = 4

    def __call__(self, grad: Tensor, statistics: Tensor, time: Time, layout: Layout) -> Tensor:
        """[15, n] of g_t [n]; the statistics are m, m₂, v and the share of g ≠ 0, [4, n]."""
        if time.total is None:
            raise ValueError("this rule needs to know total_steps, how many steps there will be")
        news = torch.stack([grad, grad, grad * grad, (grad != 0).to(grad.dtype)])
        decays = _decays(statistics.dtype, statistics.device)
        statistics.lerp_(news, 1 - decays)
        # Each mean over the sum of its weights, as Adam corrects its bias.
        fast_hat, slow_hat, square_hat, present = (statistics / (1 - decays ** (time.step + 1))).unbind()
        # The rule's own directions are free of the gradient's scale: no ε, but a zero for what never moved.
        inverse = torch.where(square_hat > 0, square_hat.clamp(min=torch.finfo(grad.dtype).tiny).rsqrt(), 0.0)
        nominal = (FAST * fast_hat + (1 - FAST) * grad) * inverse
        progress = (time.step / time.total).clamp(max=1)
        power, density = layout.mean(square_hat), layout.mean(present)
        snr = _log_snr(layout.mean(fast_hat * fast_hat), power)
        slow_snr = _log_snr(layout.mean(slow_hat * slow_hat), power)
        moving = torch.stack([snr, slow_snr, (2 * progress - 1) * snr, density.clamp(0.01, 1).log()])
        directions = torch.stack([nominal, grad * inverse, slow_hat * inverse, progress.expand_as(grad)])
        return torch.cat([directions, _facts(layout, time.total, grad), moving])


def _log_snr(signal: Tensor, power: Tensor) -> Tensor:
    """log(signal / power / 0.2), the ratio within [0.001, 1]; 0 without a gradient or if it overflows."""
    ratio = (signal / power.clamp(min=torch.finfo(power.dtype).tiny)).clamp(1e-3, 1)
    return torch.where((power > 0) & power.isfinite(), (ratio / 0.2).log(), 0.0)


@functools.cache
def _decays(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Those of the four statistics, [4, 1]."""
    with torch.inference_mode(False):  # a validation's would not do for a graph
        return torch.tensor([[FAST], [SLOW], [SQUARE], [SQUARE]], dtype=dtype, device=device)


def _facts(layout: Layout, total: int, grad: Tensor) -> Tensor:
    """The facts that stay what they are, [7, n]; spread anew, as they take 28 bytes a coordinate."""
    count = layout.num_tensors or len(layout.tensors)
    kinds = tuple((*tensor.fans, tensor.rank > 1, tensor.numel) for tensor in layout.tensors)
    columns = torch.split(_columns(kinds, count, total, grad.dtype, grad.device), 1, 1)
    spread = [
        column.expand(-1, tensor.numel_here) for column, tensor in zip(columns, layout.tensors, strict=True)
    ]
    return torch.cat(spread, 1).repeat(1, layout.copies)


@functools.cache  # for good: recorded CUDA graphs read them
def _columns(
    kinds: tuple[tuple[int, int, bool, int], ...],
    num_tensors: int,
    total: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The facts of tensors of these fans, whether they are matrices, and sizes, [7, their number]."""
    rows = [
        [
            1.0,
            math.log(total / 300),
            math.log(fan_in / 64) if matrix else 0.0,
            math.log(fan_out / 24) if matrix else 0.0,
            float(not matrix),
            0.0 if matrix else math.log(max(numel, 1) / 24),
            math.log(num_tensors / 4),
        ]
        for fan_in, fan_out, matrix, numel in kinds
    ]
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=dtype, device=device).T.contiguous()
