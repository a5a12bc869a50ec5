"""The Triton kernels on a GPU, where matrix products round as configs.precisions says."""

import pytest
import torch
import triton_cases
from l2l_kernels import reference
from l2l_kernels import triton as backend
from l2l_kernels.triton import configs
from test_triton_interpreter import normalised_error
from triton_cases import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# Three TF32 products are float32 to within accumulation order; one has operands of 11 bits, bf16 of 8, and
# 20 steps multiply the error. The state's own tolerance is one unit of bfloat16.
TOLERANCE = {"tf32x3": 2e-5, "tf32": 1e-2, "bf16": 8e-2}
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


@pytest.mark.parametrize("precision", TOLERANCE, indirect=True)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_equals_the_reference(case, precision):
    actual = triton_cases.run(case, "cuda")
    x = triton_cases.Inputs(
        *(None if tensor is None else tensor.double() for tensor in triton_cases.inputs(case))
    )
    grad = x.grads[0] if case.T else torch.ones(case.N).double()
    theta, state = reference.step(x.theta, grad, x.state, x.phi, case.spec)
    d_phi, d_state = reference.bptt(x.grads, x.history, x.d_updates, x.d_final_state, x.phi, case.spec)
    tolerance = TOLERANCE[precision]
    state_tolerance = max(tolerance, 2**-7 if case.state_dtype == torch.bfloat16 else 0.0)
    assert normalised_error(actual["theta"].cpu(), theta) < tolerance
    assert normalised_error(actual["new_state"].cpu(), state) < state_tolerance
    assert normalised_error(actual["d_phi"].cpu(), d_phi) < tolerance
    assert normalised_error(actual["d_state"].cpu(), d_state) < tolerance
    assert actual["deterministic"]


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
