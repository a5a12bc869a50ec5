"""What every backend is tested on; as a script, runs it all in Triton's interpreter and saves the results.

TRITON_INTERPRET must be set before the kernels are imported, and ahead-of-time compilation needs it unset, so
the interpreter gets a process of its own: `python backend_cases.py OUT.pt`, or with QUICK before OUT.pt.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import traceback
from typing import NamedTuple
from unittest import mock

import torch
from l2l_kernels import Coefficients, LSTMSpec, bptt, nominal_step, nominal_sums, reference, step_
from l2l_kernels.spec import Output, Precision, Preprocessing
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
    dtype: torch.dtype = torch.float32
    """Of the arithmetic."""
    width: int = 1
    output: Output = "linear"
    p: float = 10.0
    output_scale: float = 0.1
    precision: Precision | None = None
    launched: str = ""
    """One of LAUNCHED, for the Triton kernels; "" as the device's family has it."""

    def __str__(self) -> str:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.state_dtype)]
        flags = ["final"] * self.final + ["strided"] * (not self.contiguous)
        shape = [f"{self.num_layers}x{self.hidden_size}", self.preprocessing, f"N{self.N}", f"T{self.T}"]
        shape += [f"width{self.width}"] * (self.width > 1) + ["tanh"] * (self.output == "tanh")
        shape += [self.precision] * bool(self.precision)
        return "-".join([*shape, *dict.fromkeys(dtypes), *flags, *[self.launched] * bool(self.launched)])

    @property
    def spec(self) -> LSTMSpec:
        shape = self.num_layers, self.hidden_size, self.preprocessing, self.p, self.output_scale
        return LSTMSpec(*shape, self.width, self.output, self.precision)


class Inputs(NamedTuple):
    theta: Tensor
    state: Tensor
    phi: Tensor
    inputs: Tensor
    history: Tensor
    d_updates: Tensor
    d_final_state: Tensor | None


# With LONG: every value of every factor, and pairs that share code; N straddles blocks and vectors, H = 29
# fills a tile exactly, and there may be no coordinates and no steps.
QUICK = [
    Case(1, 5, "identity", N=1, T=1, final=False),
    Case(1, 20, "log_sign", N=31, T=2),
    Case(1, 64, "identity", N=31, T=1),
    Case(2, 20, "log_sign", N=1, T=2),
    Case(2, 20, "log_sign", N=31, T=2, final=False, contiguous=False),
    Case(2, 20, "log_sign", N=31, T=0),
    Case(2, 20, "identity", N=0, T=2),
    Case(2, 20, "features", N=31, T=2, width=2, output="tanh"),
    Case(1, 4, "features", N=17, T=3, width=32, contiguous=False),
]
LONG = [
    Case(2, 20, "log_sign", N=31, T=2, state_dtype=torch.bfloat16),
    Case(2, 29, "log_sign", N=31, T=2),
    Case(3, 33, "identity", N=31, T=2, contiguous=False),
    Case(2, 64, "features", N=31, T=2, width=7, output="tanh", final=False),
    Case(2, 20, "log_sign", N=17, T=20),
    Case(2, 20, "log_sign", N=131, T=5),
    Case(2, 20, "log_sign", N=259, T=1, final=False),
    Case(2, 20, "log_sign", N=31, T=2, output="tanh"),
    Case(3, 12, "features", N=131, T=5, width=20, output="tanh", state_dtype=torch.bfloat16),
    Case(3, 5, "log_sign", N=1, T=20, final=False, state_dtype=torch.bfloat16),
]
# More coordinates than a thread's slice has, and windows of every shape; for compiled kernels.
WIDE = [
    Case(1, 5, "log_sign", N=1023, T=2),
    Case(1, 5, "identity", N=5000, T=2, final=False),
    Case(2, 33, "log_sign", N=5000, T=2, final=False),
    Case(2, 20, "identity", N=31, T=20, final=False),
    Case(3, 64, "identity", N=1023, T=2),
    Case(3, 64, "log_sign", N=31, T=20, final=False),
]
CASES = QUICK + LONG
# Odd and even numbers of columns, of inputs and of units: they are multiplied two at a time.
ROUNDED = [
    Case(1, 4, "identity", N=37, T=3, precision="bf16"),
    Case(1, 5, "features", N=1100, T=2, width=4, precision="bf16", output="tanh"),
    Case(1, 8, "features", N=131, T=5, width=3, precision="bf16", final=False),
    Case(2, 4, "log_sign", N=1100, T=3, precision="bf16"),
    Case(2, 8, "identity", N=70, T=20, precision="bf16"),
    Case(2, 20, "log_sign", N=1, T=2, precision="bf16"),
    Case(2, 20, "log_sign", N=1100, T=3, precision="bf16", contiguous=False),
    Case(2, 20, "log_sign", N=31, T=2, precision="bf16", state_dtype=torch.bfloat16),
    Case(3, 33, "features", N=515, T=2, width=7, precision="bf16"),
    Case(2, 20, "log_sign", N=31, T=0, precision="bf16"),
    Case(2, 20, "identity", N=0, T=2, precision="bf16"),
]
# Configurations that a sweep times beside the tables' own.
LAUNCHED = {
    "lanes": ("step_config", {"block": 64, "num_warps": 4, "lanes": True}),
    "halves": ("bptt_config", {"block": 16, "num_warps": 4, "launches": 2}),
}
ALTERNATIVES = [
    Case(2, 20, "log_sign", N=131, T=2, state_dtype=torch.bfloat16, launched="lanes"),
    Case(3, 12, "features", N=70, T=1, width=3, output="tanh", contiguous=False, launched="lanes"),
    Case(2, 20, "log_sign", N=31, T=2, launched="halves"),
    Case(2, 29, "identity", N=17, T=3, final=False, launched="halves"),
    Case(1, 32, "log_sign", N=31, T=2, output="tanh", launched="halves"),
]


