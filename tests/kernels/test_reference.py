"""The definition itself: the backward against autograd, the preprocessing against its published formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from l2l_kernels import LSTMSpec, reference

# Each preprocessing with each number of layers, outputs and final states in turn.
SPECS = [
    (LSTMSpec(1, 5, "log_sign", 4.0, 0.3, 1, "linear"), True),
    (LSTMSpec(1, 5, "identity", 4.0, 0.3, 1, "tanh"), False),
    (LSTMSpec(1, 5, "features", 4.0, 0.3, 32, "linear"), False),
    (LSTMSpec(2, 5, "log_sign", 4.0, 0.3, 1, "tanh"), False),
    (LSTMSpec(2, 5, "identity", 4.0, 0.3, 1, "linear"), True),
    (LSTMSpec(2, 5, "features", 4.0, 0.3, 2, "tanh"), True),
    (LSTMSpec(3, 5, "log_sign", 4.0, 0.3, 1, "linear"), True),
    (LSTMSpec(3, 5, "identity", 4.0, 0.3, 1, "linear"), False),
    (LSTMSpec(3, 5, "features", 4.0, 0.3, 7, "tanh"), False),
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
    """Andrychowicz et al. 2016, appendix A, word for word; of NaN, NaN."""
    if math.isnan(g):
        return g, g
    if abs(g) >= math.exp(-p):
        return math.log(abs(g)) / p, math.copysign(1.0, g)
    return -1.0, math.exp(p) * g


@given(g=st.floats(-1e30, 1e30), p=st.floats(1.0, 20.0))
def test_preprocess_is_the_published_formula(g, p):
    actual = reference.preprocess(torch.tensor([g], dtype=torch.float64), LSTMSpec(p=p))[:, 0]
    expected = torch.tensor(published_preprocessing(g, p), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preprocess_at_special_points(dtype):
    """The threshold e^-p belongs to the logarithm."""
    threshold = math.exp(-10)
    points = [0.0, threshold, -threshold, threshold / 2, 1.0, -math.exp(5), 1e-30, 1e30, math.inf, math.nan]
    grads = torch.tensor(points, dtype=dtype)
    expected = torch.tensor([published_preprocessing(g, 10.0) for g in points], dtype=dtype).T
    torch.testing.assert_close(reference.preprocess(grads, LSTMSpec(p=10.0)), expected, equal_nan=True)
    assert torch.equal(reference.preprocess(grads[:-1], LSTMSpec(preprocessing="identity")), grads[None, :-1])
