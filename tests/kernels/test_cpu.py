"""What the compiled CPU kernels do besides the backends' contract: instruction sets, threads, roundings."""

import functools
import platform
from pathlib import Path

import pytest
import torch
from backend_cases import (
    DIVERGED,
    NOMINAL_WIDE,
    ROUNDED,
    Case,
    NominalCase,
    inputs,
    run,
    run_diverged,
    run_nominal,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from l2l_kernels import BackendUnavailableError, LSTMSpec, cpu, reference
from l2l_kernels.cpu import library
from test_backend_contract import BACKENDS, assert_the_references, relative_error

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler")

SPEC = LSTMSpec(num_layers=2, hidden_size=20)
DTYPES = [("float64", "float64"), ("float32", "float32"), ("float32", "bfloat16")]


def assert_case(case):
    assert_the_references(BACKENDS["cpu"], case, run(case, "cpu"))


@pytest.fixture
def rounded():
    """Skips where the compiled kernels have no products of bfloat16."""
    if not set(library.ROUNDED_VARIANTS) <= set(library.variants(library.load())):
        pytest.skip(f"no AVX512_BF16, which rounded products need ({library.describe()})")


@settings(max_examples=60, deadline=None)
@given(
    num_layers=st.integers(1, 3),
    hidden_size=st.integers(1, 64),
    preprocessing=st.sampled_from(["log_sign", "identity"]),
    p=st.floats(1, 20),
    output_scale=st.floats(0.01, 10),
    T=st.integers(1, 4),
    N=st.integers(8, 600),  # of fewer, θ and u may cancel, and θ' be no scale for their rounding
    final=st.booleans(),
    dtypes=st.sampled_from(DTYPES),
    contiguous=st.booleans(),
)
def test_matches_the_reference_at_random_shapes(dtypes, **shape):
    dtype, state_dtype = (getattr(torch, name) for name in dtypes)
    assert_case(Case(**shape, dtype=dtype, state_dtype=state_dtype))


def instruction_sets():
    """The compiler's names for what this machine can run besides its own, and kernels.cpp's."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    return [("x86-64", "SSE2"), *[("x86-64-v3", "AVX2")] * (" avx2 " in flags and " fma " in flags)]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), instruction_sets())
def test_every_instruction_set_gives_the_same(target, name, monkeypatch):
    monkeypatch.setenv(library.TARGET_VARIABLE, target)
    monkeypatch.setattr(library, "load", functools.cache(library.load.__wrapped__))
    assert library.describe().startswith(name)
    for dtype in (torch.float32, torch.float64):
        assert_case(Case(2, 20, "log_sign", N=1100, T=3, dtype=dtype, state_dtype=dtype))
        assert_case(Case(3, 7, "identity", N=37, T=2, final=False, dtype=dtype, state_dtype=dtype))
    for case in NOMINAL_WIDE:
        for name, expected in run_nominal(case, "reference").items():
            torch.testing.assert_close(run_nominal(case, "cpu")[name], expected, rtol=2e-6, atol=2e-5)


def test_bfloat16_rounds_once_to_even_and_keeps_nan_and_infinity():
    """One unit whose cell passes through: c' = σ(40) c exactly, in float32; and half a unit for others."""
    spec = LSTMSpec(num_layers=1, hidden_size=1, preprocessing="identity")
    phi = torch.zeros(spec.num_parameters)
    _, bias = spec.unpack(phi).layers[0]
    bias[1] = 40.0
    cells = torch.tensor([1.0, -3.5, 1e30, 1e-30, torch.inf, -torch.inf, torch.nan])
    state = torch.stack([torch.zeros_like(cells), cells]).view(1, 2, 1, -1).bfloat16()
    new_state, zeros = torch.empty_like(state), torch.zeros_like(cells)
    cpu.step_(zeros.clone(), zeros, state, new_state, phi, spec)
    torch.testing.assert_close(new_state[0, 1], state[0, 1], rtol=0, atol=0, equal_nan=True)
    x = inputs(Case(2, 20, "log_sign", N=700, T=1, state_dtype=torch.bfloat16))
    new_state = torch.empty_like(x.state)
    cpu.step_(x.theta.clone(), x.inputs[0], x.state, new_state, x.phi, SPEC)
    exact = (x.theta.double(), x.inputs[0].double(), x.state.double(), x.phi.double())
    expected = reference.step(*exact, SPEC)[1]
    torch.testing.assert_close(new_state.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype_of_theta_and_state(dtype, state_dtype):
    x = inputs(Case(2, 20, "log_sign", N=50, T=1, final=False, dtype=dtype, state_dtype=state_dtype))
    theta, new_state = x.theta.float(), torch.full_like(x.state, torch.nan)
    expected_theta, expected = reference.step(theta.clone(), x.inputs[0], x.state, x.phi, SPEC)
    cpu.step_(theta, x.inputs[0], x.state, new_state, x.phi, SPEC)
    torch.testing.assert_close(theta, expected_theta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new_state, expected, rtol=1e-2, atol=1e-4)
    window = x.inputs, torch.stack([x.state, new_state]), x.d_updates, None, x.phi, SPEC
    torch.testing.assert_close(cpu.bptt(*window), reference.bptt(*window), rtol=1e-3, atol=1e-4)


def test_a_half_precision_phi_is_computed_with_in_float32():
    x = inputs(Case(2, 20, "log_sign", N=50, T=2))
    phi, results = x.phi.bfloat16(), []
    for given_phi in (phi, phi.float()):
        theta, new_state = x.theta.clone(), torch.full_like(x.state, torch.nan)
        cpu.step_(theta, x.inputs[0], x.state, new_state, given_phi, SPEC)
        gradients = cpu.bptt(x.inputs, x.history, x.d_updates, None, given_phi, SPEC)
        results.append([theta, new_state, *(gradient.bfloat16() for gradient in gradients)])
        assert all(gradient.dtype == given_phi.dtype for gradient in gradients)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_results_are_bit_identical_from_run_to_run_and_for_any_number_of_threads(precision, request):
    if precision:
        request.getfixturevalue("rounded")
    case = Case(2, 20, "log_sign", N=70_000, T=3, precision=precision)
    x, spec = inputs(case), case.spec  # more than MAX_SLICES * MIN_SLICE: slices grow

    def results(threads):
        torch.set_num_threads(threads)
        theta, new_state = x.theta.clone(), torch.empty_like(x.state)
        cpu.step_(theta, x.inputs[0], x.state, new_state, x.phi, spec)
        nominal = run_nominal(NominalCase(((300, 301), (5,), (40_000,))), "cpu")
        lstm = cpu.bptt(x.inputs, x.history, x.d_updates, None, x.phi, spec)
        return theta, new_state, *lstm, *nominal.values()

    before = torch.get_num_threads()
    try:
        first, *others = [results(threads) for threads in (1, 1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_a_history_of_more_than_two_to_the_31_elements():
    """Zeros that no one has written take no memory; what is not zero lies beyond the 2^31st element."""
    N, recent = 2048, 200
    T = 2**31 // (80 * N) + recent
    phi = inputs(Case(2, 20, "log_sign", N=1, T=1)).phi
    grads, d_updates = torch.zeros(2, T, N)
    history = torch.zeros(T + 1, *SPEC.state_shape, N, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for tensor in (grads, d_updates, history):
        tensor[-recent // 2 :] = torch.randn(tensor[-recent // 2 :].shape, generator=generator)
    actual, _ = cpu.bptt(grads, history, d_updates, None, phi, SPEC)
    # Cotangents die out within the steps that the reference is given.
    end = grads[-recent:], history[-recent - 1 :], d_updates[-recent:]
    expected, d_state = cpu.bptt(*end, None, phi, SPEC)
    assert d_state.abs().max() < 1e-6
    assert relative_error(actual, expected.double()) < 1e-5


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_saturated_gates(scale):
    """Pre-activations far beyond the exponential's limits."""
    x = inputs(Case(2, 20, "log_sign", N=200, T=1, dtype=torch.float64, state_dtype=torch.float64))
    phi, theta, new_state = scale * x.phi, x.theta.clone(), torch.empty_like(x.state)
    cpu.step_(theta, x.inputs[0], x.state, new_state, phi, SPEC)
    expected = reference.step(x.theta, x.inputs[0], x.state, phi, SPEC)
    torch.testing.assert_close((theta, new_state), expected, rtol=1e-11, atol=1e-12)
    window = x.inputs, torch.stack([x.state, new_state]), x.d_updates, None, phi, SPEC
    torch.testing.assert_close(cpu.bptt(*window), reference.bptt(*window), rtol=1e-9, atol=1e-9)


def test_a_gate_that_is_all_but_closed_keeps_its_digits():
    """sigmoid(-50) is 2e-22 and not merely small: a cotangent that passes it is as small."""
    x = inputs(Case(2, 20, "log_sign", N=70, T=1))
    for _, bias in SPEC.unpack(x.phi).layers:
        bias[20:40] = -50  # f
    window = x.inputs, x.history, x.d_updates
    d_cell = cpu.bptt(*window, None, x.phi, SPEC)[1][:, 1]
    exact = reference.bptt(*(tensor.double() for tensor in window), None, x.phi.double(), SPEC)[1]
    assert 0 < d_cell.abs().max() < 1e-15
    assert relative_error(d_cell, exact[:, 1]) < 3e-5


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_rounded_products_are_those_of_the_reference(case):
    assert_case(case)


@pytest.mark.usefixtures("rounded")
@settings(max_examples=40, deadline=None)
@given(
    num_layers=st.integers(1, 3),
    hidden_size=st.integers(1, 64),
    width=st.integers(1, 9),
    output=st.sampled_from(["linear", "tanh"]),
    N=st.integers(100, 600),
    T=st.integers(1, 4),
    final=st.booleans(),
    state_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rounded_products_at_random_shapes(**shape):
    """By the median error, as a search may find the one number beside a tie that is most of a norm."""
    case = Case(preprocessing="features", precision="bf16", **shape)
    assert_the_references(BACKENDS["cpu"]._replace(error=median_error), case, run(case, "cpu"))


def median_error(actual, expected):
    """The median of |a − b|, relative to b's root mean square."""
    return float((actual.double() - expected).abs().median() / expected.square().mean().sqrt())


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("units", [4, 8, 20])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_where_nothing_is_near_a_tie_rounded_products_are_exact_to_float32(units, width):
    """One layer's step rounds its arguments alone, which are the same numbers in float64."""
    case = Case(1, units, "features", N=131, T=1, width=width, precision="bf16")
    x, actual = inputs(case), run(case, "cpu")
    exact = (tensor.double() for tensor in (x.theta, x.inputs[0], x.state, x.phi))
    theta, state = reference.step(*exact, case.spec)
    assert relative_error(actual["theta"], theta) < 1e-6
    assert relative_error(actual["new_state"], state) < 1e-6


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("units", [4, 8, 20])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_what_rounding_products_costs_is_bounded_by_bfloat16s_roundoff(layers, units, width):
    """Two operands of a product err by 2^-8 each at most: a bound for every number of a step.

    sigmoid's slope is at most 1/4 and tanh's 1, and neither exceeds 1. Of a meta-gradient, whose every number
    is a sum of products, errors of either sign cancel: its norm errs by less than one product can.
    """
    case = Case(layers, units, "features", N=131, T=3, width=width, precision="bf16")
    exact_case = case._replace(precision=None)
    x, actual = inputs(case), run(case, "cpu")
    theta, features, state, phi = (t.double() for t in (x.theta, x.inputs[0], x.state, x.phi))
    expected_theta, expected = reference.step(theta, features, state, phi, exact_case.spec)
    weights = case.spec.unpack(phi)
    below, d_below = features, torch.zeros_like(features)
    for layer, (weight, _) in enumerate(weights.layers):
        old_h, old_c = state[layer]
        operand = torch.cat([below, old_h]).abs()
        d_operand = torch.cat([d_below, torch.zeros_like(old_h)])
        d_z = weight.abs() @ (2 * 2**-8 * 1.01 * (operand + d_operand) + d_operand)
        d_i, d_f, d_g, d_o = d_z.chunk(4)
        d_c = d_f / 4 * old_c.abs() + d_i / 4 + d_g
        d_h = d_o / 4 + d_c
        d_state = torch.stack([d_h, d_c])
        assert ((actual["new_state"][layer] - expected[layer]).abs() <= d_state + 1e-6).all()
        below, d_below = expected[layer, 0], d_h
    d_theta = case.output_scale * (weights.head_weight.abs() @ d_below)
    assert ((actual["theta"] - expected_theta).abs() <= d_theta + 1e-6).all()
    window = (t.double() for t in (x.inputs, x.history, x.d_updates, x.d_final_state, x.phi))
    d_phi, d_initial = reference.bptt(*window, exact_case.spec)
    for name, gradient in (("d_phi", d_phi), ("d_state", d_initial)):
        assert 1e-4 < relative_error(actual[name], gradient) < 2 * 2**-8


@pytest.mark.usefixtures("rounded")
def test_a_diverged_coordinate_leaves_rounded_products_of_others_alone():
    results = run_diverged("cpu", case=DIVERGED._replace(precision="bf16"))
    for what in ("theta", "state", "d_state"):
        assert torch.equal(results[f"diverged {what}"][..., 4:], results[f"finite {what}"][..., 4:])
        assert results[f"finite {what}"].isfinite().all()
        assert results[f"diverged {what}"][..., 2].isnan().any()


@pytest.mark.parametrize(("target", "name"), instruction_sets())
def test_rounded_products_are_refused_where_the_processor_has_none(target, name, monkeypatch):
    monkeypatch.setenv(library.TARGET_VARIABLE, target)
    monkeypatch.setattr(library, "load", functools.cache(library.load.__wrapped__))
    with pytest.raises(BackendUnavailableError, match=rf"precision='bf16' needs AVX512_BF16.*\({name}"):
        run(Case(2, 20, "log_sign", N=31, T=1, precision="bf16"), "cpu")


def test_rounded_products_of_float64_are_refused():
    case = Case(2, 20, "log_sign", N=31, T=1, dtype=torch.float64, precision="bf16")
    with pytest.raises(BackendUnavailableError, match="precision='bf16' is for φ in float32"):
        run(case, "cpu")