def inputs(case: Case, device: str = "cpu") -> Inputs:
    """The same tensors in every process: inputs over nine decades and one zero, states of order one."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=case.dtype)

    def laid(tensor: Tensor) -> Tensor:
        """On the device; strided ones are every other number of their storage, with NaN in between."""
        tensor = tensor.to(device)
        return tensor if case.contiguous else torch.stack([tensor, tensor * torch.nan], -1)[..., 0]

    spec, N, T = case.spec, case.N, case.T
    shape = (T, *spec.input_shape(N))
    decades = torch.empty(shape, dtype=case.dtype).uniform_(-7, 2, generator=generator)
    inputs = randn(*shape) * 10**decades
    if spec.preprocessing == "features":
        inputs.clamp_(-3, 3)  # features are of order one
    inputs[:1, :1] = 0.0
    return Inputs(
        theta=laid(0.1 * randn(N)),
        state=laid(0.5 * randn(*spec.state_shape, N).to(case.state_dtype)),
        phi=laid(0.3 * randn(spec.num_parameters)),
        inputs=laid(inputs),
        history=laid(0.5 * randn(T + 1, *spec.state_shape, N).to(case.state_dtype)),
        d_updates=laid(randn(T, N)),
        d_final_state=laid(randn(*spec.state_shape, N)) if case.final else None,
    )


def run(case: Case, backend: str, device: str = "cpu") -> dict[str, Tensor]:
    """A backend's results: a step into a state that holds NaN, and one in place; `bptt`, twice."""
    if case.launched:
        from l2l_kernels.triton import configs

        name, settings = LAUNCHED[case.launched]
        config = functools.partial(getattr(configs, name), config=configs.Config(**settings))
        with mock.patch.object(configs, name, config):
            return run(case._replace(launched=""), backend, device)
    spec, x, again = case.spec, inputs(case, device), inputs(case, device)
    now = x.inputs[0] if case.T else x.theta.new_ones(spec.input_shape(case.N))
    theta, new_state = again.theta, again.state.mul_(torch.nan)
    step_(theta, now, x.state, new_state, x.phi, spec, backend)
    d_phi, d_state = bptt(x.inputs, x.history, x.d_updates, x.d_final_state, x.phi, spec, backend)
    repeated = bptt(x.inputs, x.history, x.d_updates, x.d_final_state, x.phi, spec, backend)
    step_(x.theta, now, x.state, x.state, x.phi, spec, backend)
    return {
        "theta": theta,
        "new_state": new_state,
        "d_phi": d_phi,
        "d_state": d_state,
        "in_place": torch.tensor(torch.equal(x.theta, theta) and torch.equal(x.state, new_state)),
        "deterministic": torch.tensor(torch.equal(d_phi, repeated[0]) and torch.equal(d_state, repeated[1])),
    }


