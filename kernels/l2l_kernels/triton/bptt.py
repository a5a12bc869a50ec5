"""The fused backward through a window: one launch per layer, from the top layer to the bottom.

All layers' weight gradients at once do not fit in a GPU's registers; one layer's do. So each pass runs its
layer's BPTT over all T steps and leaves the cotangent of its input, [T, H, N], for the pass below.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2l_kernels.spec import LSTMSpec
from l2l_kernels.triton import configs
from l2l_kernels.triton.cell import bias_row, dot, feature_products, preprocess, sigmoid, tanh, weight_tile


@triton.jit
def _weight(
    weight, USE: tl.constexpr, GATE: tl.constexpr, H: tl.constexpr, IN: tl.constexpr, HP: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """Loads one gate's W^T [KP, HP] (USE "z"), W_h [HP, HP] ("d_h") or, above layer 0, W_x ("d_x")."""
    K: tl.constexpr = IN + H
    across, down = tl.arange(0, HP)[None, :], tl.arange(0, HP)[:, None]
    if USE == "z":
        return weight_tile(weight, GATE, 0, K, H, K, across, tl.arange(0, KP)[:, None])
    else:
        return weight_tile(weight, GATE, IN if USE == "d_h" else 0, H, H, K, down, across)


@triton.jit
def _resident(
    weight, FIRST: tl.constexpr, H: tl.constexpr, IN: tl.constexpr, HP: tl.constexpr, KP: tl.constexpr
):
    """Loads all weights of the layer: of each gate for z, then for d_h, then for d_x."""
    USE_X: tl.constexpr = "d_h" if FIRST else "d_x"  # the first layer has no d_x: its entries are not read
    return (
        _weight(weight, "z", 0, H, IN, HP, KP),
        _weight(weight, "z", 1, H, IN, HP, KP),
        _weight(weight, "z", 2, H, IN, HP, KP),
        _weight(weight, "z", 3, H, IN, HP, KP),
        _weight(weight, "d_h", 0, H, IN, HP, KP),
        _weight(weight, "d_h", 1, H, IN, HP, KP),
        _weight(weight, "d_h", 2, H, IN, HP, KP),
        _weight(weight, "d_h", 3, H, IN, HP, KP),
        _weight(weight, USE_X, 0, H, IN, HP, KP),
        _weight(weight, USE_X, 1, H, IN, HP, KP),
        _weight(weight, USE_X, 2, H, IN, HP, KP),
        _weight(weight, USE_X, 3, H, IN, HP, KP),
    )


@triton.jit
def _product(x, acc, resident, USE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr):
    """Adds to acc x times a gate's resident weight."""
    FIRST_USE: tl.constexpr = 0 if USE == "z" else (4 if USE == "d_h" else 8)
    return dot(x, resident[FIRST_USE + GATE], acc, PRECISION)


