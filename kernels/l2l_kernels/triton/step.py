"""The fused step: preprocessing, every layer, the head and the update of θ in one launch."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2l_kernels.spec import LSTMSpec
from l2l_kernels.triton import configs
from l2l_kernels.triton.cell import bias_row, dot, feature_products, preprocess, sigmoid, tanh, weight_tile
from l2l_kernels.triton.lanes import step_lanes_kernel


@triton.jit
def _gate(
    h,  # [BLOCK, HP]
    below,  # [BLOCK, HP]: h of the layer below; not used by the first layer
    x,  # what the first layer reads: (x0, x1 [BLOCK], pointers to features [BLOCK], which of them are live)
    stride,
    weight,
    GATE: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    X: tl.constexpr,
    PREPROCESSING: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes one gate's z = W [x; h] + b, [BLOCK, HP]; X is the first layer's number of inputs, else 0."""
    IN: tl.constexpr = X if X > 0 else H
    K: tl.constexpr = IN + H
    unit, col = tl.arange(0, HP)[None, :], tl.arange(0, HP)[:, None]
    row = GATE * H + unit  # [1, HP]
    # From the bias on, so that the products add to it for nothing.
    z = tl.broadcast_to(bias_row(weight, GATE, H, K, unit), [BLOCK, HP])
    if PREPROCESSING == "features":
        z = feature_products(z, x, stride, weight, GATE, H, X, unit)
    elif X == 0:
        z = dot(below, weight_tile(weight, GATE, 0, H, H, K, unit, col), z, PRECISION)
    else:
        # Two inputs are too few for a matrix product: exact float32 multiply-adds.
        z += x[0][:, None] * tl.load(weight + row * K, mask=unit < H, other=0.0)
        if X == 2:
            z += x[1][:, None] * tl.load(weight + row * K + 1, mask=unit < H, other=0.0)
    return dot(h, weight_tile(weight, GATE, IN, H, H, K, unit, col), z, PRECISION)


