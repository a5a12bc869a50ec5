"""Device functions that the forward and the backward kernels share.

Tiles are [BLOCK, units]: coordinates are the rows of a matrix product, though they are contiguous in memory.
Units are padded to HP, a power of two ≥ 16; the padding is masked, so it costs arithmetic but no bandwidth.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Computes 1 / (1 + e^-x), which saturates to 0 and 1 without a NaN.

    By way of the reciprocal square root of a square, two instructions: a division compiles to more, which
    scale huge denominators, and Triton 3.6 has no plain reciprocal.
    """
    d = 1.0 + tl.exp2(-1.4426950408889634 * x)
    return tl.rsqrt(d * d)


@triton.jit
def tanh(x):
    """Computes 2 σ(2x) - 1 to 1.2e-7 everywhere; (1 - e^-2x) / (1 + e^-2x) would be NaN below -44."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def preprocess(g, inverse_p, exp_p, PREPROCESSING: tl.constexpr):
    """Turns gradients [BLOCK] into the LSTM's two inputs [BLOCK]; the second of "identity" is not used.

    It compares, as tl.maximum would turn the NaN of a diverged optimizee into a number.
    """
    if PREPROCESSING == "log_sign":
        magnitude = tl.log(tl.abs(g)) * inverse_p
        sign = g * exp_p
        magnitude = tl.where(magnitude < -1.0, -1.0, magnitude)
        sign = tl.where(sign < -1.0, -1.0, tl.where(sign > 1.0, 1.0, sign))
        return magnitude, sign
    else:
        return g, g


@triton.jit
def feature_products(z, x, stride, weight, GATE: tl.constexpr, H: tl.constexpr, X: tl.constexpr, unit):
    """Adds W_x x of one gate to z [BLOCK, HP], in exact float32 multiply-adds.

    x[2] points to the first of X features, whose rows lie `stride` apart; x[3] says which are live.
    """
    row = (GATE * H + unit) * (X + H)
    for k in tl.static_range(X):
        feature = tl.load(x[2] + k * stride, mask=x[3], other=0.0)
        z += feature[:, None] * tl.load(weight + row + k, mask=unit < H, other=0.0)
    return z


@triton.jit
def _to_tf32(x):
    """Keeps the 10 leading bits of the mantissa: x minus this is exact."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Adds a @ b to acc in float32, the operands rounded as PRECISION says (configs.py).

    "tf32x3" is written out: Triton's own also guards infinite operands, which states and weights are not, and
    the guard is more instructions than the split.
    """
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "tf32x3":
        a_high, b_high = _to_tf32(a), _to_tf32(b)
        acc = tl.dot(a - a_high, b_high, acc, input_precision="tf32")
        acc = tl.dot(a_high, b - b_high, acc, input_precision="tf32")
        return tl.dot(a_high, b_high, acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def weight_tile(
    weight,
    GATE: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    unit,
    col,
):
    """Loads a gate's SIZE columns from START on of a layer's weight [4H, K]; unit and col span the tile.

    unit [HP, 1] with col [1, KP] gives the tile as dz multiplies it; [1, HP] with [KP, 1], as inputs do.
    """
    offsets = (GATE * H + unit) * K + START + col
    return tl.load(weight + offsets, mask=(unit < H) & (col < SIZE), other=0.0)


@triton.jit
def bias_row(weight, GATE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, unit):
    """Loads one gate's bias, which follows the layer's weight in φ, for unit [1, HP]."""
    return tl.load(weight + 4 * H * K + GATE * H + unit, mask=unit < H, other=0.0)
