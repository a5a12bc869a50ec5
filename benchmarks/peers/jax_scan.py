"""The JAX peer: the whole meta-step as one jitted call, float32. What is done for its speed:

- all coordinates are one flat vector, i.e. one LSTM batch;
- a custom_vjp on the optimizee: f(θ_t) and its detached gradient come from one backward pass, and the same
  gradient serves as df/dθ_t in the meta-backward, so the optimizee is never differentiated twice;
- the LSTM's state is stored [hidden, coordinates], so that gate slices are contiguous (the other layout, a
  chunked map over coordinates, and all gates through one tanh were slower);
- the scan saves only the LSTM's state per step and recomputes the gates in the backward pass;
- buffers are donated.
"""

import jax
import jax.numpy as jnp
import numpy as np
from harness import D_HID, D_IN, D_OUT, META_LR, OUTPUT_SCALE, P_THRESHOLD, PHI_SHAPES, SIZES, N, main
from jax import lax


def mlp_loss(theta, x, y):
    w1, b1, w2, b2 = jnp.split(theta, [SIZES[0], SIZES[0] + SIZES[1], N - D_OUT])
    h = jax.nn.sigmoid(x @ w1.reshape(D_IN, D_HID) + b1)
    logp = jax.nn.log_softmax(h @ w2.reshape(D_HID, D_OUT) + b2)
    return -jnp.mean(jnp.take_along_axis(logp, y[:, None], axis=1))


losses_of = jax.vmap(mlp_loss)  # [K, N], [K, B, 784], [K, B] -> [K]
values_and_grads = jax.vmap(jax.value_and_grad(mlp_loss))


@jax.custom_vjp
def losses_and_grads(theta, x, y):
    """f(θ) [K] and its gradient [K, N]; the gradient is detached."""
    return values_and_grads(theta, x, y)


def _forward(theta, x, y):
    losses, grads = values_and_grads(theta, x, y)
    return (losses, grads), grads


def _backward(grads, cotangents):
    return cotangents[0][:, None] * grads, None, None


losses_and_grads.defvjp(_forward, _backward)


def unpack(phi):
    sizes = [int(np.prod(shape)) for shape in PHI_SHAPES]
    parts = jnp.split(phi, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, PHI_SHAPES, strict=True)]


def preprocess(g):
    magnitude = jnp.abs(g)
    big = magnitude >= jnp.exp(-P_THRESHOLD)
    log_part = jnp.where(big, jnp.log(jnp.where(big, magnitude, 1.0)) / P_THRESHOLD, -1.0)
    return jnp.stack([log_part, jnp.where(big, jnp.sign(g), jnp.exp(P_THRESHOLD) * g)])


def lstm_cell(weight, bias, x, h, c):  # [., n] -> [H, n]
    i, f, g, o = jnp.split(weight @ jnp.concatenate([x, h]) + bias[:, None], 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


@jax.checkpoint
def update(phi, grad, state):
    w1, b1, w2, b2, head_weight, head_bias = phi
    h1, c1, h2, c2 = state
    h1, c1 = lstm_cell(w1, b1, preprocess(grad), h1, c1)
    h2, c2 = lstm_cell(w2, b2, h1, h2, c2)
    return OUTPUT_SCALE * (head_weight @ h2 + head_bias), (h1, c1, h2, c2)


def meta_loss(phi, theta, state, images, labels, indices):
    phi = unpack(phi)

    def body(carry, index):
        theta, state = carry
        losses, grads = losses_and_grads(theta, images[index], labels[index])
        delta, state = update(phi, grads.reshape(-1), state)
        return (theta + delta.reshape(theta.shape), state), losses.mean()

    (theta, state), losses = lax.scan(body, (theta, state), indices[:-1])
    last = losses_of(theta, images[indices[-1]], labels[indices[-1]]).mean()
    return losses.sum() + last, (theta, state)


def jitted(phi, adam, theta, state, images, labels, indices):
    (loss, (theta, state)), gradient = jax.value_and_grad(meta_loss, has_aux=True)(
        phi, theta, state, images, labels, indices
    )
    m, v, t = adam
    t = t + 1
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    phi = phi - META_LR * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return (phi, (m, v, t), theta, state), loss, gradient


def prepare(problem, options):
    platform = jax.default_backend()  # chosen by JAX_PLATFORMS
    assert platform in {"cpu": ["cpu"], "cuda": ["gpu", "cuda"]}[options.device], f"JAX runs on {platform}"
    step = jax.jit(jitted, donate_argnums=(0, 1, 2, 3))
    phi, theta, images = (jnp.asarray(problem[name]) for name in ("phi", "theta", "images"))
    labels = jnp.asarray(problem["labels"], jnp.int32)
    hidden = PHI_SHAPES[-2][0]
    state = tuple(jnp.zeros((hidden, theta.size), jnp.float32) for _ in range(4))
    carried = (phi, (jnp.zeros_like(phi), jnp.zeros_like(phi), jnp.zeros(())), theta, state)

    def meta_step(indices):
        nonlocal carried
        carried, loss, gradient = jax.block_until_ready(
            step(*carried, images, labels, jnp.asarray(indices, jnp.int32))
        )
        return float(loss), gradient

    return meta_step


if __name__ == "__main__":
    main("jax", prepare, lambda: jax.local_devices()[0].memory_stats()["peak_bytes_in_use"])
