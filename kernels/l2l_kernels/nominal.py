"""The nominal step: one pass over the memory of many tensors, each moved by a size that was known before.

It is no operator of PyTorch's dispatcher, as `step_` is: nothing differentiates or traces it, and a list of
tensors takes the dispatcher longer than a small network's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from l2l_kernels import backends
from l2l_kernels.checks import DTYPES, has_distinct_elements, span
from l2l_kernels.spec import Coefficients, SizeHead


def nominal_step(
    targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    statistics: Tensor,
    offsets: Sequence[int],
    sizes: Tensor,
    moves: Sequence[bool],
    coefficients: Coefficients,
    maximize: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Updates three running means of every coordinate, and moves it along a direction made of them.

    With g the gradient (−g if `maximize`), the means m, m₂ and v, and a tensor's size η and decay λ:

        m ← m + w_m (g − m)          m₂ ← m₂ + w_s (g − m₂)          v ← v + w_v (g² − v)
        r = 1 / √(c_v v), and 0 where v is 0          d = r (c_m m + c_g g + c_s m₂)
        θ ← θ − (κ + λ [r > 0]) θ − η d

    Arithmetic is in the statistics' dtype, and θ is rounded once. All that is elementwise is one pass: 36
    bytes a coordinate, if all is float32. Where statistics have two rows, m and m₂ are rounded to halves of
    one word (see `reference.means_of`), and a pass takes 28 bytes.

    Args:
        targets: θ of each tensor, updated in place; or, of a tensor that does not move, where d goes.
        grads: Their gradients, of the same shapes.
        statistics: m, m₂ and v, [3, N], float32 or float64, contiguous; or m and m₂ in one row, [2, N].
            Updated in place.
        offsets: Where each tensor's coordinates begin in a row of the statistics.
        sizes: η and λ of each tensor, [tensors, 2], in the statistics' dtype.
        moves: Of each tensor whether θ moves; else d is written.
        coefficients: w_m, w_s, w_v, c_m, c_g, c_s, c_v and κ.
        maximize: Whether gradients are those of what is to grow.
        backend: Overrides the choice by device (see backends.choose).

    Returns:
        Σ m², Σ m₂² and Σ v of each tensor as they are now, [tensors, 3] in float64 (float32 where the device
        has no float64). They do not depend on the number of threads.

    Raises:
        ValueError: A tensor's shape, dtype, device or layout does not fit, or one that is written overlaps.
        BackendUnavailableError: The backend asked for cannot run here.

    Example:
        >>> theta, statistics = torch.ones(2), torch.zeros(3, 2)
        >>> by_sign = Coefficients(0.1, 0.01, 0.25, fast=0.0, gradient=0.5, slow=0.0, square=1.0, shrink=0.0)
        >>> grad, sizes = torch.tensor([4.0, -4.0]), torch.tensor([[0.1, 0.0]])
        >>> sums = nominal_step([theta], [grad], statistics, [0], sizes, [True], by_sign)
        >>> theta
        tensor([0.9000, 1.1000])
    """
    _check(targets, grads, statistics, offsets, sizes, moves)
    implementation = backends.load(backends.choose(statistics.device, backend))
    sums = implementation.nominal_step(
        targets, grads, statistics, offsets, sizes, moves, coefficients, maximize
    )
    # Kernels write through pointers, and autograd must know that what it saved of θ is no longer the same.
    written = [tensor for tensor in (*targets, statistics) if not tensor.is_inference()]
    torch.autograd.graph.increment_version(written)
    return sums


def nominal_sums(
    statistics: Tensor, offsets: Sequence[int], sizes: Sequence[int], backend: str | None = None
) -> Tensor:
    """Returns the sums of a step that left these statistics, bit for bit: [tensors, 3].

    Args:
        statistics: m, m₂ and v, [3, N] or [2, N].
        offsets: Where each tensor's coordinates begin.
        sizes: How many each tensor has.
        backend: Overrides the choice by device.

    Raises:
        As nominal_step.
    """
    _check_statistics(statistics, offsets, sizes)
    return backends.load(backends.choose(statistics.device, backend)).nominal_sums(statistics, offsets, sizes)


