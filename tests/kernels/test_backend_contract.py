"""Every backend computes what the float64 reference does: a line in BACKENDS has another one tested.

The Triton kernels run in Triton's interpreter, which needs no GPU, and on a GPU where there is one.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import backend_cases
import numpy as np
import pytest
import torch
from backend_cases import (
    ALTERNATIVES,
    AMPERE,
    CASES,
    EXTREME_GRADIENTS,
    EXTREMES,
    NOMINAL,
    NOMINAL_WIDE,
    QUICK,
    ROUNDED,
    WIDE,
    Case,
    NominalCase,
    random_cases,
)
from l2l_kernels import SizeHead, nominal_sizes, reference


def relative_error(actual, expected):
    """‖a − b‖ / ‖b‖, 0 for tensors without elements."""
    assert actual.shape == expected.shape
    actual = actual.cpu().double()
    return 0.0 if torch.equal(actual, expected) else float((actual - expected).norm() / expected.norm())


def normalised_error(actual, expected):
    """max|a − b| / max|b|, 0 for tensors without elements."""
    assert actual.shape == expected.shape
    difference = actual.cpu().double() - expected
    return 0.0 if not difference.any() else float(difference.abs().max() / expected.abs().max())


class Member(NamedTuple):
    backend: str
    tolerances: dict[str, float]
    """Of float32 arithmetic, by how a GPU rounds the operands of matrix products; float64's is 1e-12."""
    bfloat16: float = 2**-8
    """What a state stored in bfloat16 adds: half a unit in the last place."""
    error: Callable = relative_error
    device: str = "cpu"


# On a GPU, the worst of θ, s_T, dφ and ds_0 as benchmarks/product_precision.py emulates it, times the
# allowance for other shapes, other orders of summation and the hardware's exp2 and rsqrt.
EMULATED = {"tf32x3": 7.2e-7, "tf32": 1.6e-3, "bf16": 2.6e-3}
ALLOWANCE = 8
# The interpreter multiplies in float32. One rounding is 6e-8; the longest chains here (20 steps, sums of 129
# products) reach 1e-6 of the largest element in `step` and 6e-7 in `bptt`. A wrong term is 1e-2 or more. It
# truncates to bfloat16, where GPUs round: a whole unit.
BACKENDS = {
    "reference": Member("reference", {"": 3e-5}),
    "cpu": Member("cpu", {"": 3e-5}),
    "interpreter": Member("triton", {"": 4e-6}, 2**-7, normalised_error),
    "GPU": Member("triton", {name: ALLOWANCE * error for name, error in EMULATED.items()}, device="cuda"),
}
# Numbers that float32 computes to 1e-7 are rounded to 8 bits the other way if a tie is as near: one in 10^4,
# and by 2^-8. Of norms that is 4e-5; not to have rounded at all is 1e-3 or more.
BESIDE_A_TIE = 2e-4
DOUBLE = [c._replace(dtype=torch.float64, state_dtype=torch.float64) for c in (*CASES[1::4], *WIDE)]
LARGE = [
    Case(2, 20, "log_sign", N=100_001, T=20),
    Case(1, 32, "identity", N=65_536, T=5),
    Case(3, 33, "log_sign", N=4_099, T=3),
    Case(2, 64, "log_sign", N=4_099, T=3),
]
RANDOM = random_cases()
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def marks(name, case=None):
    """A GPU is not everywhere, and the interpreter is slow."""
    if BACKENDS[name].device == "cuda":
        return NEEDS_GPU
    slow = [*CASES, *ALTERNATIVES, *RANDOM]
    return [pytest.mark.slow] * (name == "interpreter" and case in slow and case not in QUICK)


CASES_OF = {
    "reference": CASES,
    "cpu": CASES + WIDE + DOUBLE,
    "interpreter": CASES + ALTERNATIVES + RANDOM,
    "GPU": CASES + ALTERNATIVES + LARGE,
}
PAIRS = [
    pytest.param(name, case, id=f"{name}-{case}", marks=marks(name, case))
    for name, cases in CASES_OF.items()
    for case in cases
]
members = pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in BACKENDS])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The results of the interpreter's own processes: one for the quick cases, one more for all."""
    known = {}

    def result(name, quick):
        if quick not in known:
            path = tmp_path_factory.mktemp("triton") / "results.pt"
            environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, backend_cases.__file__, *["QUICK"] * quick, path]
            subprocess.run(command, env=environment, check=True)
            known[quick] = torch.load(path)
        if isinstance(known[quick][name], str):
            pytest.fail(known[quick][name])
        return known[quick][name]

    return result


