"""The nominal step on many tensors: one launch for those of the same dtypes, and one for their sums."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2l_kernels.spec import Coefficients
from l2l_kernels.triton import configs

BLOCK = 2048
"""Coordinates of a program, none of which belongs to another tensor."""
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
COLUMNS = 6
"""Of the table of tensors: addresses of the target and the gradient, offset, count, moves, first block."""


@triton.jit
def rounded_bits(x):
    """The bits of float32 numbers rounded to bfloat16, to nearest and ties to even; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x != x, 0x7FC00000, nearest)


@triton.jit
def nominal_step_kernel(
    tensors,  # [tensors, COLUMNS]
    owner,  # [blocks]: the tensor of each program
    sizes,  # [tensors, 2]
    statistics,  # [3, N], or [2, N] where m and m2 share a word
    partials,  # [blocks, 3]
    N,
    w_fast,
    w_slow,
    w_square,
    fast,
    gradient,
    slow,
    square,
    shrink,
    sign,
    TARGET: tl.constexpr,
    GRAD: tl.constexpr,
    UPDATE: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moves a block of one tensor's coordinates and leaves its sums; without UPDATE, the sums alone."""
    block = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owner + block).to(tl.int64)
    row = tensors + tensor * COLUMNS
    offset, count, stride = tl.load(row + 2), tl.load(row + 3), tl.cast(N, tl.int64)
    start = (block - tl.load(row + 5)) * BLOCK
    if ALIGNED:  # so that a thread moves 16 bytes at once
        offset, count, stride = tl.multiple_of(offset, 4), tl.multiple_of(count, 4), tl.multiple_of(stride, 4)
    n = tl.arange(0, BLOCK)
    live = n < count - start
    rows = statistics + offset + start + n
    if SHARED:
        v_rows = rows + stride
        bits = tl.load(rows, mask=live, other=0.0).to(tl.int32, bitcast=True)
        m = (bits & -65536).to(tl.float32, bitcast=True)
        m2 = (bits << 16).to(tl.float32, bitcast=True)
    else:
        v_rows = rows + 2 * stride
        m = tl.load(rows, mask=live, other=0.0)
        m2 = tl.load(rows + stride, mask=live, other=0.0)
    v = tl.load(v_rows, mask=live, other=0.0)
    if UPDATE:
        moves = tl.load(row + 4) != 0
        target = tl.load(row).to(tl.pointer_type(TARGET))
        grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
        if ALIGNED:
            target, grad = tl.multiple_of(target, 16), tl.multiple_of(grad, 16)
        target += start
        g = sign * tl.load(grad + start + n, mask=live, other=0.0).to(tl.float32)
        theta = tl.load(target + n, mask=live & moves, other=0.0).to(tl.float32)
        m += w_fast * (g - m)
        m2 += w_slow * (g - m2)
        v += w_square * (g * g - v)
        if SHARED:
            high, low = rounded_bits(m), rounded_bits(m2)
            m, m2 = high.to(tl.float32, bitcast=True), low.to(tl.float32, bitcast=True)
            word = (high | ((low >> 16) & 0xFFFF)).to(tl.float32, bitcast=True)
        mean_square = square * v
        least: tl.constexpr = 1.1754943508222875e-38
        inverse = tl.where(mean_square > 0, tl.rsqrt(tl.maximum(mean_square, least)), 0.0)
        direction = inverse * (fast * m + gradient * g + slow * m2)
        size = tl.where(moves, tl.load(sizes + 2 * tensor), -1.0)  # 0 - 0 + direction
        decay = tl.where(moves, tl.load(sizes + 2 * tensor + 1), 0.0)
        shrink = tl.where(moves, shrink, 0.0)
        theta -= tl.where(inverse > 0, shrink + decay, shrink) * theta + size * direction
        if SHARED:
            tl.store(rows, word, mask=live)
        else:
            tl.store(rows, m, mask=live)
            tl.store(rows + stride, m2, mask=live)
        tl.store(v_rows, v, mask=live)
        tl.store(target + n, theta, mask=live)
    # In float64, in which squares of float32 are exact.
    m, m2, v = m.to(tl.float64), m2.to(tl.float64), v.to(tl.float64)
    tl.store(partials + 3 * block, tl.sum(m * m))
    tl.store(partials + 3 * block + 1, tl.sum(m2 * m2))
    tl.store(partials + 3 * block + 2, tl.sum(v))


