"""Throughput of the fused kernels against what the device can do, measured in the same run.

    python benchmarks/kernel_throughput.py [--device cuda] [--json FILE]     every size and precision
    python benchmarks/kernel_throughput.py --sweep [--json FILE]             other blocks and warps

The bounds are a large copy (bytes read and written per second) and a large matrix product in each precision.
Every configuration is first held to the float64 reference, on the first and the last coordinates of the very
size that is timed; one whose error is above its tolerance gets no throughput.

Bytes are the compulsory ones: every operand read once and every result written once. FLOPs are those of the
LSTM's matrix products, unpadded; a product of three TF32 ones counts once.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from l2l_kernels import LSTMSpec, backends, reference
from l2l_kernels.triton.configs import ALTERNATIVES, Config
from measuring import Table, copy_gb_per_s, print_table, start_log, time_ms, write_json
from torch import Tensor

from l2l_lightning.provenance import origin

SPEC = LSTMSpec(num_layers=2, hidden_size=20)
CHECKED = 1024
"""Coordinates at each end that are compared with the reference."""
COMPILED_ON = 4096
"""About so many coordinates are what a configuration is compiled on; whether 16 divides their number decides
which code is compiled, so that they leave the remainder of the number that is timed."""

# Of the largest element; the state's own is one unit of its storage. Three TF32 products are float32 to
# within accumulation order; one has operands of 11 bits, bf16 of 8, and a window's steps multiply the error.
TOLERANCE = {"float32": 2e-5, "tf32x3": 2e-5, "tf32": 1e-2, "bf16": 8e-2}
STATE_TOLERANCE = {"float32": 0.0, "bfloat16": 2**-7}
MATRIX_RATE = {"float32": "float32", "tf32x3": "tf32", "tf32": "tf32", "bf16": "bf16"}
"""Which measured matrix rate a precision is held against."""

COPY_SHARE_TARGET, COPY_SHARE_FROM = 0.8, 2**22
"""A step at this many coordinates or more, float32 state, is to move this share of what a copy moves."""
BPTT_TARGET_MS, BPTT_TARGET_DEVICE = 400.0, "H100"
"""The most milliseconds per 10^9 coordinate-steps that a window's backward is to take, in tf32."""


class Case(NamedTuple):
    """One configuration of one kernel."""

    kernel: str
    """"step" or "bptt"."""
    N: int
    T: int
    state_dtype: str
    precision: str
    """One of the Triton kernels' precisions, or "float32" for a backend that has no other."""
    config: Config | None = None
    """None is the table's own."""


def matrix_flops(inputs: int, H: int) -> int:
    """FLOPs of W [x; h], W [4H, inputs + H], for one coordinate: a multiplication and an addition each."""
    return 2 * 4 * H * (inputs + H)


def work(case: Case, spec: LSTMSpec = SPEC) -> tuple[float, float]:
    """Compulsory bytes and matrix FLOPs per coordinate and step."""
    H, state = spec.hidden_size, spec.num_layers * 2 * spec.hidden_size
    state_bytes = state * (2 if case.state_dtype == "bfloat16" else 4)
    gates = sum(matrix_flops(spec.layer_inputs(layer), H) for layer in range(spec.num_layers))
    head = 2 * H
    if case.kernel == "step":
        return 2 * state_bytes + 3 * 4, gates + head  # the state and θ in and out, the gradient in
    # The history's T+1 states, T gradients and T cotangents in; the first state's cotangent, float32, out.
    bytes_ = (case.T + 1) / case.T * state_bytes + 2 * 4 + 4 * state / case.T
    # Gates again, dW = dz [x; h]^T, and W^T dz but for the gradient, the first layer's input.
    first_input = matrix_flops(spec.num_inputs, H) - matrix_flops(0, H)
    return bytes_, 3 * gates - first_input + 2 * head