@pytest.fixture
def run(interpreted, monkeypatch):
    """(name, what, precision) to a backend's results: of a case, of "extremes" or of "diverged"."""
    # torch.empty holds NaN: what a kernel does not write is seen.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)

    def run(name, what, precision=""):
        if name == "interpreter":
            pytest.importorskip("triton")
            return interpreted(str(what), quick=what in ("extremes", "diverged", *QUICK, *NOMINAL))
        if precision:
            from l2l_kernels.triton import configs

            monkeypatch.setattr(configs.precisions, "step", precision)
            monkeypatch.setattr(configs.precisions, "bptt", precision)
        member = BACKENDS[name]
        match what:
            case "extremes":
                return backend_cases.run_extremes(member.backend, member.device)
            case "diverged":
                return backend_cases.run_diverged(member.backend, member.device)
            case NominalCase():
                return backend_cases.run_nominal(what, member.backend, member.device)
        return backend_cases.run(what, member.backend, member.device)

    yield run
    torch.use_deterministic_algorithms(False)


def exact(case):
    return backend_cases.Inputs(
        *(None if tensor is None else tensor.double() for tensor in backend_cases.inputs(case))
    )


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_step_and_bptt_are_the_references(name, case, run):
    """A step into a history and in place, and a window's backward; no coordinates and no steps are fine."""
    for precision in BACKENDS[name].tolerances:
        assert_the_references(BACKENDS[name], case, run(name, case, precision), precision)


def assert_the_references(member, case, actual, precision=""):
    x = exact(case)
    inputs = x.inputs[0] if case.T else torch.ones(case.spec.input_shape(case.N)).double()
    theta, state = reference.step(x.theta, inputs, x.state, x.phi, case.spec)
    d_phi, d_state = reference.bptt(x.inputs, x.history, x.d_updates, x.d_final_state, x.phi, case.spec)
    rounding = member.bfloat16 if case.state_dtype == torch.bfloat16 else 0.0
    tolerance = 1e-12 if case.dtype == torch.float64 else member.tolerances[precision]
    tolerance = BESIDE_A_TIE if case.precision else tolerance
    assert member.error(actual["theta"], theta) < tolerance
    assert member.error(actual["new_state"], state) < tolerance + rounding
    assert member.error(actual["d_phi"], d_phi) < tolerance
    assert member.error(actual["d_state"], d_state) < tolerance
    assert all(actual[name].dtype == case.dtype for name in ("theta", "d_phi", "d_state"))
    assert actual["new_state"].dtype == case.state_dtype
    assert actual["in_place"]
    assert actual["deterministic"]


NOMINAL_PAIRS = [
    pytest.param(name, case, id=f"{name}-{case}", marks=marks(name))
    for name in BACKENDS
    for case in NOMINAL + NOMINAL_WIDE * (name in ("reference", "cpu"))
]


def three_rows(statistics):
    """m, m₂ and v in float64, from what stands in memory."""
    if len(statistics) == 3:
        return statistics.double()
    halves = np.uint32 if statistics.dtype == torch.float64 else np.uint16
    low, high = statistics[0].numpy().view(halves).reshape(-1, 2).T
    if halves is np.uint16:
        low, high = (half.astype(np.uint32) << 16 for half in (low, high))
    means = [torch.from_numpy(half.copy().view(np.float32)).double() for half in (high, low)]
    return torch.stack([*means, statistics[1].double()])