@triton.jit
def nominal_sum_kernel(
    partials,  # [blocks, 3]
    bounds,  # [tensors + 1]: where each tensor's blocks begin, and the last one's end
    sums,  # [tensors, 3]
    BLOCK: tl.constexpr,
):
    """Adds up one of three sums of one tensor, in the order of its blocks."""
    tensor, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.load(bounds + tensor + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(tl.load(bounds + tensor), last, BLOCK):
        n = first + tl.arange(0, BLOCK)
        total += tl.load(partials + 3 * n + which, mask=n < last, other=0.0)
    tl.store(sums + 3 * tensor + which, tl.sum(total))


def nominal_step(
    targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    statistics: Tensor,
    offsets: Sequence[int],
    sizes: Tensor,
    moves: Sequence[bool],
    coefficients: Coefficients,
    maximize: bool,
) -> Tensor:
    """Does what `reference.nominal_step` does; float64 and not contiguous tensors go by way of a copy."""
    configs.check_dtypes({"statistics": statistics}, {})
    ours = [_readable(target) for target in targets]
    gradients = [_readable(grad) for grad in grads]
    sums = torch.empty(len(ours), 3, dtype=torch.float64, device=statistics.device)
    alike: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for index, (target, grad) in enumerate(zip(ours, gradients, strict=True)):
        alike.setdefault((target.dtype, grad.dtype), []).append(index)
    for dtypes, members in alike.items():
        table = [
            (ours[i].data_ptr(), gradients[i].data_ptr(), offsets[i], ours[i].numel(), int(moves[i]))
            for i in members
        ]
        whole = len(members) == len(ours)
        places = None if whole else _upload(tuple(members), statistics.device)
        of_members = sizes.contiguous() if places is None else sizes[places]
        some = _launch(statistics, table, of_members, coefficients, -1.0 if maximize else 1.0, dtypes)
        sums = some if places is None else sums.index_copy_(0, places, some)
    for target, moved in zip(targets, ours, strict=True):
        if moved is not target:
            target.copy_(moved)
    return sums


def nominal_sums(statistics: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Does what `reference.nominal_sums` does, by the kernel of the step."""
    configs.check_dtypes({"statistics": statistics}, {})
    table = [(0, 0, offset, size, 0) for offset, size in zip(offsets, sizes, strict=True)]
    return _launch(statistics, table)


def _launch(
    statistics: Tensor,
    table: Sequence[tuple[int, int, int, int, int]],
    sizes: Tensor | None = None,
    coefficients: Coefficients | None = None,
    sign: float = 1.0,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> Tensor:
    device = statistics.device
    blocks = [triton.cdiv(row[3], BLOCK) for row in table]
    first = list(accumulate(blocks, initial=0))
    sums = torch.zeros(len(table), 3, dtype=torch.float64, device=device)
    if first[-1] == 0:
        return sums
    rows = tuple(number for row, start in zip(table, first, strict=False) for number in (*row, start))
    aligned = statistics.shape[1] % 4 == 0 and all(
        target % 16 == grad % 16 == offset % 4 == count % 4 == 0 for target, grad, offset, count, _ in table
    )
    partials = torch.empty(first[-1], 3, dtype=torch.float64, device=device)
    numbers = coefficients or Coefficients(*[0.0] * len(Coefficients._fields))
    with torch.cuda.device_of(statistics):
        nominal_step_kernel[(first[-1],)](
            _upload(rows, device),
            _owners(tuple(blocks), device),
            statistics if sizes is None else sizes,
            statistics,
            partials,
            statistics.shape[1],
            *numbers,
            sign,
            **constants(*dtypes, update=sizes is not None, shared=len(statistics) == 2, aligned=aligned),
            **OPTIONS,
        )
        nominal_sum_kernel[(len(table), 3)](partials, _upload(tuple(first), device), sums, BLOCK=256)
    return sums


def constants(
    target: torch.dtype, grad: torch.dtype, update: bool, shared: bool, aligned: bool
) -> dict[str, Any]:
    """Returns the step kernel's constants."""
    flags = {"UPDATE": update, "SHARED": shared, "ALIGNED": aligned}
    return {"TARGET": DTYPES[target], "GRAD": DTYPES[grad], **flags, "COLUMNS": COLUMNS, "BLOCK": BLOCK}


@functools.lru_cache(maxsize=16)
def _upload(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns whole numbers on a device, without waiting for it; the same again need no upload.

    Where gradients stay in their memory that is every step, which can then be recorded into a CUDA graph.
    """
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def _owners(blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the tensor of each block, int32 [blocks]."""
    owners = torch.repeat_interleave(torch.arange(len(blocks), dtype=torch.int32), torch.tensor(blocks))
    return owners.to(device, non_blocking=True)


def _readable(tensor: Tensor) -> Tensor:
    """Returns a tensor that the kernel can read: itself, or a contiguous copy."""
    return (tensor if tensor.dtype in DTYPES else tensor.to(torch.float32)).contiguous()