@triton.jit
def _bias_and_inputs(
    x, stride, weight, GATE: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    PREPROCESSING: tl.constexpr, FIRST: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes one gate's z without the product with h, [BLOCK, HP]: bias and, in the first layer, W_x x."""
    unit = tl.arange(0, HP)[None, :]
    row = GATE * H + unit
    z = tl.broadcast_to(bias_row(weight, GATE, H, K, unit), [BLOCK, HP])
    if FIRST and PREPROCESSING == "features":
        z = feature_products(z, x, stride, weight, GATE, H, K - H, unit)
    elif FIRST:
        z += x[0][:, None] * tl.load(weight + row * K, mask=unit < H, other=0.0)
        if PREPROCESSING == "log_sign":
            z += x[1][:, None] * tl.load(weight + row * K + 1, mask=unit < H, other=0.0)
    return z


@triton.jit
def _store_gate(
    partial, d_w, d_b, GATE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HP: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """Writes one gate's dW^T [KP, HP] and db where φ has W and b."""
    unit, col = tl.arange(0, HP)[None, :], tl.arange(0, KP)[:, None]
    row = GATE * H + unit
    offsets = tl.where(col < K, row * K + col, 4 * H * K + row)
    tl.store(partial + offsets, d_w, mask=(unit < H) & (col <= K))
    if K == KP:
        tl.store(partial + 4 * H * K + row, tl.sum(d_b, 0)[None, :], mask=unit < H)


@triton.jit
def bptt_layer_bwd_kernel(
    inputs,  # [T, N]: gradients; or features [T, X, N]; read by the first layer
    history,  # [T+1, L, 2, H, N], from this layer's h of s_0 on
    d_above,  # cotangents: of the update, [T, N], for the top layer, else of this layer's h, [T, H, N]
    d_input,  # [T, H, N]: where the cotangent of h of the layer below goes; not used by the first layer
    d_final_state,  # [2, H, N] of this layer, or None for zeros
    d_initial_state,  # [2, H, N] of this layer
    phi,  # [P], from this layer's weight on
    partials,  # [programs, P]: the gradients of this layer's weight and bias, and above them of the head
    T,
    N,
    P,
    inverse_p,
    exp_p,
    output_scale,
    zero,  # 0: see RESIDENT
    L: tl.constexpr,
    H: tl.constexpr,
    X: tl.constexpr,
    PREPROCESSING: tl.constexpr,
    TANH_OUTPUT: tl.constexpr,
    FIRST: tl.constexpr,
    TOP: tl.constexpr,
    HP: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    GATES: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """One layer's BPTT; each program strides over blocks and leaves its share of the weights' gradient.

    With the operand a_t = [x_t | h_{t-1} | 1 | 0 …], [BLOCK, KP], a gate's z is a W^T + b, and its dW^T is
    Σ a^T dz, [KP, HP], summed on chip over steps and blocks. The row of the 1, which W^T leaves at zero, is
    db; an operand with no column to spare (K = KP) has db summed apart.

    RESIDENT weights are loaded once and stay in shared memory (on AMD: in registers). Where they do not fit
    (configs.py), each step loads them, at an address that the compiler cannot know to be the same: it would
    hoist the loads. And it multiplies in loops over the two operands, h of the layer below and h, whose
    products it cannot move out of the loop's body and spill: unrolled, 8 KB on sm_80.
    """
    IN: tl.constexpr = X if FIRST else H
    K: tl.constexpr = IN + H
    HEAD: tl.constexpr = 4 * H * (K + 1)
    stride = tl.cast(N, tl.int64)  # the rows of a state lie N apart: int32 offsets would overflow at 10⁸
    step_stride = L * 2 * H * stride  # from s_t to s_{t+1}
    unit, col = tl.arange(0, HP)[None, :], tl.arange(0, KP)[None, :]
    row = tl.arange(0, HP)[:, None]

    # Whole tiles, so that the products add to them for nothing.
    b_i = tl.broadcast_to(bias_row(phi, 0, H, K, unit), [BLOCK, HP])
    b_f = tl.broadcast_to(bias_row(phi, 1, H, K, unit), [BLOCK, HP])
    b_g = tl.broadcast_to(bias_row(phi, 2, H, K, unit), [BLOCK, HP])
    b_o = tl.broadcast_to(bias_row(phi, 3, H, K, unit), [BLOCK, HP])
    resident = _resident(phi, FIRST, H, IN, HP, KP) if RESIDENT else ()
    # db is summed over coordinates at the end, and only where K = KP.
    if GATES != "go":
        dw_i = tl.zeros([KP, HP], tl.float32)
        dw_f = tl.zeros([KP, HP], tl.float32)
        db_i = tl.zeros([BLOCK, HP], tl.float32)
        db_f = tl.zeros([BLOCK, HP], tl.float32)
    if GATES != "if":
        dw_g = tl.zeros([KP, HP], tl.float32)
        dw_o = tl.zeros([KP, HP], tl.float32)
        db_g = tl.zeros([BLOCK, HP], tl.float32)
        db_o = tl.zeros([BLOCK, HP], tl.float32)
    if TOP:
        head = tl.load(phi + HEAD + unit, mask=unit < H, other=0.0)
        w_out = output_scale * head
        dw_out = tl.zeros([BLOCK, HP], tl.float32)
        db_out = tl.zeros([BLOCK], tl.float32)

    # The operand's columns relative to this layer's h in s_t: x_t is h of the layer below in s_{t+1}.
    if FIRST:
        a_columns = (col - IN) * stride
        stored = (col >= IN) & (col < K)
    else:
        a_columns = tl.where(col < IN, step_stride + (col - 2 * H) * stride, (col - IN) * stride)
        stored = col < K

    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0)):
        n = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = n < N
        tile = live[:, None] & (unit < H)
        h_offsets = unit * stride + n[:, None]  # [BLOCK, HP]
        c_offsets = h_offsets + H * stride
        d_h = tl.zeros([BLOCK, HP], tl.float32)
        d_c = tl.zeros([BLOCK, HP], tl.float32)
        if d_final_state is not None:
            d_h += tl.load(d_final_state + h_offsets, mask=tile, other=0.0).to(tl.float32)
            d_c += tl.load(d_final_state + c_offsets, mask=tile, other=0.0).to(tl.float32)
        for step in range(T):
            t = tl.cast(T - 1 - step, tl.int64)
            state = history + t * step_stride
            a = tl.load(state + a_columns + n[:, None], mask=live[:, None] & stored, other=0.0).to(tl.float32)
            c = tl.load(state + c_offsets, mask=tile, other=0.0).to(tl.float32)
            x0, x1, features = 0.0, 0.0, inputs + n  # of the first layer only
            if FIRST and PREPROCESSING == "features":
                features += t * (X * stride)
                a += tl.load(features[:, None] + col * stride, mask=live[:, None] & (col < X), other=0.0)
            elif FIRST:
                g_t = tl.load(inputs + t * stride + n, mask=live, other=0.0)
                x0, x1 = preprocess(g_t, inverse_p, exp_p, PREPROCESSING)
                a = tl.where(col == 0, x0[:, None], a)
                if PREPROCESSING == "log_sign":
                    a = tl.where(col == 1, x1[:, None], a)
            a = tl.where(col == K, 1.0, a)
            x = (x0, x1, features, live)
            if TOP:
                d_update = tl.load(d_above + t * stride + n, mask=live, other=0.0)[:, None]
                h_new = tl.load(state + step_stride + h_offsets, mask=tile, other=0.0).to(tl.float32)
                if TANH_OUTPUT:
                    output = tanh(tl.sum(h_new * head, 1) + tl.load(phi + HEAD + H))[:, None]
                    d_update *= 1 - output * output
                d_h += d_update * w_out
                dw_out += d_update * h_new
                db_out += tl.sum(d_update, 1)
            else:
                d_h += tl.load(d_above + t * (H * stride) + h_offsets, mask=tile, other=0.0)

            weight = phi + t * zero
            if RESIDENT:
                i = sigmoid(_product(a, b_i, resident, "z", 0, PRECISION))
                f = sigmoid(_product(a, b_f, resident, "z", 1, PRECISION))
                g = tanh(_product(a, b_g, resident, "z", 2, PRECISION))
                o = sigmoid(_product(a, b_o, resident, "z", 3, PRECISION))
            else:
                z_i = _bias_and_inputs(x, stride, weight, 0, H, K, PREPROCESSING, FIRST, HP, BLOCK)
                z_f = _bias_and_inputs(x, stride, weight, 1, H, K, PREPROCESSING, FIRST, HP, BLOCK)
                z_g = _bias_and_inputs(x, stride, weight, 2, H, K, PREPROCESSING, FIRST, HP, BLOCK)
                z_o = _bias_and_inputs(x, stride, weight, 3, H, K, PREPROCESSING, FIRST, HP, BLOCK)
                if FIRST:
                    operand, columns = state, weight + IN
                    operands = 1 + zero  # a loop all the same
                else:
                    operand, columns = state + (step_stride - 2 * H * stride), weight
                    operands = 2
                for _ in range(operands):
                    h = tl.load(operand + h_offsets, mask=tile, other=0.0).to(tl.float32)
                    z_i = dot(h, weight_tile(columns, 0, 0, H, H, K, unit, row), z_i, PRECISION)
                    z_f = dot(h, weight_tile(columns, 1, 0, H, H, K, unit, row), z_f, PRECISION)
                    z_g = dot(h, weight_tile(columns, 2, 0, H, H, K, unit, row), z_g, PRECISION)
                    z_o = dot(h, weight_tile(columns, 3, 0, H, H, K, unit, row), z_o, PRECISION)
                    operand = state
                    columns += H
                i, f, g, o = sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o)
            tanh_c = tanh(f * c + i * g)
            d_c += d_h * o * (1 - tanh_c * tanh_c)
            dz_i = d_c * g * i * (1 - i)  # [BLOCK, HP]
            dz_f = d_c * c * f * (1 - f)
            dz_g = d_c * i * (1 - g * g)
            dz_o = d_h * tanh_c * o * (1 - o)
            d_c *= f

            a_t = tl.trans(a)
            if GATES != "go":
                if K == KP:
                    db_i += dz_i
                    db_f += dz_f
                dw_i = dot(a_t, dz_i, dw_i, PRECISION)
                dw_f = dot(a_t, dz_f, dw_f, PRECISION)
            if GATES != "if":
                if K == KP:
                    db_g += dz_g
                    db_o += dz_o
                dw_g = dot(a_t, dz_g, dw_g, PRECISION)
                dw_o = dot(a_t, dz_o, dw_o, PRECISION)
            if RESIDENT:
                d_h = _product(dz_i, None, resident, "d_h", 0, PRECISION)
                d_h = _product(dz_f, d_h, resident, "d_h", 1, PRECISION)
                d_h = _product(dz_g, d_h, resident, "d_h", 2, PRECISION)
                d_h = _product(dz_o, d_h, resident, "d_h", 3, PRECISION)
                if not FIRST:
                    d_x = _product(dz_i, None, resident, "d_x", 0, PRECISION)
                    d_x = _product(dz_f, d_x, resident, "d_x", 1, PRECISION)
                    d_x = _product(dz_g, d_x, resident, "d_x", 2, PRECISION)
                    d_x = _product(dz_o, d_x, resident, "d_x", 3, PRECISION)
                    tl.store(d_input + t * (H * stride) + h_offsets, d_x, mask=tile)
            else:
                columns = weight + IN if FIRST else weight
                for operand_index in range(operands):
                    d_h = dot(dz_i, weight_tile(columns, 0, 0, H, H, K, row, unit), None, PRECISION)
                    d_h = dot(dz_f, weight_tile(columns, 1, 0, H, H, K, row, unit), d_h, PRECISION)
                    d_h = dot(dz_g, weight_tile(columns, 2, 0, H, H, K, row, unit), d_h, PRECISION)
                    d_h = dot(dz_o, weight_tile(columns, 3, 0, H, H, K, row, unit), d_h, PRECISION)
                    if not FIRST and operand_index == 0:
                        tl.store(d_input + t * (H * stride) + h_offsets, d_h, mask=tile)
                    columns += H
        tl.store(d_initial_state + h_offsets, d_h, mask=tile)
        tl.store(d_initial_state + c_offsets, d_c, mask=tile)

    partial = partials + tl.program_id(0).to(tl.int64) * P
    if GATES != "go":
        _store_gate(partial, dw_i, db_i, 0, H, K, HP, KP)
        _store_gate(partial, dw_f, db_f, 1, H, K, HP, KP)
    if GATES != "if":
        _store_gate(partial, dw_g, db_g, 2, H, K, HP, KP)
        _store_gate(partial, dw_o, db_o, 3, H, K, HP, KP)
    if TOP and GATES != "go":
        tl.store(partial + HEAD + unit, output_scale * tl.sum(dw_out, 0)[None, :], mask=unit < H)
        tl.store(partial + HEAD + H, output_scale * tl.sum(db_out, 0))


