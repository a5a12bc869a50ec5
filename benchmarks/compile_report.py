"""Registers, spills, shared memory and instructions of the Triton kernels' configurations, without a device.

Compiled for GPUs that need not be there; nothing runs. For numbers of coordinates that 16 divides and that it
does not, which Triton compiles to different code. Without arguments: the table's own configurations, float32
states, one hidden size for each padded size. --alternatives: those that a sweep times, of the 2x20 LSTM.

python benchmarks/compile_report.py
python benchmarks/compile_report.py --alternatives --json benchmarks/results/compile_alternatives.json
python benchmarks/compile_report.py --shapes 2x20 --targets sm_90 --json FILE
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from l2l_kernels import LSTMSpec
from l2l_kernels.triton import configs
from l2l_kernels.triton.aot import TARGETS, CompiledKernel, compile_nominal, compile_report
from measuring import Table, print_table, write_json

from l2l_lightning.provenance import origin

ALTERNATIVES_FOR = ["sm_80", "sm_90", "sm_100", "gfx942"]
H100_CYCLES = 132 * 1.755e9
"""Of all multiprocessors, in a second (SXM5, boosted)."""
RESULT = Path(__file__).parent / "results" / "compile_report.json"


def main() -> None:
    """Compiles, prints a table, and writes the JSON asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="LAYERSxUNITS", help="default: 1x16 2x20 3x64")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="default: all")
    parser.add_argument("--alternatives", action="store_true", help="a sweep's configurations, for 2x20")
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
    alternatives, reports = arguments.alternatives, list[CompiledKernel]()
    shapes = arguments.shapes or (["2x20"] if alternatives else ["1x16", "2x20", "3x64"])
    targets = arguments.targets or (ALTERNATIVES_FOR if alternatives else list(TARGETS))
    for state_dtype in ("fp32", "bf16") if arguments.all else ("fp32",):
        for spec in (LSTMSpec(*map(int, shape.split("x"))) for shape in shapes):
            print(f"compiling {spec}, {state_dtype} states", file=sys.stderr)
            divisible = (True,) if alternatives else (True, False)
            reports += compile_report(spec, targets, state_dtype, divisible, alternatives)
    if not alternatives:
        reports += [compile_nominal(target, aligned) for target in targets for aligned in (True, False)]
    print(
        "Compiled, not run: registers and spills per thread, shared KiB per program, programs that a "
        "multiprocessor holds at once, warp instructions per coordinate and step, computed ms of 10⁹, H100"
    )
    print_table(table(reports))
    document = {
        "origin": origin("cpu"),
        "kernels": [
            asdict(report) | {"programs_at_once": report.programs_at_once} | floors(report)
            for report in reports
        ],
    }
    write_json(arguments.json, document)


def table(reports: list[CompiledKernel]) -> Table:
    """One row per compiled kernel."""
    columns = ["kernel", "LSTM", "target", "dot", "block/warps", "other", "N", "regs", "spill B", "KiB"]
    columns += ["at once", "instr.", "issue ms"]
    rows = []
    for r in reports:
        shape = f"{r.num_layers}x{r.hidden_size}"
        other = [f"maxnreg {r.max_registers}"] * bool(r.max_registers) + ["2 launches"] * (r.launches == 2)
        launched = [f"{r.block}/{r.num_warps}", ", ".join(other), "16 n" if r.divisible else "odd"]
        numbers = [r.registers, r.spill_bytes, f"{r.shared_bytes / 1024:.0f}", r.programs_at_once]
        instructions = f"{r.instructions['total']:.0f}" if r.instructions else "-"
        issue = f"{floors(r)['issue_ms']:.0f}" if floors(r) else "-"
        dot = f"{r.precision}, {r.state_dtype} states"
        rows.append([r.kernel, shape, r.target, dot, *launched, *numbers, instructions, issue])
    return Table(columns, rows)


def floors(report: CompiledKernel) -> dict[str, float]:
    """The least ms for 10⁹ coordinates and steps on an H100 that instructions and special functions allow.

    Computed: all launches, as if 4 instructions were issued in every cycle, or 16 lanes' special functions;
    nothing for other targets.
    """
    if report.target != "sm_90" or not report.instructions:
        return {}
    cycles = {
        "issue_ms": report.instructions["total"] / 4,
        "special_ms": 2 * report.instructions.get("MUFU", 0),
    }
    return {name: round(report.launches * 1e12 * value / H100_CYCLES, 1) for name, value in cycles.items()}


if __name__ == "__main__":
    main()
