"""The operators' contract with PyTorch: registration, autograd, errors, and the choice of a backend."""

import os
import subprocess
import sys
import warnings

import l2l_kernels
import pytest
import torch
from l2l_kernels import BACKEND_VARIABLE, BackendUnavailableError, LSTMSpec, backends
from l2l_kernels.ops import _constants
from torch import library as operators

SPEC = LSTMSpec(num_layers=2, hidden_size=4, p=4.0)
T, N = 3, 6


def tensors(dtype=torch.float64, requires_grad=False):
    """theta, grad, state, phi."""
    torch.manual_seed(0)
    phi = torch.randn(SPEC.num_parameters, dtype=dtype)
    theta, grad = torch.randn(2, N, dtype=dtype)
    state = torch.randn(*SPEC.state_shape, N, dtype=dtype)
    for tensor in (phi, theta, state):
        tensor.requires_grad_(requires_grad)
    return theta.detach().requires_grad_(requires_grad), grad, state, phi


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_operators_are_registered_as_pytorch_wants_them(backend):
    theta, grad, state, phi = tensors()
    constants = _constants(SPEC, backend)
    registered = torch.ops.l2l_kernels
    operators.opcheck(
        registered.step_.default, (theta, grad, state, torch.empty_like(state), phi, *constants)
    )
    operators.opcheck(registered.step.default, (*tensors(requires_grad=True), *constants))
    history = torch.randn(T + 1, *SPEC.state_shape, N, dtype=phi.dtype)
    for d_final in (None, torch.randn_like(history[0])):
        grads, d_updates = torch.randn(2, T, N, dtype=phi.dtype)
        operators.opcheck(registered.bptt.default, (grads, history, d_updates, d_final, phi, *constants))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_differentiable_step_is_the_one_in_place_and_its_gradient_is_right(backend):
    theta, grad, state, phi = tensors(requires_grad=True)

    def step(theta, state, phi):
        return l2l_kernels.step(theta, grad, state, phi, SPEC, backend)

    assert torch.autograd.gradcheck(step, (theta, state, phi))
    expected_theta, expected_state = step(theta, state, phi)
    theta, grad, state, phi = tensors()
    new_state = torch.empty_like(state)
    l2l_kernels.step_(theta, grad, state, new_state, phi, SPEC, backend)
    assert torch.equal(theta, expected_theta)
    assert torch.equal(new_state, expected_state)


def test_inputs_that_require_grad_are_refused():
    theta, grad, state, phi = tensors()
    with pytest.raises(RuntimeError, match="inputs as constants: pass them detached"):
        l2l_kernels.step(theta, grad.requires_grad_(), state, phi, SPEC)


def test_a_spec_out_of_range_is_refused_by_name():
    for arguments in (
        {"num_layers": 4},
        {"hidden_size": 65},
        {"preprocessing": "none"},
        {"p": 0.0},
        {"output_scale": 0.0},
        {"width": 0, "preprocessing": "features"},
        {"width": 33, "preprocessing": "features"},
        {"width": 2},
        {"output": "relu"},
        {"precision": "tf32"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            LSTMSpec(**arguments)
    good = [2, 20, 0, 1, 0, 0]
    for lists in ((good[:-1], [10.0, 0.1]), ([2, 20, 3, 1, 0, 0], [10.0, 0.1]), (good, [10.0])):
        with pytest.raises(ValueError, match="no LSTMSpec has the fields"):
            LSTMSpec.from_lists(*lists)


def test_a_backend_is_chosen_by_device_by_the_variable_and_by_the_argument(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    own = {"cpu": "cpu", "cuda": "triton", "mps": "reference"}
    assert {device: backends.choose(torch.device(device)) for device in own} == own
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert backends.choose(torch.device("cpu")) == "reference"
    assert backends.choose(torch.device("cpu"), "cpu") == "cpu"


def test_a_backend_that_is_unknown_or_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="'triton' cannot run on cpu: "):
        l2l_kernels.step(*tensors(), SPEC, backend="triton")
    with pytest.raises(BackendUnavailableError, match="must be on the CPU"):
        backends.choose(torch.device("cuda"), "cpu")
    monkeypatch.setenv(BACKEND_VARIABLE, "fast")
    with pytest.raises(BackendUnavailableError, match="'fast': choose one of triton, cpu, reference"):
        l2l_kernels.step(*tensors(), SPEC)


@pytest.mark.parametrize(
    ("capability", "own"), [((7, 5), "reference"), ((8, 0), "triton"), ((12, 0), "triton")]
)
def test_a_gpu_without_tf32_takes_the_reference_with_one_warning(capability, own, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends._own.cache_clear()
    device = torch.device("cuda", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [backends.choose(device) for _ in range(3)] == [own] * 3
    backends._own.cache_clear()
    if own == "triton":
        assert caught == []
        return
    (warning,) = caught
    assert "8.0, which is 7.5" in str(warning.message)
    assert f"{BACKEND_VARIABLE}=reference" in str(warning.message)
    with pytest.raises(BackendUnavailableError, match=r"'triton' cannot run on cuda:0.*7\.5"):
        backends.choose(device, "triton")


def test_without_a_compiler_the_reference_runs_and_one_warning_says_so(tmp_path):
    program = """
import torch, l2l_kernels
spec = l2l_kernels.LSTMSpec(num_layers=1, hidden_size=2)
phi, state = torch.randn(spec.num_parameters), torch.zeros(*spec.state_shape, 3)
args = torch.zeros(3), torch.randn(3), state, phi, spec
for _ in range(2):
    fallback = l2l_kernels.step(*args)
assert all(map(torch.equal, fallback, l2l_kernels.step(*args, backend="reference")))
"""
    environment = {**os.environ, "PATH": "", "CXX": "", BACKEND_VARIABLE: "cpu"}
    environment["L2L_KERNELS_CACHE"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no C++ compiler was found") == 1