class Problem:
    """Inputs of both kernels at one size and state dtype; every precision and configuration shares them."""

    def __init__(self, kernel: str, N: int, T: int, state_dtype: str, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        dtype = getattr(torch, state_dtype)
        self.phi = 0.3 * randn(SPEC.num_parameters)
        decades = torch.empty(T, N, device=device).uniform_(-7, 2, generator=generator)
        self.grads = randn(T, N).mul_(10**decades)
        ends = torch.arange(min(CHECKED, N // 2), device=device)
        self.checked = torch.cat([ends, N - 1 - ends])
        if kernel == "step":
            self.theta = torch.zeros(N, device=device)
            self.state = randn(*SPEC.state_shape, N, dtype=dtype).mul_(0.5)
            self.new_state = torch.empty_like(self.state)
        else:
            self.history = randn(T + 1, *SPEC.state_shape, N, dtype=dtype).mul_(0.5)
            self.d_updates = randn(T, N)

    def run(self, backend: backends.Backend) -> None:
        """What is timed."""
        if hasattr(self, "theta"):
            backend.step_(self.theta, self.grads[0], self.state, self.new_state, self.phi, SPEC)
        else:
            backend.bptt(self.grads, self.history, self.d_updates, None, self.phi, SPEC)

    def errors(self, backend: backends.Backend) -> dict[str, float]:
        """The results' largest errors on the checked coordinates, relative to their largest elements."""
        n, phi = self.checked, self.phi.double()
        if hasattr(self, "theta"):
            theta, state = torch.zeros_like(self.theta), torch.full_like(self.new_state, math.nan)
            backend.step_(theta, self.grads[0], self.state, state, self.phi, SPEC)
            expected = reference.step(
                theta[n].double().zero_(), self.grads[0, n].double(), self.state[..., n].double(), phi, SPEC
            )
            return {"update": error(theta[n], expected[0]), "state": error(state[..., n], expected[1])}
        # With cotangents of zero elsewhere φ's gradient depends on the checked coordinates alone.
        d_updates = torch.zeros_like(self.d_updates)
        d_updates[:, n] = self.d_updates[:, n]
        d_phi, d_state = backend.bptt(self.grads, self.history, d_updates, None, self.phi, SPEC)
        expected = reference.bptt(
            self.grads[:, n].double(),
            self.history[..., n].double(),
            d_updates[:, n].double(),
            None,
            phi,
            SPEC,
        )
        return {"d_phi": error(d_phi, expected[0]), "d_state": error(d_state[..., n], expected[1])}


def error(actual: Tensor, expected: Tensor) -> float:
    """max|a − b| / max|b|; infinite if anything is NaN."""
    value = float((actual.double() - expected).abs().max() / expected.abs().max())
    return value if math.isfinite(value) else math.inf


@contextmanager
def configured(case: Case, launched: dict[str, Any]) -> Iterator[None]:
    """Sets the Triton kernels' precision and, in a sweep, their configuration, whatever the device's own is.

    What the kernel is launched with is written to `launched`.
    """
    if case.precision == "float32":
        yield
        return
    from l2l_kernels.triton import configs

    name = f"{case.kernel}_config"
    table, precision = getattr(configs, name), getattr(configs.precisions, case.kernel)

    def config(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        constants, options = table(*arguments, config=case.config)
        launched.update(block=constants["BLOCK"], num_warps=options["num_warps"])
        launched["max_registers"] = options.get("maxnreg")
        launched["lanes"] = case.kernel == "step" and "HP" not in constants
        launched["launches"] = 1 if constants.get("GATES", "all") == "all" else 2
        return constants, options

    setattr(configs, name, config)
    setattr(configs.precisions, case.kernel, case.precision)
    try:
        yield
    finally:
        setattr(configs, name, table)
        setattr(configs.precisions, case.kernel, precision)


def describe(case: Case) -> dict[str, Any]:
    """The beginning of a case's row: what it is, and its configuration where that is not the table's."""
    row: dict[str, Any] = case._asdict()
    config = row.pop("config")
    return row | (dict.fromkeys(Config._fields) if config is None else config._asdict())


def compile_case(case: Case, device: str) -> str | None:
    """Leaves a case's compiled kernels in Triton's cache on disk; why not, if it cannot."""
    try:
        problem = Problem(case.kernel, case.N, case.T, case.state_dtype, device)
        with configured(case, {}):
            problem.run(backends.load("triton"))
        torch.cuda.synchronize()
    except Exception as failure:  # returned, not raised: some of Triton's exceptions cannot be pickled
        return cause(failure)
    return None


def compile_all(cases: list[Case], device: str, limit_s: float) -> dict[Case, str]:
    """Compiles the cases' kernels in parallel as long as the limit lasts; why, for those that failed.

    A backward takes seconds to compile, and one that spills can take a minute.
    """
    smallest = {case: case._replace(N=COMPILED_ON + case.N % 16) for case in cases}
    failures = {}
    deadline = time.monotonic() + limit_s
    processes = min(len(os.sched_getaffinity(0)), len(set(smallest.values())))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # its exit ends what still compiles
        pending = {
            case: pool.apply_async(compile_case, (case, device)) for case in dict.fromkeys(smallest.values())
        }
        for case, result in pending.items():
            result.wait(max(deadline - time.monotonic(), 0.0))
            failure = result.get() if result.ready() else f"not compiled in {limit_s:g} s"
            if failure:
                failures[case] = failure
    return {case: failures[small] for case, small in smallest.items() if small in failures}


def cause(failure: Exception) -> str:
    """Prints an exception with its traceback; returns its type and the last line of its message.

    Triton's compilers say first where and last why.
    """
    traceback.print_exception(failure)
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[-1] if lines else ''}"


def measure(case: Case, problem: Problem, backend: backends.Backend, device: str, bounds: dict) -> dict:
    """One case's row: its error and, if that is within the tolerance, its times and shares of the bounds."""
    row = describe(case)
    launched: dict[str, Any] = {}
    try:
        with configured(case, launched):
            row["errors"] = problem.errors(backend)
            row |= launched
            tolerance = TOLERANCE[case.precision]
            tolerances = dict.fromkeys(row["errors"], tolerance)
            if "state" in tolerances:
                tolerances["state"] = max(tolerance, STATE_TOLERANCE[case.state_dtype])
            row["tolerances"] = tolerances
            row["agrees"] = all(row["errors"][name] < tolerances[name] for name in tolerances)
            if not row["agrees"]:
                row["errors"] = {k: v if math.isfinite(v) else None for k, v in row["errors"].items()}
                return row
            row |= time_ms(lambda: problem.run(backend), device)
    except Exception as failure:  # out of registers, shared memory or memory: the other cases still report
        return row | launched | {"agrees": False, "failure": cause(failure)}
    bytes_, flops = work(case)
    rates = bounds["tflops"]
    matrix_rate = rates.get(MATRIX_RATE[case.precision]) or rates["float32"]  # Triton's interpreter: float32
    coordinate_steps = case.N * case.T
    per_second = 1e3 * coordinate_steps / row["ms"]
    row |= {
        "ms_per_1e9": 1e9 * row["ms"] / coordinate_steps,
        "bytes_per_coordinate_step": bytes_,
        "flops_per_coordinate_step": flops,
        "gb_per_s": 1e-9 * bytes_ * per_second,
        "share_of_copy": 1e-9 * bytes_ * per_second / bounds["copy_gb_per_s"],
        "tflops": 1e-12 * flops * per_second,
        "share_of_matrix_rate": 1e-12 * flops * per_second / matrix_rate,
    }
    return row | target(case, row, bounds["device"])


def target(case: Case, row: dict, device_name: str) -> dict:
    """What is asked of this case, and whether it is met; nothing for most."""
    if case.precision == "float32":
        return {}  # the targets are a GPU's
    if case.kernel == "step" and case.N >= COPY_SHARE_FROM and case.state_dtype == "float32":
        met = row["share_of_copy"] >= COPY_SHARE_TARGET
        return {"target": f"share_of_copy >= {COPY_SHARE_TARGET}", "meets_target": met}
    if case.kernel == "bptt" and case.precision == "tf32" and BPTT_TARGET_DEVICE in device_name:
        met = row["ms_per_1e9"] <= BPTT_TARGET_MS
        return {"target": f"ms_per_1e9 <= {BPTT_TARGET_MS:g}", "meets_target": met}
    return {}


def measure_bounds(device: str) -> dict:
    """Bytes per second of a large copy, and FLOPs per second of large matrix products."""
    on_gpu = device.startswith("cuda")
    side = 8192 if on_gpu else 512
    rates = {}
    for name in ("tf32", "bf16") if on_gpu else ("float32",):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        timed = time_ms(lambda a=a, b=b, out=out: torch.matmul(a, b, out=out), device)
        rates[name] = 1e-9 * 2 * side**3 / timed["ms"]
    torch.set_float32_matmul_precision("highest")
    return {"copy_gb_per_s": copy_gb_per_s(device), "tflops": rates}


def cases(args: argparse.Namespace, precisions: list[str]) -> list[Case]:
    """What a run measures: every size, state and precision; in a sweep, every block and number of warps."""
    if args.sweep:
        cheaper = {"step": ["tf32x3", "tf32"], "bptt": ["tf32", "bf16"]}
        return [
            Case(kernel, N, T, "float32", precision, config)
            for kernel, N, T in (
                ("step", args.step_sizes[-1], 1),
                ("bptt", args.bptt_sizes[-1], args.unroll),
            )
            for precision in cheaper[kernel]
            for config in ALTERNATIVES[kernel]
            if precision == cheaper[kernel][0] or not config.lanes  # which are float32 in any precision
        ]
    return [
        Case(kernel, N, T, dtype, precision)
        for kernel, sizes, T in (("step", args.step_sizes, 1), ("bptt", args.bptt_sizes, args.unroll))
        for N in sizes
        for dtype in ("float32", "bfloat16")
        for precision in precisions
    ]


COLUMNS = ["kernel", "N", "T", "state", "precision", "block", "warps", "other", "error", "ms", "ms/1e9"]
COLUMNS += ["B/step", "FLOP/step", "copy %", "matrix %", "target"]


def other_settings(row: dict) -> str:
    """A configuration's settings besides block and warps."""
    registers = f"maxnreg {row['max_registers']}" if row.get("max_registers") else ""
    launches = f"{row['launches']} launches" if (row.get("launches") or 1) > 1 else ""
    return ", ".join(filter(None, (registers, "lanes" if row.get("lanes") else "", launches)))


def cells(row: dict) -> list[str]:
    """A row as it is printed; no figures where the results are wrong."""
    shape = [
        row["kernel"],
        row["N"],
        row["T"],
        row["state_dtype"],
        row["precision"],
        row["block"] or "-",
        row["num_warps"] or "-",
        other_settings(row) or "-",
    ]
    if "ms" not in row:
        why = row.get("failure") or "disagrees with the reference: no throughput"
        return [*map(str, shape), why, *[""] * (len(COLUMNS) - len(shape) - 1)]
    numbers = [
        f"{max(row['errors'].values()):.1e}",
        f"{row['ms']:.3f}",
        f"{row['ms_per_1e9']:.1f}",
        f"{row['bytes_per_coordinate_step']:.0f}",
        f"{row['flops_per_coordinate_step']}",
        f"{100 * row['share_of_copy']:.1f}",
        f"{100 * row['share_of_matrix_rate']:.1f}",
        {None: "", True: "met", False: "missed"}[row.get("meets_target")],
    ]
    return [*map(str, shape), *numbers]


def main() -> None:
    """Measures the bounds and every case, writes the JSON after each, so that no interruption loses any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=backends.BACKENDS, help="default: the device's own")
    parser.add_argument("--step-sizes", type=int, nargs="+", help="N; a sweep takes the last")
    parser.add_argument("--bptt-sizes", type=int, nargs="+", help="N; a sweep takes the last")
    parser.add_argument("--unroll", type=int, default=20, help="T of bptt")
    parser.add_argument("--sweep", action="store_true", help="time other configurations than the table's")
    parser.add_argument("--compile-s", type=float, default=60, help="limit for compiling, in parallel")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    backend = backends.choose(torch.device(args.device), args.backend)
    precisions = ["tf32x3", "tf32", "bf16"] if backend == "triton" else ["float32"]
    if args.sweep and backend != "triton":
        parser.error(f"--sweep is for the triton backend; {backend!r} has no table of blocks and warps")
    if args.sweep:
        step_sizes, bptt_sizes = [2**22], [2**18]
    else:
        # Networks are seldom a multiple of 16 large, which is compiled to narrower accesses.
        step_sizes, bptt_sizes = [2**18, 2**22, 2**22 + 2, 2**24], [2**16, 2**18, 2**18 + 2, 2**20]
    if not on_gpu:
        step_sizes = bptt_sizes = [2**12, 2**12 + 2]
    args.step_sizes = args.step_sizes or step_sizes
    args.bptt_sizes = args.bptt_sizes or bptt_sizes

    todo = cases(args, precisions)
    failures = compile_all(todo, args.device, args.compile_s) if on_gpu else {}
    document: dict[str, Any] = {"origin": origin(args.device), "backend": backend, "sweep": args.sweep}
    document["bounds"] = measure_bounds(args.device)
    document["rows"] = rows = []
    bounds = document["bounds"] | {"device": document["origin"]["device"]}
    rates = ", ".join(f"{name} {rate:.4g} TFLOP/s" for name, rate in bounds["tflops"].items())
    print(f"{bounds['device']}: copy {bounds['copy_gb_per_s']:.4g} GB/s, matrix products {rates}")

    print_row = start_log(COLUMNS)
    problem, shared = None, None
    for case in todo:
        if case in failures:
            row = describe(case) | {"agrees": False, "failure": failures[case]}
        else:
            if shared != case[:4]:
                problem = None  # frees its memory before the next one is drawn
                problem, shared = Problem(*case[:4], args.device), case[:4]
            row = measure(case, problem, backends.load(backend), args.device, bounds)
        rows.append(row)
        print_row(cells(row))
        write_json(args.json, document)
    print_table(Table(COLUMNS, [cells(row) for row in rows]))
    # In a sweep some configurations are expected not to fit.
    if not args.sweep and not all(row["agrees"] for row in rows):
        raise SystemExit("some configurations failed or disagree with the reference: see above")


if __name__ == "__main__":
    main()