def nominal_sizes(
    sums: Tensor, log_sizes: Tensor, decays: Tensor, head: SizeHead, backend: str | None = None
) -> Tensor:
    """Returns η and λ of each tensor, which `nominal_step` takes, from the sums that the step before left.

        r_m = log(Σm² / Σv) + a_m and r_s = log(Σm₂² / Σv) + a_s, clamped; 0 unless Σv is positive and finite
        η = scale · exp(min(b + w_m r_m + w_s r_s, limit))          λ = min(η c exp(w_λ r_m), most)

    Args:
        sums: Σ m², Σ m₂² and Σ v of each tensor, [tensors, 3], as nominal_step gives them.
        log_sizes: b of each tensor, [tensors], float32 or float64.
        decays: c of each tensor, [tensors], of the same dtype.
        head: a, w, and the bounds.
        backend: Overrides the choice by device.

    Raises:
        ValueError: A tensor's shape, dtype or device does not fit.
        BackendUnavailableError: The backend asked for cannot run here.

    Example:
        >>> bounds = {"low": -5.0, "high": 5.0, "limit": 3.0, "most_decay": 0.5}
        >>> head = SizeHead(0.0, 0.0, of_fast=0.5, of_slow=0.0, scale=1.0, of_decay=0.0, **bounds)
        >>> sums = torch.tensor([[4.0, 1.0, 1.0]], dtype=torch.float64)
        >>> nominal_sizes(sums, torch.zeros(1), torch.tensor([0.1]), head)
        tensor([[2.0000, 0.2000]])
    """
    if sums.ndim != 2 or sums.shape[1] != 3 or not len(sums) == len(log_sizes) == len(decays):
        shapes = ", ".join(str(list(x.shape)) for x in (sums, log_sizes, decays))
        raise ValueError(f"sums, log_sizes and decays must be [tensors, 3] and [tensors], got {shapes}")
    wide = torch.float64 if sums.device.type != "mps" else torch.float32
    dtypes = sums.dtype, log_sizes.dtype, decays.dtype
    if dtypes not in ((wide, torch.float32, torch.float32), (wide, torch.float64, torch.float64)):
        raise ValueError(f"sums must be {wide}, log_sizes and decays float32 or float64, got {dtypes}")
    if not sums.device == log_sizes.device == decays.device:
        raise ValueError(f"decays and log_sizes must be on the sums' device, {sums.device}")
    implementation = backends.load(backends.choose(sums.device, backend))
    return implementation.nominal_sizes(sums, log_sizes, decays, head)


def _check_statistics(statistics: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> None:
    if statistics.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"statistics must be float32 or float64, got {statistics.dtype}")
    if statistics.ndim != 2 or statistics.shape[0] not in (2, 3) or not statistics.is_contiguous():
        raise ValueError(f"statistics must be [3, N] or [2, N] and contiguous, got {list(statistics.shape)}")
    if len(offsets) != len(sizes):
        raise ValueError(f"there must be an offset for each tensor, got {len(offsets)} for {len(sizes)}")
    places = sorted(zip(offsets, sizes, strict=True))
    ends = [0, *accumulate((start + size for start, size in places), max)]
    if any(start < end for (start, _), end in zip(places, ends, strict=False)):
        raise ValueError("offsets must not be negative, nor give two tensors the same statistics")
    if ends[-1] > statistics.shape[1]:
        raise ValueError(f"tensors end at {ends[-1]}, and the statistics have {statistics.shape[1]} columns")


def _check(
    targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    statistics: Tensor,
    offsets: Sequence[int],
    sizes: Tensor,
    moves: Sequence[bool],
) -> None:
    count, device = len(targets), statistics.device
    if not count == len(grads) == len(moves):
        raise ValueError(f"targets, grads and moves must be as many, got {count}, {len(grads)}, {len(moves)}")
    _check_statistics(statistics, offsets, [target.numel() for target in targets])
    if sizes.shape != (count, 2) or sizes.dtype != statistics.dtype or sizes.device != device:
        raise ValueError(
            f"sizes must be [{count}, 2], {statistics.dtype} and on {device}, got {list(sizes.shape)}, "
            f"{sizes.dtype} and {sizes.device}"
        )
    spans = [(*span(statistics), True)]
    for index, (target, grad) in enumerate(zip(targets, grads, strict=True)):
        if target.shape != grad.shape:
            raise ValueError(
                f"grads[{index}] must have the shape {list(target.shape)}, got {list(grad.shape)}"
            )
        for name, tensor in (("targets", target), ("grads", grad)):
            if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.device != device:
                raise ValueError(
                    f"{name}[{index}] must be dense, floating-point of 16, 32 or 64 bits and on {device}, "
                    f"got {tensor.layout}, {tensor.dtype} and {tensor.device}"
                )
            if tensor.is_contiguous():  # others go by way of a copy
                spans.append((*span(tensor), name == "targets"))
            elif name == "targets" and not has_distinct_elements(tensor):
                raise ValueError(f"targets[{index}] must not hold one number twice (it is expanded)")
    spans.sort()
    end = written_end = 0
    for start, its_end, written in spans:
        if start < written_end or (written and start < end):
            raise ValueError("targets and statistics are written and must not overlap anything in memory")
        end = max(end, its_end)
        written_end = max(written_end, its_end) if written else written_end
