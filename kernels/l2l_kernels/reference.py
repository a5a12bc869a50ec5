"""The definition, in plain PyTorch: the coordinatewise LSTM's step and its backward, and the nominal step.

Read this first. Every fused implementation computes exactly these functions; the tests hold them to it.
Any device, any floating dtype; an LSTM's arithmetic is done in φ's dtype. Its shapes: N coordinates, T steps,
L layers, H hidden units, P parameters; states are [L, 2, H, N] (h then c, coordinates innermost).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2l_kernels.spec import Coefficients, LSTMSpec, SizeHead, Weights


class _ToBFloat16(torch.autograd.Function):
    """Rounds to bfloat16 and back; a derivative passes as it is, where a cast's would be rounded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def rounded(x: Tensor, spec: LSTMSpec) -> Tensor:
    """Returns an operand of a product with a layer's weight, rounded as the spec's precision says.

    Example:
        >>> x = torch.tensor([1.0, 1.001, 1.006])
        >>> rounded(x, LSTMSpec(precision="bf16")), rounded(x, LSTMSpec()) is x
        (tensor([1.0000, 1.0000, 1.0078]), True)
    """
    if spec.precision is None:
        return x
    result: Tensor = _ToBFloat16.apply(x)
    return result


def preprocess(inputs: Tensor, spec: LSTMSpec) -> Tensor:
    """Turns gradients [N], or features [width, N], into what the LSTM reads, [num_inputs, N].

    "log_sign": (max(log|g| / p, -1), clamp(e^p g, -1, 1)): above |g| = e^{-p} this is (log|g| / p, sign g),
    below it (-1, e^p g). Source: Andrychowicz et al. 2016, appendix A.
    """
    if spec.preprocessing == "features":
        return inputs
    if spec.preprocessing == "identity":
        return inputs[None]
    # Clamped before the logarithm, whose derivative at a gradient of zero would make second orders NaN.
    magnitude = inputs.abs().clamp(min=math.exp(-spec.p)).log() / spec.p
    sign = (inputs * math.exp(spec.p)).clamp(-1.0, 1.0)
    return torch.stack([magnitude, sign])


