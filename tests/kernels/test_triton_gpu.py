"""What the Triton kernels do on a GPU besides the backends' contract."""

import pytest
import torch
from l2l_kernels import LSTMSpec, reference
from l2l_kernels import triton as backend
from test_backend_contract import BACKENDS, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


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
    assert relative_error(theta[ends], expected[0].cpu()) < BACKENDS["GPU"].tolerances["tf32x3"]
    assert relative_error(state[..., ends], expected[1].cpu()) < BACKENDS["GPU"].bfloat16