@triton.jit
def _gates_in_a_loop(
    h, below, weight, H: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """Computes all gates' z above the first layer: products with `below` first, with h in the next iteration.

    Unrolled, the assembler would load the weights of many products ahead, and spill. It moves nothing out of
    a loop's body, in which one operand and its weights fit.
    """
    K: tl.constexpr = 2 * H
    unit, col = tl.arange(0, HP)[None, :], tl.arange(0, HP)[:, None]
    z_i = tl.broadcast_to(bias_row(weight, 0, H, K, unit), [BLOCK, HP])
    z_f = tl.broadcast_to(bias_row(weight, 1, H, K, unit), [BLOCK, HP])
    z_g = tl.broadcast_to(bias_row(weight, 2, H, K, unit), [BLOCK, HP])
    z_o = tl.broadcast_to(bias_row(weight, 3, H, K, unit), [BLOCK, HP])
    operand, columns = below, weight
    for _ in range(2):
        z_i = dot(operand, weight_tile(columns, 0, 0, H, H, K, unit, col), z_i, PRECISION)
        z_f = dot(operand, weight_tile(columns, 1, 0, H, H, K, unit, col), z_f, PRECISION)
        z_g = dot(operand, weight_tile(columns, 2, 0, H, H, K, unit, col), z_g, PRECISION)
        z_o = dot(operand, weight_tile(columns, 3, 0, H, H, K, unit, col), z_o, PRECISION)
        operand = h
        columns += H
    return z_i, z_f, z_g, z_o


@triton.jit
def _layer(
    state,  # [2, H, N] of this layer
    new_state,  # [2, H, N] of this layer
    weight,  # this layer's slice of φ
    below,
    x,
    n,
    live,
    stride,
    H: tl.constexpr,
    HP: tl.constexpr,
    X: tl.constexpr,
    PREPROCESSING: tl.constexpr,
    BLOCK: tl.constexpr,
    LATE_C: tl.constexpr,
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Runs one layer on a block of coordinates: writes the new (h, c), returns the new h [BLOCK, HP]."""
    unit = tl.arange(0, HP)[None, :]
    tile = live[:, None] & (unit < H)
    h_offsets = unit * stride + n[:, None]  # [BLOCK, HP]
    c_offsets = h_offsets + H * stride
    h = tl.load(state + h_offsets, mask=tile, other=0.0).to(tl.float32)
    if not LATE_C:
        c = tl.load(state + c_offsets, mask=tile, other=0.0).to(tl.float32)
    if LOOP and X == 0:
        z_i, z_f, z_g, z_o = _gates_in_a_loop(h, below, weight, H, HP, BLOCK, PRECISION)
        i = sigmoid(z_i) * tanh(z_g)
        f, o = sigmoid(z_f), sigmoid(z_o)
    else:
        i = sigmoid(_gate(h, below, x, stride, weight, 0, H, HP, X, PREPROCESSING, BLOCK, PRECISION))
        i *= tanh(_gate(h, below, x, stride, weight, 2, H, HP, X, PREPROCESSING, BLOCK, PRECISION))
        f = sigmoid(_gate(h, below, x, stride, weight, 1, H, HP, X, PREPROCESSING, BLOCK, PRECISION))
        o = sigmoid(_gate(h, below, x, stride, weight, 3, H, HP, X, PREPROCESSING, BLOCK, PRECISION))
    if LATE_C:
        tl.debug_barrier()  # or the compiler would load c early again, and spill
        c = tl.load(state + c_offsets, mask=tile, other=0.0).to(tl.float32)
    c = i + c * f
    h = tanh(c) * o
    # new_state may be state, and a thread may store what another one loads.
    tl.debug_barrier()
    tl.store(new_state + h_offsets, h, mask=tile)
    tl.store(new_state + c_offsets, c, mask=tile)
    # An infinite gradient makes the padding NaN, and 0 · NaN would reach the units of the layer above.
    return tl.where(unit < H, h, 0.0)


@triton.jit
def step_fwd_kernel(
    theta,  # [N]
    inputs,  # [N]: gradients; or features [X, N]
    state,  # [L, 2, H, N]
    new_state,  # [L, 2, H, N]; may be state
    phi,  # [P]
    N,
    inverse_p,
    exp_p,
    output_scale,
    L: tl.constexpr,
    H: tl.constexpr,
    X: tl.constexpr,
    PREPROCESSING: tl.constexpr,
    TANH_OUTPUT: tl.constexpr,
    HP: tl.constexpr,
    BLOCK: tl.constexpr,
    LATE_C: tl.constexpr,
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds output_scale · out(w_out · h + b_out) to θ and writes s_{t+1}; a program has one block."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    theta += start
    inputs += start
    state += start
    new_state += start
    n = tl.arange(0, BLOCK)
    live = n < N - start
    stride = tl.cast(N, tl.int64)  # the rows of a state lie N apart: int32 offsets would overflow at 10⁸
    x0, x1 = 0.0, 0.0
    if PREPROCESSING != "features":
        x0, x1 = preprocess(tl.load(inputs + n, mask=live, other=0.0), inverse_p, exp_p, PREPROCESSING)
    x = (x0, x1, inputs + n, live)
    h = tl.zeros([BLOCK, HP], tl.float32)
    h = _layer(
        state, new_state, phi, h, x, n, live, stride, H, HP, X, PREPROCESSING, BLOCK, LATE_C, LOOP, PRECISION
    )
    phi += 4 * H * (X + H + 1)
    for _ in tl.static_range(1, L):
        state += 2 * H * stride
        new_state += 2 * H * stride
        h = _layer(state, new_state, phi, h, x, n, live, stride, H, HP, 0, "", BLOCK, LATE_C, LOOP, PRECISION)
        phi += 4 * H * (H + H + 1)
    unit = tl.arange(0, HP)
    w_out = tl.load(phi + unit, mask=unit < H, other=0.0)
    output = tl.sum(h * w_out[None, :], 1) + tl.load(phi + H)
    if TANH_OUTPUT:
        output = tanh(output)
    tl.store(theta + n, tl.load(theta + n, mask=live) + output_scale * output, mask=live)


def step_kernel(constants: dict[str, Any]) -> Any:
    """Returns the kernel that `configs.step_config` has chosen with these constants."""
    return step_fwd_kernel if "HP" in constants else step_lanes_kernel


def step_(
    theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor, phi: Tensor, spec: LSTMSpec
) -> None:
    """Does what `reference.step_` does in one launch, which reads and writes every state once."""
    configs.check_dtypes(
        {"theta": theta, "inputs": inputs, "phi": phi}, {"state": state, "new_state": new_state}
    )
    N = theta.shape[0]
    if N == 0:
        return
    out_theta, out_state = theta.contiguous(), new_state
    if not new_state.is_contiguous():
        out_state = torch.empty(new_state.shape, dtype=new_state.dtype, device=new_state.device)
    constants, options = configs.step_config(spec, configs.family(theta.device))
    with torch.cuda.device_of(theta):
        step_kernel(constants)[(triton.cdiv(N, constants["BLOCK"]),)](
            out_theta,
            inputs.contiguous(),
            state.contiguous(),
            out_state,
            phi.contiguous(),
            *(N, 1.0 / spec.p, math.exp(spec.p), spec.output_scale),
            **constants,
            **options,
        )
    if out_theta is not theta:
        theta.copy_(out_theta)
    if out_state is not new_state:
        new_state.copy_(out_state)