def bptt(
    inputs: Tensor,
    history: Tensor,
    d_updates: Tensor,
    d_final_state: Tensor | None,
    phi: Tensor,
    spec: LSTMSpec,
) -> tuple[Tensor, Tensor]:
    """Does what `reference.bptt` does.

    Beside its arguments it needs [T, H, N] floats for two layers, and twice as many for three.
    """
    states = {"history": history} | ({} if d_final_state is None else {"d_final_state": d_final_state})
    configs.check_dtypes({"inputs": inputs, "d_updates": d_updates, "phi": phi}, states)
    T, N = d_updates.shape
    L, H, P = spec.num_layers, spec.hidden_size, spec.num_parameters
    d_initial_state = torch.empty(history.shape[1:], dtype=phi.dtype, device=phi.device)
    if N == 0:
        return torch.zeros_like(phi), d_initial_state
    inputs, history, phi = inputs.contiguous(), history.contiguous(), phi.contiguous()
    d_final_state = None if d_final_state is None else d_final_state.contiguous()
    sizes = [4 * H * (spec.layer_inputs(layer) + H + 1) for layer in range(L)]
    starts = [sum(sizes[:layer]) for layer in range(L)]
    sizes[-1] = P - starts[-1]  # and the head
    d_phi = torch.empty_like(phi)
    d_above = d_updates.contiguous()
    family = configs.family(phi.device)
    for layer in reversed(range(L)):
        # A new buffer, not d_above itself, which other threads of the program may still be reading.
        d_input = torch.empty(T, H, N, dtype=phi.dtype, device=phi.device) if layer else d_above
        constants, options = configs.bptt_config(spec, layer, family)
        # Every program writes its own row: the sum's order, and so its rounding, depends on nothing else.
        programs = configs.num_programs(spec, layer, N, phi.device)
        partials = torch.empty(programs, sizes[layer], dtype=phi.dtype, device=phi.device)
        with torch.cuda.device_of(phi):
            for gates in ("all",) if constants["GATES"] == "all" else ("if", "go"):
                bptt_layer_bwd_kernel[(programs,)](
                    inputs,
                    history[0, layer],
                    d_above,
                    d_input,
                    None if d_final_state is None else d_final_state[layer],
                    d_initial_state[layer],
                    phi[starts[layer] :],
                    partials,
                    *(T, N, sizes[layer], 1.0 / spec.p, math.exp(spec.p), spec.output_scale, 0),
                    **constants | {"GATES": gates},
                    **options,
                )
        torch.sum(partials, 0, out=d_phi[starts[layer] :][: sizes[layer]])
        d_above = d_input
    return d_phi, d_initial_state
