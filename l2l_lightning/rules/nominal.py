"""What a step size can be made of: the nominal direction, and facts of the tensor and of the horizon."""

from __future__ import annotations

import functools
import math

import torch
from l2l_kernels.reference import means_of, update_means
from torch import Tensor

from l2l_lightning.rules.features import Features
from l2l_lightning.rules.layout import Layout, Time
from l2l_lightning.rules.orthogonal import LEAST

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
)
"""What the logarithm of a tensor's step size is linear in; the last inputs."""
DECAY_FACTS = ("one", "log SNR", "log gain", "log T")
"""What the logarithm of the decay of weights is linear in."""
GAINS = 0.1, 10.0
"""Gains are taken to be within these bounds."""
MOST_DECAY = 0.1
"""The share of the weights that a step takes at most."""

SNR, HORIZON, FAN_IN = (FACTS.index(name) for name in ("log SNR", "log T", "log fan-in"))
USUAL_FAN_IN = 64
"""Where the logarithm of the fan-in is taken to be 0."""

UNKNOWN_FROM = 100
"""Where nobody knows T, it is taken to be twice the steps so far, and this many at least."""


class NominalFeatures(Features):
    r"""Directions that do not depend on the gradient's scale, the progress, and facts of each tensor.

    With bias-corrected running means m̂ (β 0.9), m̂₂ (0.99) of g_t and v̂ (0.98) of g_t², the directions are
    N = (0.9 m̂ + 0.1 g) / √v̂ (NAdam's), g / √v̂ and m̂₂ / √v̂, zero where v̂ is; the progress is t / T. A row
    of ones and zeros says where weights decay: where v̂ is not 0, in matrices with both sides of 4 and more.

    The facts are FACTS: logarithms of the horizon, of the tensor's shape, and of two means over the tensor,
    its signal to noise mean(m̂²) / mean(v̂) and the same of m̂₂. Of noise alone the first is 0.05; less says
    that gradients turn from step to step. Both are of the statistics before this gradient, so that one pass
    over memory can update these, move the tensor and sum up for the next step. Facts are centred on a common
    network, so that the weight of "one" is the step size there.

    Args:
        horizon_free: Go without T: it is taken to be 2(t + 1), and 100 at least.
        compact: Keep m and m₂ in bfloat16, as the halves of one float32, so that statistics are two rows
            (of float64, in float32).

    Raises:
        ValueError: When they are read, T is not known, unless horizon_free; or a gradient is to be
            differentiated, and the rounding of compact statistics has no derivative.

    Source: the direction is that of Dozat 2016, "Incorporating Nesterov momentum into Adam".
    """

    width = len(DIRECTIONS) + 2 + len(FACTS)

    def __init__(self, horizon_free: bool = False, compact: bool = False) -> None:
        self.horizon_free = horizon_free
        self.rows = 2 if compact else 3

    def __call__(self, grad: Tensor, statistics: Tensor, time: Time, layout: Layout) -> Tensor:
        """[15, n] of g_t [n]; the statistics are m, m₂ and v, [3, n] or [2, n]."""
        if self.rows == 2 and grad.requires_grad:
            raise ValueError("compact statistics cannot be differentiated: second_order needs compact=False")
        total = self.total(time)
        decays = decays_of_means(statistics.dtype, statistics.device)
        # Each mean over the sum of its weights, as Adam corrects its bias; before step 0 both are zero.
        means = torch.stack(means_of(statistics))
        before = means / (1 - decays**time.step).clamp(min=torch.finfo(grad.dtype).tiny)
        fast, slow, power = layout.mean(torch.stack([before[0].square(), before[1].square(), before[2]]))
        snr, progress = log_snr(fast, power), (time.step / total).clamp(max=1)
        moving = torch.stack([snr, log_snr(slow, power), (2 * progress - 1) * snr])

        means = means.lerp(torch.stack([grad, grad, grad * grad]), 1 - decays)
        fast, slow = update_means(statistics, *means)
        means = torch.stack([fast, slow, means[2]])
        fast_hat, slow_hat, square_hat = (means / (1 - decays ** (time.step + 1))).unbind()
        # The rule's own directions are free of the gradient's scale: no ε, but a zero for what never moved.
        inverse = torch.where(square_hat > 0, square_hat.clamp(min=torch.finfo(grad.dtype).tiny).rsqrt(), 0.0)
        nominal = (FAST * fast_hat + (1 - FAST) * grad) * inverse
        directions = torch.stack([nominal, grad * inverse, slow_hat * inverse, progress.expand_as(grad)])
        shape = _facts(layout, grad)
        horizon = (total / 300).log().expand_as(grad)
        decays_here = shape[:1] * (inverse > 0)
        return torch.cat([directions, decays_here, shape[1:2], horizon[None], shape[2:], moving])

    def total(self, time: Time) -> Tensor:
        """T, or what it is taken to be, as a scalar in the dtype of t.

        Raises:
            ValueError: It is not known, unless horizon_free.
        """
        if self.horizon_free:
            return (2 * (time.step + 1)).clamp(min=UNKNOWN_FROM)
        if time.total is None:
            raise ValueError("this rule needs to know total_steps, how many steps there will be")
        return torch.full_like(time.step, time.total)