def lstm_cell(
    weight: Tensor, bias: Tensor, x: Tensor, h: Tensor, c: Tensor, spec: LSTMSpec
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Computes one layer's new h and c and its activated gates (i, f, g, o), each [H, N].

    Args:
        weight: W, [4H, K + H], K the layer's inputs.
        bias: b, [4H].
        x: The layer's inputs, [K, N].
        h: Its output at the step before, [H, N].
        c: Its cell at the step before, [H, N].
        spec: Says how the product's operands are rounded.
    """
    z = rounded(weight, spec) @ rounded(torch.cat([x, h]), spec) + bias[:, None]  # [4H, N]
    i, f, g, o = z.chunk(4)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, (i, f, g, o)


def head(weights: Weights, h: Tensor, spec: LSTMSpec) -> Tensor:
    """Computes out(w_out · h + b_out) [N] of the top layer's h [H, N]."""
    output = weights.head_weight @ h + weights.head_bias
    return output.tanh() if spec.output == "tanh" else output


def step(theta: Tensor, inputs: Tensor, state: Tensor, phi: Tensor, spec: LSTMSpec) -> tuple[Tensor, Tensor]:
    """Updates every coordinate: returns θ + u_t [N] and s_{t+1} [L, 2, H, N], differentiable in every tensor.

    Args:
        theta: θ, [N].
        inputs: ∇f(θ), [N], or features, [width, N] (see LSTMSpec).
        state: s_t, [L, 2, H, N].
        phi: φ, [P].
        spec: The LSTM's shape and constants.

    Example:
        >>> spec = LSTMSpec(num_layers=1, hidden_size=4)
        >>> phi, state = torch.zeros(spec.num_parameters), torch.zeros(*spec.state_shape, 3)
        >>> theta, state = step(torch.ones(3), torch.ones(3), state, phi, spec)
        >>> theta
        tensor([1., 1., 1.])
    """
    weights = spec.unpack(phi)
    x = preprocess(inputs.to(phi.dtype), spec)
    new_state = []
    for (weight, bias), layer_state in zip(weights.layers, state.to(phi.dtype), strict=True):
        h, c, _ = lstm_cell(weight, bias, x, layer_state[0], layer_state[1], spec)
        new_state.append(torch.stack([h, c]))
        x = h
    update = spec.output_scale * head(weights, x, spec)
    return theta + update.to(theta.dtype), torch.stack(new_state).to(state.dtype)


def step_(
    theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor, phi: Tensor, spec: LSTMSpec
) -> None:
    """Does `step` in place, as the backends do: θ [N] += u_t, and new_state [L, 2, H, N] becomes s_{t+1}."""
    new_theta, updated = step(theta, inputs, state, phi, spec)
    theta.copy_(new_theta)
    new_state.copy_(updated)


def bptt(
    inputs: Tensor,
    history: Tensor,
    d_updates: Tensor,
    d_final_state: Tensor | None,
    phi: Tensor,
    spec: LSTMSpec,
) -> tuple[Tensor, Tensor]:
    """Runs backward through a window: the gradient of Σ_t ⟨d_updates_t, u_t⟩ + ⟨d_final_state, s_T⟩.

    Gates are recomputed from the stored states, and inputs are constants (first-order meta-gradient).

    Args:
        inputs: Gradients g_t, [T, N], or features, [T, width, N].
        history: s_0 … s_T, [T+1, L, 2, H, N].
        d_updates: Cotangents of u_t, [T, N].
        d_final_state: Cotangent of s_T, [L, 2, H, N]; None is zero.
        phi: φ, [P].
        spec: The LSTM's shape.

    Returns:
        The derivatives in φ [P] and in s_0 [L, 2, H, N], in φ's dtype.
    """
    dtype, T, L, H = phi.dtype, inputs.shape[0], spec.num_layers, spec.hidden_size
    weights = spec.unpack(phi)
    d_phi = torch.zeros_like(phi)
    d_weights = spec.unpack(d_phi)  # views: accumulating into them fills d_phi
    d_state = torch.zeros_like(history[0], dtype=dtype)
    if d_final_state is not None:
        d_state.copy_(d_final_state)
    for t in reversed(range(T)):
        before, after = history[t].to(dtype), history[t + 1].to(dtype)
        d_out = spec.output_scale * d_updates[t].to(dtype)  # [N]
        if spec.output == "tanh":
            d_out = d_out * (1 - head(weights, after[-1, 0], spec).square())
        d_weights.head_weight.add_(after[-1, 0] @ d_out)
        d_weights.head_bias.add_(d_out.sum())
        d_from_above = weights.head_weight[:, None] * d_out
        for layer in reversed(range(L)):
            weight, bias = weights.layers[layer]
            x = preprocess(inputs[t].to(dtype), spec) if layer == 0 else after[layer - 1, 0]
            h, c = before[layer]
            _, c_new, (i, f, g, o) = lstm_cell(weight, bias, x, h, c, spec)
            tanh_c = c_new.tanh()
            d_h = d_state[layer, 0] + d_from_above
            d_c = d_state[layer, 1] + d_h * o * (1 - tanh_c * tanh_c)
            d_z = torch.cat(
                [
                    d_c * g * i * (1 - i),
                    d_c * c * f * (1 - f),
                    d_c * i * (1 - g * g),
                    d_h * tanh_c * o * (1 - o),
                ]
            )  # [4H, N]
            d_z = rounded(d_z, spec)
            d_weight, d_bias = d_weights.layers[layer]
            d_weight.add_(d_z @ rounded(torch.cat([x, h]), spec).T)
            d_bias.add_(d_z.sum(1))
            d_input = rounded(weight, spec).T @ d_z  # [K, N]
            d_state[layer, 0] = d_input[-H:]
            d_state[layer, 1] = d_c * f
            d_from_above = d_input[:-H]
    return d_phi, d_state


def means_of(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns m, m₂ and v, [N] each, of statistics [3, N], or of [2, N] where m and m₂ share a word.

    A word of float32 has m's bfloat16 in its upper half and m₂'s in its lower; one of float64 two float32.

    Example:
        >>> statistics = torch.zeros(2, 1)
        >>> m, m2 = update_means(statistics, torch.tensor([1.001]), torch.tensor([-2.0]), torch.tensor([0.1]))
        >>> [round(mean.item(), 4) for mean in means_of(statistics)]
        [1.0, -2.0, 0.1]
    """
    if len(statistics) == 3:
        fast, slow, square = statistics.unbind()
        return fast, slow, square
    words, square = statistics.unbind()
    if words.dtype == torch.float64:
        bits = words.view(torch.int64)
        halves = [(bits >> 32).to(torch.int32), bits.to(torch.int32)]
        fast, slow = (half.view(torch.float32).double() for half in halves)
    else:
        bits = words.view(torch.int32)
        fast, slow = (bits & -65536).view(torch.float32), (bits << 16).view(torch.float32)
    return fast, slow, square


def update_means(statistics: Tensor, fast: Tensor, slow: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Writes m, m₂ and v [N] into statistics as `means_of` reads them; returns m and m₂ as they are there."""
    if len(statistics) == 3:
        statistics.copy_(torch.stack([fast, slow, square]))
        return fast, slow
    if statistics.dtype == torch.float64:
        high, low = (mean.to(torch.float32).view(torch.int32).to(torch.int64) for mean in (fast, slow))
        words = ((high << 32) | (low & 0xFFFFFFFF)).view(torch.float64)
    else:
        high, low = (mean.to(torch.bfloat16).view(torch.int16).to(torch.int32) for mean in (fast, slow))
        words = ((high << 16) | (low & 0xFFFF)).view(torch.float32)
    # As whole numbers: a word is no number, and need not survive what numbers do.
    statistics[0].view(high.dtype).copy_(words.view(high.dtype))
    statistics[1] = square
    fast, slow, _ = means_of(statistics)
    return fast, slow


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
    """Updates running means of gradients, and moves tensors along a direction of them: see `nominal.py`."""
    w_fast, w_slow, w_square, fast, gradient, slow, square, shrink = coefficients
    for target, grad, offset, (size, decay), moved in zip(targets, grads, offsets, sizes, moves, strict=True):
        g = grad.reshape(-1).to(statistics.dtype)
        if maximize:
            g = -g
        own = statistics[:, offset : offset + g.numel()]
        m, m2, v = means_of(own)
        m, m2 = update_means(own, m.lerp(g, w_fast), m2.lerp(g, w_slow), v.lerp(g * g, w_square))
        v = own[-1]
        mean_square = square * v
        inverse = mean_square.clamp(min=torch.finfo(g.dtype).tiny).rsqrt()
        inverse = torch.where(mean_square > 0, inverse, 0.0)
        new = inverse * (fast * m + gradient * g + slow * m2)
        if moved:
            theta = target.reshape(-1).to(g.dtype)
            new = theta - torch.where(inverse > 0, shrink + decay, shrink) * theta - size * new
        target.copy_(new.view(target.shape))
    return nominal_sums(statistics, offsets, [target.numel() for target in targets])


def nominal_sums(statistics: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Returns Σ m², Σ m₂² and Σ v of each tensor, [tensors, 3], in float64 where the device has it."""
    wide = statistics.dtype if statistics.device.type == "mps" else torch.float64
    parts = [means_of(statistics[:, start : start + n]) for start, n in zip(offsets, sizes, strict=True)]
    rows = [
        torch.stack([m.to(wide).square().sum(), m2.to(wide).square().sum(), v.to(wide).sum()])
        for m, m2, v in parts
    ]
    return torch.stack(rows) if rows else statistics.new_zeros(0, 3, dtype=wide)


def nominal_sizes(sums: Tensor, log_sizes: Tensor, decays: Tensor, head: SizeHead) -> Tensor:
    """Returns η and λ of each tensor, [tensors, 2], in the dtype of log_sizes: see `nominal.py`."""
    fast, slow, square = sums.log().unbind(1)
    known = square.abs() < math.inf
    fast, slow = (
        torch.where(known, (signal - square + correction).clamp(head.low, head.high), 0.0)
        for signal, correction in ((fast, head.of_counts_fast), (slow, head.of_counts_slow))
    )
    log_size = log_sizes + head.of_fast * fast + head.of_slow * slow
    size = log_size.clamp(max=head.limit).exp() * head.scale
    decay = (size * decays * (head.of_decay * fast).exp()).clamp(max=head.most_decay)
    return torch.stack([size, decay], 1).to(log_sizes.dtype)
