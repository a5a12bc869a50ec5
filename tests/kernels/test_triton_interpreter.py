"""The Triton kernels' arithmetic against the float64 reference, in Triton's interpreter: no GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_cases
from l2l_kernels import LSTMSpec, reference
from l2l_kernels import triton as backend
from triton_cases import CASES, EXTREME_GRADIENTS, Case, random_cases

pytestmark = pytest.mark.slow

ALL_CASES = CASES + random_cases()

# The interpreter multiplies in float32. One rounding is 6e-8; the longest chains here (20 steps, sums of 129
# products) reach 1e-6 of the largest element in `step` and 6e-7 in `bptt`. A wrong term is 1e-2 or more.
TOLERANCE = 4e-6
BFLOAT16_TOLERANCE = 2**-7  # one unit in the last place: the interpreter truncates, where GPUs round


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, Path(triton_cases.__file__), path], env=environment, check=True)
    return torch.load(path)


def result(results, name):
    if isinstance(results[name], str):
        pytest.fail(results[name])
    return results[name]


def normalised_error(actual, expected):
    """max|a - b| / max|b|, 0 for tensors without elements."""
    assert actual.shape == expected.shape
    if expected.numel() == 0 or torch.equal(actual.double(), expected.double()):
        return 0.0
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_step_equals_the_reference(case: Case, results):
    actual, x = result(results, str(case)), triton_cases.inputs(case)
    grad = x.grads[0] if case.T else torch.ones(case.N)
    theta, state = reference.step(
        x.theta.double(), grad.double(), x.state.double(), x.phi.double(), case.spec
    )
    assert actual["new_state"].dtype == case.state_dtype
    assert normalised_error(actual["theta"], theta) < TOLERANCE
    tolerance = TOLERANCE if case.state_dtype == torch.float32 else BFLOAT16_TOLERANCE
    assert normalised_error(actual["new_state"], state) < tolerance


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_bptt_equals_the_reference(case: Case, results):
    actual, x = result(results, str(case)), triton_cases.inputs(case)
    d_final_state = None if x.d_final_state is None else x.d_final_state.double()
    d_phi, d_state = reference.bptt(
        x.grads.double(), x.history.double(), x.d_updates.double(), d_final_state, x.phi.double(), case.spec
    )
    assert normalised_error(actual["d_phi"], d_phi) < TOLERANCE
    assert normalised_error(actual["d_state"], d_state) < TOLERANCE
    assert actual["deterministic"]


def test_the_configurations_of_ampere_compute_the_same(results):
    actual, x = result(results, "ampere"), triton_cases.inputs(triton_cases.AMPERE)
    theta, state = reference.step(
        x.theta.double(), x.grads[0].double(), x.state.double(), x.phi.double(), triton_cases.AMPERE.spec
    )
    assert normalised_error(actual["theta"], theta) < TOLERANCE
    assert normalised_error(actual["new_state"], state) < TOLERANCE


def test_a_diverged_coordinate_stays_diverged_and_alone(results):
    actual = result(results, "extremes")
    case = Case(2, 20, "log_sign", N=len(EXTREME_GRADIENTS), T=1)
    x = triton_cases.inputs(case)
    theta, state = reference.step(
        x.theta.double(), EXTREME_GRADIENTS.double(), x.state.double(), x.phi.double(), case.spec
    )
    torch.testing.assert_close(actual["theta"].double(), theta, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(actual["new_state"].double(), state, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert theta.isnan().tolist() == [True] + [False] * (len(EXTREME_GRADIENTS) - 1)


def test_a_diverged_coordinate_poisons_no_other_ones_initial_state(results):
    """φ's gradient is a sum over coordinates and is poisoned; d_initial_state is not."""
    actual = result(results, "diverged")
    assert actual["diverged"][..., 2:4].isnan().any(dim=(0, 1, 2)).all()
    assert torch.equal(actual["diverged"][..., 4:], actual["finite"][..., 4:])


@pytest.mark.parametrize("name", ["theta", "grad", "state", "phi"])
def test_float64_is_refused_by_name(name):
    spec = LSTMSpec(1, 4)
    tensors = {
        "theta": torch.zeros(3),
        "grad": torch.zeros(3),
        "state": torch.zeros(*spec.state_shape, 3),
        "phi": torch.zeros(spec.num_parameters),
    }
    tensors[name] = tensors[name].double()
    with pytest.raises(TypeError, match=rf"takes {name} as .*'reference'"):
        backend.step_(**tensors, new_state=torch.zeros(*spec.state_shape, 3), spec=spec)