@pytest.mark.parametrize(("name", "case"), NOMINAL_PAIRS)
def test_a_nominal_step_is_the_formula(name, case, run):
    """Number by number in float64; statistics between the tensors stay; the sums come out again.

    Means that share a word are rounded to half of it, and all else is made of the rounded ones.
    """
    actual = run(name, case)
    x, c = backend_cases.nominal_inputs(case), backend_cases.COEFFICIENTS
    expected, found, sums = three_rows(x.statistics), three_rows(actual["statistics"].cpu()), []
    rounding = (2**-24 if case.statistics == torch.float64 else 2**-8) if case.shared else 0
    arithmetic = 1e-12 if case.statistics == torch.float64 else 2e-6
    stored = {torch.bfloat16: BACKENDS[name].bfloat16, torch.float16: 2**-11}.get(case.dtype, 0)
    for i, (target, grad, start, (size, decay), moved) in enumerate(zip(*x[:2], *x[3:], strict=True)):
        own, theta = expected[:, start : start + target.numel()], target.double().reshape(-1)
        g = grad.double().reshape(-1) * (-1 if case.maximize else 1)
        own[0] += c.w_fast * (g - own[0])
        own[1] += c.w_slow * (g - own[1])
        own[2] += c.w_square * (g**2 - own[2])
        if case.shared:
            rounded = found[:2, start : start + target.numel()]
            torch.testing.assert_close(rounded, own[:2], rtol=rounding + arithmetic, atol=10 * arithmetic)
            own[:2] = rounded
        seen = own[2] > 0
        d = (c.fast * own[0] + c.gradient * g + c.slow * own[1]) / (c.square * own[2] + ~seen).sqrt() * seen
        new = theta - (c.shrink + decay * seen) * theta - size * d if moved else d
        sums.append([(own[0] ** 2).sum(), (own[1] ** 2).sum(), own[2].sum()])
        result = actual[f"target {i}"].cpu()
        assert result.dtype == case.dtype
        torch.testing.assert_close(
            result.double(), new.view(target.shape), rtol=arithmetic + stored, atol=10 * arithmetic
        )
    torch.testing.assert_close(found, expected, rtol=arithmetic, atol=10 * arithmetic)
    sums = torch.tensor(sums, dtype=torch.float64).view(-1, 3)
    torch.testing.assert_close(actual["sums"].cpu(), sums, rtol=10 * arithmetic, atol=10 * arithmetic)
    assert torch.equal(actual["sums again"], actual["sums"])


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nominal_sizes_are_the_formula(name, dtype):
    """Within the bounds, at each of them, and where v is zero, infinite or no number."""
    bounds = {"low": -5.0, "high": 1.5, "limit": 1.0, "most_decay": 0.5}
    head = SizeHead(0.7, -0.3, of_fast=0.6, of_slow=0.2, scale=0.4, of_decay=-0.5, **bounds)
    nan, inf = math.nan, math.inf
    sums = [[0.1, 0.2, 2.0], [9.0, 0.0, 1e-200], [0.0, 3.0, 5.0], [0, 0, 0], [1, 1, inf], [nan, nan, nan]]
    log_sizes, decays = torch.linspace(-3, 0.5, 6, dtype=dtype), torch.tensor([0, 1, 1, 2, 3, 4]).to(dtype)
    expected = []
    for (fast, slow, square), b, c in zip(sums, log_sizes.tolist(), decays.tolist(), strict=True):
        r = [
            min(max(math.log(x / square) + a, -5.0), 1.5) if x else -5.0
            for x, a in ((fast, 0.7), (slow, -0.3))
            if 0 < square < inf
        ] or [0.0, 0.0]
        size = 0.4 * math.exp(min(b + 0.6 * r[0] + 0.2 * r[1], 1.0))
        expected.append([size, min(size * c * math.exp(-0.5 * r[0]), 0.5)])
    sums = torch.tensor(sums, dtype=torch.float64)
    actual = nominal_sizes(sums, log_sizes, decays, head, name)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64).to(dtype))


@members
def test_a_step_at_the_ends_of_float32(name, run):
    """A gradient of NaN is its coordinate's θ; the least, the largest and the infinite ones are as others."""
    precision = next(iter(BACKENDS[name].tolerances))
    actual, x = run(name, "extremes", precision), exact(EXTREMES)
    theta, state = reference.step(x.theta, EXTREME_GRADIENTS.double(), x.state, x.phi, EXTREMES.spec)
    atol = 1e-4 if precision else 1e-6  # products of rounded operands
    for ours, theirs in ((actual["theta"], theta), (actual["new_state"], state)):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=atol, equal_nan=True)
    assert theta.isnan().tolist() == [True] + [False] * (len(EXTREME_GRADIENTS) - 1)


@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_rounded_products_in_plain_pytorch_differ_by_ties_alone(case, run):
    """The reference in float32 against itself in float64: what the others are held to is well defined."""
    assert_the_references(BACKENDS["reference"], case, run("reference", case))


@members
def test_a_diverged_coordinate_leaves_the_others_alone(name, run):
    """φ's gradient is a sum over coordinates and is poisoned; what is a coordinate's own is not another's."""
    results = run(name, "diverged")
    for what in ("theta", "state", "d_state"):
        assert torch.equal(results[f"diverged {what}"][..., 4:], results[f"finite {what}"][..., 4:])
        assert results[f"finite {what}"].isfinite().all()
        assert results[f"diverged {what}"][..., 2].isnan().any()
    assert results["diverged d_state"][..., 2:4].isnan().any(dim=(0, 1, 2)).all()


@pytest.mark.slow
def test_the_configurations_of_ampere_compute_the_same(interpreted):
    assert_the_references(BACKENDS["interpreter"], AMPERE, interpreted("ampere", quick=False))
