"""What the compiled CPU kernels do besides the backends' contract: instruction sets, threads, roundings."""

import itertools
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from l2l_kernels import LSTMSpec, cpu, reference
from l2l_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler")

# bfloat16 is of stored states: half a unit in the last place, and the error of what was rounded.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8 + 3e-5}


def relative_error(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def poisoned(*shape, dtype):
    """Memory in which whatever is read before it is written shows."""
    return torch.full(shape, torch.nan, dtype=dtype)


def problem(spec, T, N, dtype, seed=0):
    """φ, initial state, gradients over many orders of magnitude, cotangents."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    phi = normal(spec.num_parameters) / spec.hidden_size**0.5
    initial = 0.5 * normal(*spec.state_shape, N)
    grads = normal(T, N) * (4 * normal(T, N)).exp() * 1e-3
    if spec.preprocessing == "identity":  # no logarithm tames them; saturation has tests of its own
        grads.clamp_(-3, 3)
    return [tensor.to(dtype) for tensor in (phi, initial, grads, normal(T, N))]


def strided(tensor):
    """The same numbers, every other one of its storage; between them lies NaN."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


def rollout(step_, theta, initial, grads, phi, spec, new_history):
    """θ_T and the states s_0 … s_T."""
    new_history[0] = initial
    for t, grad in enumerate(grads):
        step_(theta, grad, new_history[t], new_history[t + 1], phi, spec)
    return theta, new_history


def check(spec, T, N, dtype, with_final_state, seed=0, state_dtype=None, layout=torch.clone):
    """A window of `step_` and its `bptt` against the reference, which is given the same stored states."""
    phi, initial, grads, d_updates = problem(spec, T, N, dtype, seed)
    state_dtype = state_dtype or dtype
    history = layout(poisoned(T + 1, *spec.state_shape, N, dtype=state_dtype))
    theta = layout(torch.zeros(N, dtype=dtype))
    theta, history = rollout(cpu.step_, theta, initial, layout(grads), layout(phi), spec, history)
    exact_phi, exact_grads, exact_d_updates = (tensor.double() for tensor in (phi, grads, d_updates))
    expected_theta, states = torch.zeros(N, dtype=torch.float64), [history[0].double()]
    path = torch.zeros_like(expected_theta)  # Σ |u_t|: where updates cancel, θ_T is no scale for its rounding
    for t, grad in enumerate(exact_grads):
        before = states[-1] if state_dtype == dtype else history[t].double()
        start = expected_theta
        expected_theta, expected = reference.step(start.clone(), grad, before, exact_phi, spec)
        path += (expected_theta - start).abs()
        states.append(expected)
    assert (theta - expected_theta).norm() < TOLERANCE[dtype] * path.norm()
    assert relative_error(history, torch.stack(states)) < TOLERANCE[state_dtype]
    d_final = torch.ones_like(initial) if with_final_state else None
    actual = cpu.bptt(layout(grads), history, layout(d_updates), d_final, layout(phi), spec)
    exact_d_final = None if d_final is None else d_final.double()
    expected = reference.bptt(exact_grads, history.double(), exact_d_updates, exact_d_final, exact_phi, spec)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < TOLERANCE[dtype]


SHAPES = [(1, 5), (2, 20), (2, 33), (3, 64)]
WINDOWS = [(1, 1, True), (20, 31, False), (2, 1023, True), (2, 5000, False)]


@pytest.mark.parametrize(("shape", "window"), list(itertools.product(range(4), range(4))))
def test_matches_the_reference(shape, window):
    """Every shape with every window; preprocessing and dtype so that each meets each of the others."""
    preprocessing = ("log_sign", "identity")[(shape + window) % 2]
    dtype = (torch.float32, torch.float64)[(shape // 2 + window) % 2]
    T, N, with_final_state = WINDOWS[window]
    check(LSTMSpec(*SHAPES[shape], preprocessing), T, N, dtype, with_final_state)


def test_updates_that_cancel_are_as_exact_as_others():
    """0.136 + 0.002 - 0.054 - 0.083 is 0.001, to the rounding of 0.136."""
    check(LSTMSpec(1, 19, "log_sign", p=1.0, output_scale=1.0), 4, 1, torch.float32, False, seed=19)


@settings(max_examples=60, deadline=None)
@given(
    spec=st.builds(
        LSTMSpec,
        num_layers=st.integers(1, 3),
        hidden_size=st.integers(1, 64),
        preprocessing=st.sampled_from(["log_sign", "identity"]),
        p=st.floats(1, 20),
        output_scale=st.floats(0.01, 10),
    ),
    T=st.integers(1, 4),
    N=st.integers(1, 600),
    with_final_state=st.booleans(),
    dtypes=st.sampled_from(
        [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
    ),
    layout=st.sampled_from([torch.clone, strided]),
    seed=st.integers(0, 2**32),
)
def test_matches_the_reference_at_random_shapes(spec, T, N, with_final_state, dtypes, layout, seed):
    dtype, state_dtype = dtypes
    check(spec, T, N, dtype, with_final_state, seed, state_dtype, layout)


def instruction_sets():
    """The compiler's names for what this machine can run besides its own, and kernels.cpp's."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    return [("x86-64", "SSE2"), *[("x86-64-v3", "AVX2")] * (" avx2 " in flags and " fma " in flags)]


@pytest.fixture
def fresh_library():
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.parametrize(("target", "name"), instruction_sets())
def test_every_instruction_set_gives_the_same(target, name, monkeypatch, fresh_library):
    monkeypatch.setenv(library.TARGET_VARIABLE, target)
    assert library.describe().startswith(name)
    for dtype in (torch.float32, torch.float64):
        check(LSTMSpec(2, 20), 3, 1100, dtype, with_final_state=True)
        check(LSTMSpec(3, 7, "identity"), 2, 37, dtype, with_final_state=False)


def test_a_target_that_the_compiler_does_not_know_is_quoted(monkeypatch, tmp_path, fresh_library):
    monkeypatch.setenv(library.TARGET_VARIABLE, "pdp-11")
    monkeypatch.setenv(library.CACHE_VARIABLE, str(tmp_path))
    with pytest.warns(UserWarning, match=r"(?s)the reference runs on the CPU.*pdp-11"):
        assert library.describe() == "not compiled: the reference runs"


SPEC = LSTMSpec(num_layers=2, hidden_size=20)


def test_bfloat16_states_are_widened_exactly_and_rounded_once():
    T, N = 3, 700
    phi, initial, grads, d_updates = problem(SPEC, T, N, torch.float32)
    history = poisoned(T + 1, *SPEC.state_shape, N, dtype=torch.bfloat16)
    theta, history = rollout(cpu.step_, torch.zeros(N), initial, grads, phi, SPEC, history)
    for t in range(T):
        _, expected = reference.step(
            theta.double(), grads[t].double(), history[t].double(), phi.double(), SPEC
        )
        # Half a unit in the last of bfloat16's eight bits.
        torch.testing.assert_close(history[t + 1].double(), expected, rtol=2**-8, atol=1e-6)
    actual = cpu.bptt(grads, history, d_updates, None, phi, SPEC)
    expected = reference.bptt(grads.double(), history.double(), d_updates.double(), None, phi.double(), SPEC)
    assert max(map(relative_error, actual, expected)) < TOLERANCE[torch.float32]


def test_bfloat16_rounds_to_even_and_keeps_nan_and_infinity():
    """One unit whose cell passes through: c' = σ(40) c exactly, in float32."""
    spec = LSTMSpec(num_layers=1, hidden_size=1, preprocessing="identity")
    phi = torch.zeros(spec.num_parameters)
    _, bias = spec.unpack(phi).layers[0]
    bias[1] = 40.0
    cells = torch.tensor([1.0, -3.5, 1e30, 1e-30, torch.inf, -torch.inf, torch.nan])
    state = torch.stack([torch.zeros_like(cells), cells]).view(1, 2, 1, -1).bfloat16()
    new_state = torch.empty_like(state)
    zeros = torch.zeros_like(cells)
    cpu.step_(zeros.clone(), zeros, state, new_state, phi, spec)
    torch.testing.assert_close(new_state[0, 1], state[0, 1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_floating_dtype_of_theta_and_state(dtype):
    for state_dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        check_dtypes(dtype, state_dtype)


def check_dtypes(dtype, state_dtype):
    phi, initial, grads, d_updates = problem(SPEC, 1, 50, dtype)
    state, new_state = initial.to(state_dtype), poisoned(*initial.shape, dtype=state_dtype)
    theta = torch.zeros(50)
    cpu.step_(theta, grads[0], state, new_state, phi, SPEC)
    expected_theta, expected = reference.step(torch.zeros(50), grads[0], state, phi, SPEC)
    torch.testing.assert_close(theta, expected_theta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new_state, expected, rtol=1e-2, atol=1e-4)
    history = torch.stack([state, new_state])
    actual = cpu.bptt(grads, history, d_updates, None, phi, SPEC)
    expected = reference.bptt(grads, history, d_updates, None, phi, SPEC)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_a_half_precision_phi_is_computed_with_in_float32():
    phi, initial, grads, d_updates = problem(SPEC, 2, 50, torch.float32)
    phi = phi.bfloat16()
    history = poisoned(3, *SPEC.state_shape, 50, dtype=torch.float32)
    theta, history = rollout(cpu.step_, torch.zeros(50), initial, grads, phi, SPEC, history)
    expected_history = torch.empty_like(history)
    expected_theta, expected_history = rollout(
        cpu.step_, torch.zeros(50), initial, grads, phi.float(), SPEC, expected_history
    )
    assert torch.equal(theta, expected_theta)
    assert torch.equal(history, expected_history)
    actual = cpu.bptt(grads, history, d_updates, None, phi, SPEC)
    expected = cpu.bptt(grads, history, d_updates, None, phi.float(), SPEC)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(actual, expected, strict=True))


def test_results_are_bit_identical_from_run_to_run_and_for_any_number_of_threads():
    T, N = 3, 70_000  # more than MAX_SLICES * MIN_SLICE, so that slices grow
    phi, initial, grads, d_updates = problem(SPEC, T, N, torch.float32)

    def run(threads):
        torch.set_num_threads(threads)
        history = torch.empty(T + 1, *SPEC.state_shape, N)
        theta, history = rollout(cpu.step_, torch.zeros(N), initial, grads, phi, SPEC, history)
        return theta, history, *cpu.bptt(grads, history, d_updates, None, phi, SPEC)

    before = torch.get_num_threads()
    try:
        runs = [run(threads) for threads in (1, 1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.slow
def test_a_history_of_more_than_two_to_the_31_elements():
    """Zeros that no one has written take no memory; what is not zero lies beyond the 2^31st element."""
    N, recent = 2048, 200
    T = 2**31 // (80 * N) + recent
    phi, *_ = problem(SPEC, 1, 1, torch.float32)
    grads, d_updates = torch.zeros(2, T, N)
    history = torch.zeros(T + 1, *SPEC.state_shape, N, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for tensor in (grads, d_updates, history):
        tensor[-recent // 2 :] = torch.randn(tensor[-recent // 2 :].shape, generator=generator)
    actual, _ = cpu.bptt(grads, history, d_updates, None, phi, SPEC)
    # Cotangents die out within the steps that the reference is given.
    expected, d_state = cpu.bptt(
        grads[-recent:], history[-recent - 1 :], d_updates[-recent:], None, phi, SPEC
    )
    assert d_state.abs().max() < 1e-6
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_saturated_gates(scale):
    """Pre-activations far beyond the exponential's limits."""
    N = 200
    phi, initial, grads, d_updates = problem(SPEC, 1, N, torch.float64)
    phi = scale * phi
    theta, new_state = torch.zeros(N, dtype=torch.float64), torch.empty_like(initial)
    cpu.step_(theta, grads[0], initial, new_state, phi, SPEC)
    expected_theta, expected = reference.step(torch.zeros_like(theta), grads[0], initial, phi, SPEC)
    torch.testing.assert_close(theta, expected_theta, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(new_state, expected, rtol=1e-11, atol=1e-12)
    history = torch.stack([initial, new_state])
    actual = cpu.bptt(grads, history, d_updates, None, phi, SPEC)
    expected = reference.bptt(grads, history, d_updates, None, phi, SPEC)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_gate_that_is_all_but_closed_keeps_its_digits():
    """sigmoid(-50) is 2e-22 and not merely small: a cotangent that passes it is as small."""
    phi, initial, grads, d_updates = problem(SPEC, 1, 70, torch.float32)
    for _, bias in SPEC.unpack(phi).layers:
        bias[20:40] = -50  # f
    history = torch.stack([initial, initial])
    _, d_initial = cpu.bptt(grads, history, d_updates, None, phi, SPEC)
    exact = [tensor.double() for tensor in (grads, history, d_updates)]
    _, expected = reference.bptt(*exact, None, phi.double(), SPEC)
    d_cell, expected = d_initial[:, 1], expected[:, 1]
    assert 0 < d_cell.abs().max() < 1e-15
    assert relative_error(d_cell, expected) < TOLERANCE[torch.float32]
