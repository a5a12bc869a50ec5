"""What the fused kernels take for cells of other sizes than the paper's, by units, layers and inputs.

    python benchmarks/cells.py [--device cuda] [--json FILE]

Nanoseconds that a step takes for a coordinate, and a window's backward for a coordinate and step; FLOPs are
those of the LSTM's matrix products, unpadded, their share is of a large float32 product's in the same run.
Activations, five exponentials and reciprocals a unit, are no FLOPs of products: the fewer the columns of a
unit's weights, the more they count.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import speed_tables
import torch
from kernel_throughput import Case, measure_bounds, work
from l2l_kernels import LSTMSpec, backends
from measuring import print_table, start_log, time_ms, write_json

from l2l_lightning.provenance import origin

UNITS, LAYERS, INPUTS = (4, 8, 20, 32, 64), (1, 2), (1, 2, 8, 32)
"""One input is the gradient itself, two are the paper's preprocessing of it, more are features."""
STEPS = 10


def spec_of(units: int, layers: int, inputs: int) -> LSTMSpec:
    """The cell of so many inputs."""
    if inputs <= 2:
        return LSTMSpec(layers, units, "identity" if inputs == 1 else "log_sign")
    return LSTMSpec(layers, units, "features", width=inputs)


def measure(spec: LSTMSpec, N: int, device: str) -> dict[str, float]:
    """Nanoseconds and GFLOP/s of both kernels on N coordinates."""
    generator = torch.Generator(device).manual_seed(0)
    backend = backends.load(backends.choose(torch.device(device)))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    phi, inputs = 0.3 * randn(spec.num_parameters), randn(STEPS, *spec.input_shape(N))
    history, d_updates = 0.5 * randn(STEPS + 1, *spec.state_shape, N), randn(STEPS, N)
    theta = torch.zeros(N, device=device)
    runs = {
        "step": lambda: backend.step_(theta, inputs[0], history[0], history[1], phi, spec),
        "bptt": lambda: backend.bptt(inputs, history, d_updates, None, phi, spec),
    }
    found = {}
    for kernel, run in runs.items():
        ns = 1e6 * time_ms(run, device)["ms"] / N / (STEPS if kernel == "bptt" else 1)
        _, flops = work(Case(kernel, N, STEPS, "float32", "float32"), spec)
        found |= {f"{kernel}_ns": ns, f"{kernel}_gflops": flops / ns}
    return found


def main() -> None:
    """Prints the table of cells, and writes the JSON asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--coordinates", type=int, default=16_384)
    parser.add_argument("--units", type=int, nargs="+", default=UNITS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates = measure_bounds(args.device)["tflops"]
    bound = 1e3 * rates.get("float32", rates.get("tf32", 0.0))
    document: dict[str, Any] = {"origin": origin(args.device), "threads": torch.get_num_threads()}
    document |= {"coordinates": args.coordinates, "product_gflops": bound, "rows": []}
    print(f"a large product: {bound:.0f} GFLOP/s")
    print_row = start_log(["units", "layers", "inputs", "step ns", "of product", "bptt ns", "of product"])
    for layers, units, inputs in product(LAYERS, args.units, INPUTS):
        found = measure(spec_of(units, layers, inputs), args.coordinates, args.device)
        document["rows"].append({"units": units, "layers": layers, "inputs": inputs} | found)
        shares = [f"{found[f'{kernel}_gflops'] / bound:.0%}" for kernel in ("step", "bptt")]
        ns = [f"{found[f'{kernel}_ns']:.1f}" for kernel in ("step", "bptt")]
        print_row([units, layers, inputs, ns[0], shares[0], ns[1], shares[1]])
        write_json(args.json, document)
    print_table(speed_tables.cells(document))


if __name__ == "__main__":
    main()
