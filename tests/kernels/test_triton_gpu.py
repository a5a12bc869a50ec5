"""The Triton kernels on a GPU, where matrix products round as configs.precisions says."""

import pytest
import torch
import triton_cases
from l2l_kernels import LSTMSpec, reference
from l2l_kernels import triton as backend
from l2l_kernels.triton import configs
from triton_cases import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# ‖a − b‖ / ‖b‖ of the worst of θ, s_T, dφ and ds_0, as benchmarks/product_precision.py emulates it, times the
# allowance for other shapes, other orders of summation and the hardware's exp2 and rsqrt.
EMULATED = {"tf32x3": 7.2e-7, "tf32": 1.6e-3, "bf16": 2.6e-3}
ALLOWANCE = 8
BFLOAT16_STATE = 2**-8  # half a unit in the last place, the most that rounding to nearest is off
LARGE = [
    Case(2, 20, "log_sign", N=100_001, T=20),
    Case(1, 32, "identity", N=65_536, T=5),
    Case(3, 33, "log_sign", N=4_099, T=3),
    Case(2, 64, "log_sign", N=4_099, T=3),
]


@pytest.fixture
def precision(request, monkeypatch):
    monkeypatch.setattr(configs.precisions, "step", request.param)
    monkeypatch.setattr(configs.precisions, "bptt", request.param)
    return request.param


@pytest.fixture
def nan_filled_outputs():
    """torch.empty holds NaN: what a kernel does not write is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def relative_error(actual, expected):
    """‖a − b‖ / ‖b‖, 0 for tensors without elements."""
    assert actual.shape == expected.shape
    actual = actual.cpu().double()
    if torch.equal(actual, expected):
        return 0.0
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("nan_filled_outputs")
@pytest.mark.parametrize("precision", EMULATED, indirect=True)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_equals_the_reference(case, precision):
    actual = triton_cases.run(case, "cuda")
    x = triton_cases.Inputs(
        *(None if tensor is None else tensor.double() for tensor in triton_cases.inputs(case))
    )
    grad = x.grads[0] if case.T else torch.ones(case.N).double()
    theta, state = reference.step(x.theta, grad, x.state, x.phi, case.spec)
    d_phi, d_state = reference.bptt(x.grads, x.history, x.d_updates, x.d_final_state, x.phi, case.spec)
    tolerance = ALLOWANCE * EMULATED[precision]
    state_tolerance = tolerance + (BFLOAT16_STATE if case.state_dtype == torch.bfloat16 else 0.0)
    assert relative_error(actual["theta"], theta) < tolerance
    assert relative_error(actual["new_state"], state) < state_tolerance
    assert relative_error(actual["d_phi"], d_phi) < tolerance
    assert relative_error(actual["d_state"], d_state) < tolerance
    assert actual["deterministic"]


def test_two_runs_are_bit_identical():
    case = Case(2, 20, "log_sign", N=100_001, T=20)
    first, second = triton_cases.run(case, "cuda"), triton_cases.run(case, "cuda")
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_diverged_coordinate_stays_alone():
    case = triton_cases.DIVERGED
    x = triton_cases.Inputs(*(tensor.cuda() for tensor in triton_cases.inputs(case)))
    _, finite = backend.bptt(x.grads, x.history, x.d_updates, x.d_final_state, x.phi, case.spec)
    states = [torch.empty_like(x.state) for _ in range(2)]
    backend.step_(x.theta.clone(), x.grads[1], x.state, states[0], x.phi, case.spec)
    x.grads[1, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    _, diverged = backend.bptt(x.grads, x.history, x.d_updates, x.d_final_state, x.phi, case.spec)
    backend.step_(x.theta.clone(), x.grads[1], x.state, states[1], x.phi, case.spec)
    assert torch.equal(finite[..., 3:], diverged[..., 3:])
    assert torch.equal(states[0][..., 3:], states[1][..., 3:])
    assert diverged[..., 2].isnan().any()
    assert states[1][..., 2].isnan().any()


def test_offsets_beyond_32_bits():
    """80 N > 2^31 elements: the last coordinates' states lie where 32-bit offsets would wrap."""
    spec = LSTMSpec(num_layers=2, hidden_size=20)
    N = 2**31 // 80 + 1000
    needed = 80 * N * 2 + 12 * N  # the state in bfloat16, updated in place; θ, the gradient and some slack
    free, _ = torch.cuda.mem_get_info()
    if free < 1.1 * needed:
        pytest.skip(f"needs {1.1 * needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free")
    generator = torch.Generator("cuda").manual_seed(0)
    phi = 0.3 * torch.randn(spec.num_parameters, device="cuda", generator=generator)
    state = torch.zeros(*spec.state_shape, N, dtype=torch.bfloat16, device="cuda")
    theta, grad = torch.zeros(N, device="cuda"), torch.ones(N, device="cuda")
    ends = torch.cat([torch.arange(500), torch.arange(N - 500, N)]).cuda()
    grad[ends] = torch.randn(1000, device="cuda", generator=generator)
    state[..., ends] = torch.randn(*spec.state_shape, 1000, device="cuda", generator=generator).bfloat16()
    expected = reference.step(
        theta[ends].double(), grad[ends].double(), state[..., ends].double(), phi.double(), spec
    )
    backend.step_(theta, grad, state, state, phi, spec)
    assert relative_error(theta[ends], expected[0].cpu()) < ALLOWANCE * EMULATED["tf32x3"]
    assert relative_error(state[..., ends], expected[1].cpu()) < BFLOAT16_STATE


def test_a_step_can_be_captured_in_a_cuda_graph():
    case = Case(2, 20, "log_sign", N=1023, T=1, in_place=True)
    x = triton_cases.Inputs(*(tensor.cuda() for tensor in triton_cases.inputs(case)))
    theta, state = x.theta.clone(), x.state.clone()
    backend.step_(
        theta, x.grads[0], state, state, x.phi, case.spec
    )  # compiles: capture allows no compilation
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.step_(x.theta, x.grads[0], x.state, x.state, x.phi, case.spec)
    graph.replay()
    assert torch.equal(x.theta, theta)
    assert torch.equal(x.state, state)
