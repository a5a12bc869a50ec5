"""What the Triton backend is tested on; as a script, runs every case in Triton's interpreter and saves it.

TRITON_INTERPRET must be set before the kernels are imported, and ahead-of-time compilation needs it unset, so
the interpreter gets a process of its own: `python triton_cases.py OUT.pt`.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import NamedTuple

import torch
from l2l_kernels import LSTMSpec
from l2l_kernels.spec import Preprocessing
from torch import Tensor


class Case(NamedTuple):
    num_layers: int
    hidden_size: int
    preprocessing: Preprocessing
    N: int
    T: int
    final: bool = True
    """Whether d_final_state is given."""
    state_dtype: torch.dtype = torch.float32
    contiguous: bool = True
    in_place: bool = False
    """Whether new_state is state."""

    def __str__(self) -> str:
        flags = ["final"] * self.final + ["strided"] * (not self.contiguous) + ["in_place"] * self.in_place
        dtype = str(self.state_dtype).removeprefix("torch.")
        return "-".join(
            [
                f"{self.num_layers}x{self.hidden_size}",
                self.preprocessing,
                f"N{self.N}",
                f"T{self.T}",
                dtype,
                *flags,
            ]
        )

    @property
    def spec(self) -> LSTMSpec:
        return LSTMSpec(self.num_layers, self.hidden_size, self.preprocessing)


class Inputs(NamedTuple):
    theta: Tensor
    state: Tensor
    phi: Tensor
    grads: Tensor
    history: Tensor
    d_updates: Tensor
    d_final_state: Tensor | None


# Every value of every factor, and the pairs that share code; N straddles blocks, H = 29 fills a tile exactly.
CASES = [
    Case(1, 5, "identity", N=1, T=1, final=False),
    Case(1, 20, "log_sign", N=31, T=2, in_place=True),
    Case(1, 64, "identity", N=31, T=1),
    Case(2, 20, "log_sign", N=17, T=20),
    Case(2, 20, "log_sign", N=1, T=2),
    Case(2, 20, "log_sign", N=131, T=5),
    Case(2, 20, "log_sign", N=259, T=1, final=False, in_place=True),
    Case(2, 20, "log_sign", N=31, T=2, state_dtype=torch.bfloat16),
    Case(2, 20, "log_sign", N=31, T=2, final=False, contiguous=False),
    Case(2, 20, "log_sign", N=31, T=0),
    Case(2, 20, "identity", N=0, T=2),
    Case(2, 29, "log_sign", N=31, T=2),
    Case(3, 33, "identity", N=31, T=2, contiguous=False, in_place=True),
    Case(3, 5, "log_sign", N=1, T=20, final=False, state_dtype=torch.bfloat16),
]


def inputs(case: Case) -> Inputs:
    """The same tensors in every process: gradients over nine decades and one zero, states of order one."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        if case.contiguous:
            return torch.randn(shape, generator=generator)
        return torch.randn((*shape, 2), generator=generator)[..., 0]  # every other number of its storage

    spec, N, T = case.spec, case.N, case.T
    grads = randn(T, N) * 10 ** torch.empty(T, N).uniform_(-7, 2, generator=generator)
    grads[:1, :1] = 0.0
    return Inputs(
        theta=0.1 * randn(N),
        state=0.5 * randn(*spec.state_shape, N).to(case.state_dtype),
        phi=0.3 * randn(spec.num_parameters),
        grads=grads,
        history=0.5 * randn(T + 1, *spec.state_shape, N).to(case.state_dtype),
        d_updates=randn(T, N),
        d_final_state=randn(*spec.state_shape, N) if case.final else None,
    )


def run(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """The backend's results, from outputs filled with NaN beforehand."""
    from l2l_kernels import triton as backend

    spec = case.spec
    x = Inputs(*(None if tensor is None else tensor.to(device) for tensor in inputs(case)))
    grad = x.grads[0] if case.T else x.d_updates.new_ones(case.N)
    new_state = x.state if case.in_place else x.state.mul(torch.nan)
    theta = x.theta
    d_phi, d_state = backend.bptt(x.grads, x.history, x.d_updates, x.d_final_state, x.phi, spec)
    again = backend.bptt(x.grads, x.history, x.d_updates, x.d_final_state, x.phi, spec)
    backend.step_(theta, grad, x.state, new_state, x.phi, spec)
    deterministic = torch.equal(d_phi, again[0]) and torch.equal(d_state, again[1])
    return {
        "theta": theta,
        "new_state": new_state,
        "d_phi": d_phi,
        "d_state": d_state,
        "deterministic": torch.tensor(deterministic),
    }


EXTREME_GRADIENTS = torch.tensor(
    [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-38, 3e38, 4.54e-5, 1.0]
)


def run_extremes() -> dict[str, Tensor]:
    """One two-layer step on gradients at the ends of float32."""
    from l2l_kernels import triton as backend

    case = Case(2, 20, "log_sign", N=len(EXTREME_GRADIENTS), T=1)
    x = inputs(case)
    backend.step_(x.theta, EXTREME_GRADIENTS, x.state, x.state, x.phi, case.spec)
    return {"theta": x.theta, "new_state": x.state}


AMPERE = Case(2, 20, "log_sign", N=131, T=1, in_place=True)


def run_ampere() -> dict[str, Tensor]:
    """AMPERE with the configurations of sm_80, which load c late."""
    from l2l_kernels.triton import configs

    family = configs.family
    configs.family = lambda device=None: "sm_80"
    try:
        return run(AMPERE)
    finally:
        configs.family = family


def run_diverged_bptt() -> dict[str, Tensor]:
    """d_initial_state of a window in which three coordinates' gradients are inf, -inf and NaN."""
    from l2l_kernels import triton as backend

    case = DIVERGED
    x = inputs(case)
    _, d_state = backend.bptt(x.grads, x.history, x.d_updates, x.d_final_state, x.phi, case.spec)
    x.grads[1, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    x.history[2:, ..., 2] = torch.nan  # as the step left it
    x.d_updates[0, 3] = torch.nan
    _, diverged = backend.bptt(x.grads, x.history, x.d_updates, x.d_final_state, x.phi, case.spec)
    return {"finite": d_state, "diverged": diverged}


DIVERGED = Case(2, 20, "log_sign", N=31, T=3)


def random_cases() -> list[Case]:
    """Six cases that hypothesis draws, the same ones in every process."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    cases: list[Case] = []

    @settings(
        max_examples=6,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.builds(
            Case,
            num_layers=st.integers(1, 3),
            hidden_size=st.integers(1, 40),
            preprocessing=st.sampled_from(["log_sign", "identity"]),
            N=st.integers(1, 40),
            T=st.integers(1, 3),
            final=st.booleans(),
            state_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
            contiguous=st.booleans(),
            in_place=st.booleans(),
        )
    )
    def draw(case: Case) -> None:
        cases.append(case)

    draw()
    return list(dict.fromkeys(cases))


def main(path: str) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty holds NaN …
    torch.use_deterministic_algorithms(True)  # … when this is on
    results: dict[str, dict[str, Tensor] | str] = {}
    for name, function in [
        *((str(case), lambda case=case: run(case)) for case in CASES + random_cases()),
        ("extremes", run_extremes),
        ("ampere", run_ampere),
        ("diverged", run_diverged_bptt),
    ]:
        try:
            results[name] = function()
        except Exception:
            results[name] = traceback.format_exc()  # so that the other cases still report
    torch.save(results, path)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1")
    main(sys.argv[1])
