"""Registers, spills, shared memory and instructions of every configuration in the Triton kernels' table.

Compiled for GPUs that need not be there; nothing runs. Without arguments: float32 states, one hidden size for
each padded size. --all adds bfloat16 states.

python benchmarks/compile_report.py
python benchmarks/compile_report.py --hidden-sizes 20 --layers 2 --targets sm_90 --json FILE
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from l2l_kernels import LSTMSpec
from l2l_kernels.triton import configs
from l2l_kernels.triton.aot import TARGETS, CompiledKernel, compile_nominal, compile_report
from rich.console import Console
from rich.table import Table

RESULT = Path(__file__).parent / "results" / "compile_report.json"


def main() -> None:
    """Compiles, prints a table, and writes the JSON asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[16, 20, 64])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--all", action="store_true", help="bfloat16 states as well as float32")
    parser.add_argument(
        "--step-precision", choices=["tf32", "tf32x3", "bf16"], default=configs.precisions.step
    )
    parser.add_argument(
        "--bptt-precision", choices=["tf32", "tf32x3", "bf16"], default=configs.precisions.bptt
    )
    parser.add_argument("--json", type=Path, default=RESULT, help="where to write the figures")
    arguments = parser.parse_args()

    configs.precisions.step = arguments.step_precision
    configs.precisions.bptt = arguments.bptt_precision
    console = Console()
    reports: list[CompiledKernel] = []
    for state_dtype in ("fp32", "bf16") if arguments.all else ("fp32",):
        for num_layers in arguments.layers:
            for hidden_size in arguments.hidden_sizes:
                spec = LSTMSpec(num_layers, hidden_size)
                with console.status(f"compiling {spec}, {state_dtype} states"):
                    reports += compile_report(spec, arguments.targets, state_dtype)
    reports += [compile_nominal(target) for target in arguments.targets]
    console.print(table(reports))
    document = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": [asdict(report) for report in reports],
    }
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def table(reports: list[CompiledKernel]) -> Table:
    """One row per compiled kernel; spills in yellow."""
    columns = ["LSTM", "kernel", "target", "dot", "block", "warps", "regs", "spill B", "KiB", "instr."]
    result = Table(
        *columns,
        title="Compiled, not run: registers and spills per thread, shared KiB per program, warp instructions "
        "per coordinate and step",
    )
    for r in reports:
        spills = f"[yellow]{r.spill_bytes}" if r.spill_bytes else "0"
        shape = f"{r.num_layers}x{r.hidden_size}"
        dot = f"{r.precision}, {r.state_dtype} states"
        numbers = [str(r.block), str(r.num_warps), str(r.registers), spills, f"{r.shared_bytes / 1024:.0f}"]
        instructions = f"{r.instructions['total']:.0f}" if r.instructions else "-"
        result.add_row(shape, r.kernel, r.target, dot, *numbers, instructions)
    return result


if __name__ == "__main__":
    main()
