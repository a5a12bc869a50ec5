"""The fused step with a coordinate in every lane: float32 multiply-adds, and no matrix product.

Beside the tiles of step.py it pads no units, rounds no operands, and its threads share nothing, so that they
wait for nobody; but it issues a load for every weight, which R coordinates of a thread share. Devices without
matrix products of float32 have nothing else, and small cells would fill a tile to a quarter.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code=assignment

import triton
import triton.language as tl

from l2l_kernels.triton.cell import preprocess, sigmoid, tanh


@triton.jit
def _rows(pointer, n, live, stride, COUNT: tl.constexpr):
    """Loads COUNT rows of coordinates, a tuple of [BLOCK] in float32."""
    rows = ()
    for k in tl.static_range(COUNT):
        rows += (tl.load(pointer + k * stride + n, mask=live, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _gate(operand, h, weight, row, bias, IN: tl.constexpr, H: tl.constexpr):
    """Computes z = W [x; h] + b of one unit's gate, [BLOCK], from the row of W that begins at `weight`."""
    z = tl.load(bias) + tl.load(weight + row) * operand[0]
    for k in tl.static_range(1, IN):
        z += tl.load(weight + row + k) * operand[k]
    for k in tl.static_range(H):
        z += tl.load(weight + row + IN + k) * h[k]
    return z


@triton.jit
def _unit(j, state, new_state, weight, operand, h, n, live, stride, IN: tl.constexpr, H: tl.constexpr):
    """Computes unit j of a layer: writes its (h, c), and returns its h [BLOCK] in float32."""
    K: tl.constexpr = IN + H
    bias = weight + 4 * H * K
    i = sigmoid(_gate(operand, h, weight, j * K, bias + j, IN, H))
    f = sigmoid(_gate(operand, h, weight, (H + j) * K, bias + H + j, IN, H))
    g = tanh(_gate(operand, h, weight, (2 * H + j) * K, bias + 2 * H + j, IN, H))
    o = sigmoid(_gate(operand, h, weight, (3 * H + j) * K, bias + 3 * H + j, IN, H))
    offsets = tl.cast(j, tl.int64) * stride + n
    c = tl.load(state + H * stride + offsets, mask=live, other=0.0).to(tl.float32)
    c = i * g + c * f
    new = tanh(c) * o
    # new_state may be state: all of h is in registers by now, and c[n] goes where its own thread read it.
    tl.store(new_state + H * stride + offsets, c, mask=live)
    tl.store(new_state + offsets, new, mask=live)
    return new


@triton.jit
def _layer(state, new_state, weight, operand, n, live, stride, IN: tl.constexpr, H: tl.constexpr):
    """Runs one layer unit by unit: writes the new (h, c), and returns h, a tuple of [BLOCK].

    Written out for few units. More take long to compile and fill the instructions' cache: a loop runs them,
    in which only selections can put an h into its place in registers.
    """
    h = _rows(state, n, live, stride, H)
    if H <= 4:
        new = ()
        for j in tl.static_range(H):
            new += (_unit(j, state, new_state, weight, operand, h, n, live, stride, IN, H),)
        return new
    else:
        new = h
        for j in range(H):
            found = _unit(j, state, new_state, weight, operand, h, n, live, stride, IN, H)
            chosen = ()
            for k in tl.static_range(H):
                chosen += (tl.where(j == k, found, new[k]),)
            new = chosen
        return new


@triton.jit
def step_lanes_kernel(
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
    BLOCK: tl.constexpr,
):
    """Does what `step_fwd_kernel` does; a program has one block, and a lane BLOCK / (32 · warps) of it."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    theta += start
    inputs += start
    state += start
    new_state += start
    n = tl.arange(0, BLOCK)
    live = n < N - start
    stride = tl.cast(N, tl.int64)  # the rows of a state lie N apart: int32 offsets would overflow at 10⁸
    if PREPROCESSING == "features":
        operand = _rows(inputs, n, live, stride, X)
    else:
        operand = preprocess(tl.load(inputs + n, mask=live, other=0.0), inverse_p, exp_p, PREPROCESSING)
    h = _layer(state, new_state, phi, operand, n, live, stride, X, H)
    phi += 4 * H * (X + H + 1)
    for _ in tl.static_range(1, L):
        state += 2 * H * stride
        new_state += 2 * H * stride
        h = _layer(state, new_state, phi, h, n, live, stride, H, H)
        phi += 4 * H * (H + H + 1)
    output = tl.load(phi + H) + tl.load(phi) * h[0]
    for k in tl.static_range(1, H):
        output += tl.load(phi + k) * h[k]
    if TANH_OUTPUT:
        output = tanh(output)
    tl.store(theta + n, tl.load(theta + n, mask=live) + output_scale * output, mask=live)