def log_snr(signal: Tensor, power: Tensor) -> Tensor:
    """log(signal / power / 0.2), the ratio within [0.001, 1]; 0 without a gradient or if it overflows."""
    ratio = (signal / power.clamp(min=torch.finfo(power.dtype).tiny)).clamp(1e-3, 1)
    return torch.where((power > 0) & power.isfinite(), (ratio / 0.2).log(), 0.0)


def log_gain(mean_square: Tensor, fan_in: Tensor) -> Tensor:
    """The logarithm of a matrix's gain, √fan-in times its root mean square, within GAINS.

    By so much a layer makes independent inputs larger: initialisations draw weights of a gain near 1.

    Args:
        mean_square: The mean of θ² over the tensor.
        fan_in: The fact "log fan-in" of it.
    """
    least, most = GAINS
    log_gain = 0.5 * (mean_square.log() + (fan_in + math.log(USUAL_FAN_IN)))
    return log_gain.clamp(math.log(least), math.log(most))


@functools.cache
def decays_of_means(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The decays of the three statistics, [3, 1]."""
    with torch.inference_mode(False):  # a validation's would not do for a graph
        return torch.tensor([[FAST], [SLOW], [SQUARE]], dtype=dtype, device=device)


def _facts(layout: Layout, grad: Tensor) -> Tensor:
    """What stays what it is, [7, n]; spread anew, as it takes 28 bytes a coordinate."""
    parts = torch.split(shape_facts(layout, grad.dtype, grad.device), 1, 1)
    spread = [
        column.expand(-1, tensor.numel_here) for column, tensor in zip(parts, layout.tensors, strict=True)
    ]
    return torch.cat(spread, 1).repeat(1, layout.copies)


def shape_facts(layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What stays what it is of each tensor, [7, tensors].

    The first says whether both sides are of 4 and more; the others are FACTS but the horizon, in their order.
    """
    count = layout.num_tensors or len(layout.tensors)
    kinds = tuple((*tensor.fans, tensor.rank > 1, tensor.numel) for tensor in layout.tensors)
    return _columns(kinds, count, dtype, device)


@functools.cache  # for good: recorded CUDA graphs read them
def _columns(
    kinds: tuple[tuple[int, int, bool, int], ...],
    num_tensors: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`shape_facts` of tensors of these fans, whether they are matrices, and sizes."""
    rows = [
        [
            float(matrix and min(fan_in, fan_out) >= LEAST),
            1.0,
            math.log(fan_in / USUAL_FAN_IN) if matrix else 0.0,
            math.log(fan_out / 24) if matrix else 0.0,
            float(not matrix),
            0.0 if matrix else math.log(max(numel, 1) / 24),
            math.log(num_tensors / 4),
        ]
        for fan_in, fan_out, matrix, numel in kinds
    ]
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=dtype, device=device).T.contiguous()
