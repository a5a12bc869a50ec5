"""The definition itself: the backward against autograd, the preprocessing against its published formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from l2l_kernels import LSTMSpec, reference

# Each preprocessing with each number of layers, outputs and final states in turn.
SPECS = [
    (LSTMSpec(layers, 5, preprocessing, 4.0, 0.3, width, output), final)
    for layers, preprocessing, width, output, final in [
        (1, "log_sign", 1, "linear", True),
        (1, "identity", 1, "tanh", False),
        (1, "features", 32, "linear", False),
        (2, "log_sign", 1, "tanh", False),
        (2, "identity", 1, "linear", True),
        (2, "features", 2, "tanh", True),
        (3, "log_sign", 1, "linear", True),
        (3, "identity", 1, "linear", False),
        (3, "features", 7, "tanh", False),
    ]
]


@pytest.mark.parametrize(("spec", "from_final_state"), SPECS)
def test_bptt_is_autograd_through_the_unrolled_steps(spec, from_final_state):
    torch.manual_seed(spec.num_layers)
    T, N = 6, 7
    phi = torch.randn(spec.num_parameters, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(*spec.state_shape, N, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(T, *spec.input_shape(N), dtype=torch.float64)
    d_updates = torch.randn(T, N, dtype=torch.float64)
    d_final = torch.randn_like(initial) if from_final_state else None

    theta, state, objective, states = torch.zeros(N, dtype=torch.float64), initial, 0.0, [initial]
    for t in range(T):
        new_theta, state = reference.step(theta, inputs[t], state, phi, spec)
        objective = objective + (d_updates[t] * (new_theta - theta)).sum()
        theta = new_theta
        states.append(state)
    if d_final is not None:
        objective = objective + (d_final * state).sum()
    expected = torch.autograd.grad(objective, (phi, initial))

    history = torch.stack(states).detach()
    actual = reference.bptt(inputs, history, d_updates, d_final, phi.detach(), spec)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_step_is_torchs_lstm_cell():
    """Gate order, biases and layers as torch.nn.LSTMCell's."""
    torch.manual_seed(0)
    spec = LSTMSpec(num_layers=2, hidden_size=4, output_scale=0.5)
    N = 9
    phi = torch.randn(spec.num_parameters, dtype=torch.float64)
    weights = spec.unpack(phi)
    grad, theta = torch.randn(2, N, dtype=torch.float64)
    state = torch.randn(*spec.state_shape, N, dtype=torch.float64)
    new_theta, new_state = reference.step(theta, grad, state, phi, spec)

    x = reference.preprocess(grad, spec).T
    for layer, (weight, bias) in enumerate(weights.layers):
        inputs = spec.layer_inputs(layer)
        cell = torch.nn.LSTMCell(inputs, 4, dtype=torch.float64)
        with torch.no_grad():
            cell.weight_ih.copy_(weight[:, :inputs])
            cell.weight_hh.copy_(weight[:, inputs:])
            cell.bias_ih.copy_(bias)
            cell.bias_hh.zero_()
            h, c = cell(x, (state[layer, 0].T, state[layer, 1].T))
        torch.testing.assert_close(new_state[layer], torch.stack([h.T, c.T]))
        x = h
    torch.testing.assert_close(new_theta, theta + 0.5 * (x @ weights.head_weight + weights.head_bias))


def test_features_are_read_as_they_are_and_a_tanh_bounds_the_update():
    """The features that log_sign would have made give the same update; out is the textbook's tanh."""
    torch.manual_seed(0)
    spec = LSTMSpec(1, 4, "log_sign", output_scale=0.5)
    grad, state = torch.randn(6).double(), torch.randn(*spec.state_shape, 6).double()
    phi, zeros = torch.randn(spec.num_parameters).double(), torch.zeros(6).double()
    update, new_state = reference.step(zeros, grad, state, phi, spec)
    fed = LSTMSpec(1, 4, "features", output_scale=0.5, width=2, output="tanh")
    features = reference.preprocess(grad, spec)
    bounded, same_state = reference.step(zeros, features, state, phi, fed)
    assert torch.equal(same_state, new_state)
    for linear, tanh in zip(update, bounded, strict=True):
        assert tanh == pytest.approx(0.5 * math.tanh(linear / 0.5), rel=1e-14)


def published_preprocessing(g: float, p: float) -> tuple[float, float]:
    """Andrychowicz et al. 2016, appendix A, word for word."""
    if abs(g) >= math.exp(-p):
        return math.log(abs(g)) / p, math.copysign(1.0, g)
    return -1.0, math.exp(p) * g


@given(g=st.floats(-1e30, 1e30), p=st.floats(1.0, 20.0))
def test_preprocess_is_the_published_formula(g, p):
    actual = reference.preprocess(torch.tensor([g], dtype=torch.float64), LSTMSpec(p=p))[:, 0]
    expected = torch.tensor(published_preprocessing(g, p), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_preprocess_at_special_points():
    points = [
        (0.0, (-1.0, 0.0)),
        (math.exp(-10), (-1.0, 1.0)),
        (-math.exp(-10), (-1.0, -1.0)),
        (0.5 * math.exp(-10), (-1.0, 0.5)),
        (1.0, (0.0, 1.0)),
        (-math.exp(5), (0.5, -1.0)),
        (1e-30, (-1.0, 1e-30 * math.exp(10))),
        (1e30, (math.log(1e30) / 10, 1.0)),
        (math.inf, (math.inf, 1.0)),
        (math.nan, (math.nan, math.nan)),
    ]
    for dtype in (torch.float32, torch.float64):
        grads, expected = (torch.tensor(column, dtype=dtype) for column in zip(*points, strict=True))
        actual = reference.preprocess(grads, LSTMSpec(p=10.0)).T
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_identity_passes_gradients_through_and_states_keep_their_dtype():
    grad = torch.randn(5)
    assert torch.equal(reference.preprocess(grad, LSTMSpec(preprocessing="identity")), grad[None])
    spec = LSTMSpec(num_layers=1, hidden_size=3)
    phi = torch.randn(spec.num_parameters, dtype=torch.float64)
    state = torch.zeros(*spec.state_shape, 4, dtype=torch.bfloat16)
    theta, state = reference.step(torch.zeros(4), torch.randn(4), state, phi, spec)
    assert (theta.dtype, state.dtype) == (torch.float32, torch.bfloat16)