EXTREME_GRADIENTS = torch.tensor(
    [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-38, 3e38, 4.54e-5, 1.0]
)


EXTREMES = Case(2, 20, "log_sign", N=len(EXTREME_GRADIENTS), T=1)


def run_extremes(backend: str, device: str = "cpu") -> dict[str, Tensor]:
    """One two-layer step on gradients at the ends of float32."""
    x = inputs(EXTREMES, device)
    step_(x.theta, EXTREME_GRADIENTS.to(device), x.state, x.state, x.phi, EXTREMES.spec, backend)
    return {"theta": x.theta, "new_state": x.state}


DIVERGED = Case(2, 20, "log_sign", N=31, T=3)


def run_diverged(backend: str, device: str = "cpu", case: Case = DIVERGED) -> dict[str, Tensor]:
    """A step and the d_initial_state of a window, before and after four coordinates of it have diverged."""
    x, results = inputs(case, device), {}
    for name in ("finite", "diverged"):
        theta, state = x.theta.clone(), x.state.clone()
        step_(theta, x.inputs[1], state, state, x.phi, case.spec, backend)
        _, d_state = bptt(x.inputs, x.history, x.d_updates, x.d_final_state, x.phi, case.spec, backend)
        results |= {f"{name} theta": theta, f"{name} state": state, f"{name} d_state": d_state}
        x.inputs[1, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        x.history[2:, ..., 2] = torch.nan  # as the step left it
        x.d_updates[0, 3] = torch.nan
    return results


class NominalCase(NamedTuple):
    """Tensors that a nominal step moves, or of which it writes the direction."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    """Of θ and of the gradients."""
    grad_dtype: torch.dtype | None = None
    statistics: torch.dtype = torch.float32
    maximize: bool = False
    contiguous: bool = True
    gap: int = 0
    """Columns of the statistics between the tensors, and before the first."""
    shared: bool = False
    """Whether m and m₂ share a word."""

    def __str__(self) -> str:
        dtypes = (self.dtype, self.grad_dtype or self.dtype, self.statistics)
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        flags = ["maximize"] * self.maximize + ["strided"] * (not self.contiguous) + [f"gap{self.gap}"]
        flags += ["shared"] * self.shared
        return "-".join(
            ["nominal", "_".join(str(torch.Size(s).numel()) for s in self.shapes), *names, *flags]
        )


# No, one and several blocks of 2,048 and 8,192 coordinates; sizes that are, and are not, multiples of four.
SMALL = ((), (0,), (3,), (5, 7), (4, 2, 3, 3))
NOMINAL = [
    NominalCase(()),
    NominalCase(SMALL),
    NominalCase(SMALL, contiguous=False, maximize=True, gap=3),
    NominalCase(((64, 40), (8,), (3000,))),
    NominalCase(((5, 7), (2049,)), torch.bfloat16),
    NominalCase(((5, 7), (2049,)), torch.float16, torch.float32, gap=1),
    NominalCase(((5, 7), (2048,)), torch.float32, torch.bfloat16, maximize=True),
    NominalCase(((5, 7), (8,)), torch.float64),
    NominalCase(((64, 40), (8,), (3000,)), shared=True),
    NominalCase(((5, 7), (2049,)), torch.bfloat16, maximize=True, gap=1, shared=True),
]
NOMINAL_WIDE = [
    NominalCase(((130, 129), (8192,), (3,)), contiguous=False),
    NominalCase(((130, 129), (8192,), (3,)), statistics=torch.float64, dtype=torch.float64),
    NominalCase(SMALL, statistics=torch.float64, dtype=torch.bfloat16, maximize=True, gap=2),
    NominalCase(((130, 129), (8192,), (3,)), statistics=torch.float64, dtype=torch.float64, shared=True),
]
COEFFICIENTS = Coefficients(0.1, 0.01, 0.02, fast=1.3, gradient=0.8, slow=0.4, square=1.7, shrink=0.003)


class NominalInputs(NamedTuple):
    targets: list[Tensor]
    grads: list[Tensor]
    statistics: Tensor
    offsets: list[int]
    sizes: Tensor
    moves: list[bool]


def nominal_inputs(case: NominalCase, device: str = "cpu") -> NominalInputs:
    """The same tensors in every process; a third of coordinates has no gradient, every other tensor moves."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def laid(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device)
        return tensor if case.contiguous else torch.stack([tensor, tensor * torch.nan], -1)[..., 0]

    counts = [torch.Size(shape).numel() for shape in case.shapes]
    offsets = [case.gap * (i + 1) + sum(counts[:i]) for i in range(len(counts))]
    N = sum(counts) + case.gap * (len(counts) + 1)
    seen = torch.rand(N, generator=generator) > 0.3
    statistics = torch.stack([randn(N), 0.3 * randn(N), randn(N).square() + 0.1]) * seen
    statistics = statistics.to(case.statistics)
    if case.shared:
        means, statistics = statistics, statistics.new_empty(2, N)
        reference.update_means(statistics, *means)
    grads = [
        (randn(*shape) * seen[start : start + n].view(shape)).to(case.grad_dtype or case.dtype)
        for shape, start, n in zip(case.shapes, offsets, counts, strict=True)
    ]
    return NominalInputs(
        targets=[laid(randn(*shape).to(case.dtype)) for shape in case.shapes],
        grads=[laid(grad) for grad in grads],
        statistics=statistics.to(device),
        offsets=offsets,
        sizes=(0.1 * torch.rand(len(counts), 2, generator=generator)).to(device, case.statistics),
        moves=[i % 2 == 0 for i in range(len(counts))],
    )


def run_nominal(case: NominalCase, backend: str, device: str = "cpu") -> dict[str, Tensor]:
    """A backend's results: θ (NaN where a direction is to be written), the statistics and the sums."""
    x = nominal_inputs(case, device)
    for target, moved in zip(x.targets, x.moves, strict=True):
        target.mul_(1 if moved else torch.nan)
    sums = nominal_step(*x, COEFFICIENTS, case.maximize, backend)
    again = nominal_sums(x.statistics, x.offsets, [target.numel() for target in x.targets], backend)
    return {f"target {i}": target for i, target in enumerate(x.targets)} | {
        "statistics": x.statistics,
        "sums": sums,
        "sums again": again,
    }


AMPERE = Case(2, 20, "log_sign", N=131, T=1)


def run_ampere() -> dict[str, Tensor]:
    """AMPERE with the configurations of sm_80, which load c late."""
    from l2l_kernels.triton import configs

    family = configs.family
    configs.family = lambda device=None: "sm_80"
    try:
        return run(AMPERE, "triton")
    finally:
        configs.family = family


def random_cases() -> list[Case]:
    """Six more cases, the same ones in every process."""
    draw = random.Random(0)
    return [
        Case(
            num_layers=draw.randint(1, 3),
            hidden_size=draw.randint(1, 40),
            preprocessing=(preprocessing := draw.choice(["log_sign", "identity", "features"])),
            width=draw.randint(1, 32) if preprocessing == "features" else 1,
            output=draw.choice(["linear", "tanh"]),
            N=draw.randint(1, 40),
            T=draw.randint(1, 3),
            final=draw.random() < 0.5,
            state_dtype=draw.choice([torch.float32, torch.bfloat16]),
            contiguous=draw.random() < 0.5,
        )
        for _ in range(6)
    ]


def main(quick: bool, path: str) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty holds NaN …
    torch.use_deterministic_algorithms(True)  # … when this is on
    runs = {str(case): lambda case=case: run(case, "triton") for case in QUICK}
    runs |= {str(case): lambda case=case: run_nominal(case, "triton") for case in NOMINAL}
    runs |= {"extremes": lambda: run_extremes("triton"), "diverged": lambda: run_diverged("triton")}
    if not quick:
        others = LONG + ALTERNATIVES + random_cases()
        runs |= {str(case): lambda case=case: run(case, "triton") for case in others}
        runs["ampere"] = run_ampere
    results: dict[str, dict[str, Tensor] | str] = {}
    for name, function in runs.items():
        try:
            results[name] = function()
        except Exception:
            results[name] = traceback.format_exc()  # so that the other cases still report
    torch.save(results, path)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1")
    main(sys.argv[1:-1] == ["QUICK"], sys.argv[-1])
