"""Compiles the kernels for GPUs that are not there.

Their binaries tell registers, spills and instructions, which decide these kernels' speed.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from l2l_kernels.spec import Coefficients, LSTMSpec
from l2l_kernels.triton import configs, nominal
from l2l_kernels.triton.bptt import bptt_layer_bwd_kernel
from l2l_kernels.triton.step import step_fwd_kernel

TARGETS: dict[configs.Family, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""NVIDIA Ampere (A100), Hopper (H100) and Blackwell (B200), AMD MI300; one for each family of configs.py."""

_SCALARS = dict.fromkeys(("inverse_p", "exp_p", "output_scale"), "fp32")
_SCALARS |= dict.fromkeys(("T", "N", "P", "zero"), "i32")
_SCALARS |= dict.fromkeys((*Coefficients._fields, "sign"), "fp32")
_SCALARS |= {"tensors": "*i64", "owner": "*i32", "partials": "*fp64"}  # of the nominal step
_STATES = ("state", "new_state", "history", "d_final_state")


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as compiled for one target.

    Args:
        kernel: "step", "bptt[layer]" or "nominal", which has no layers, and no matrix products.
        registers: Per thread: 255 at most on NVIDIA, 512 on AMD.
        spill_bytes: Stored to memory per thread for want of registers.
        shared_bytes: Shared memory per program.
        instructions: Warp instructions per coordinate and step, "total" and by kind, on NVIDIA only: those
            of the whole `step` and of `bptt`'s loop over the steps; none at 64 units, where both loop within.
    """

    kernel: str
    target: str
    num_layers: int
    hidden_size: int
    state_dtype: str
    precision: str
    block: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, float]


def compile_report(
    spec: LSTMSpec, targets: Iterable[configs.Family] = tuple(TARGETS), state_dtype: str = "fp32"
) -> Iterator[CompiledKernel]:
    """Compiles the step and every layer's backward, as configs.py has them, for each target.

    Args:
        spec: The LSTM's shape.
        targets: Keys of TARGETS.
        state_dtype: "fp32" or "bf16", of the stored states.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so there is nothing to compile.

    Example:
        >>> [report] = [r for r in compile_report(LSTMSpec(), ["sm_90"]) if r.kernel == "step"]
        >>> report.spill_bytes
        0
    """
    _refuse_the_interpreter()
    for target in targets:
        kernels = [("step", step_fwd_kernel, configs.step_config(spec, target))]
        for layer in reversed(range(spec.num_layers)):
            config = configs.bptt_config(spec, layer, target)
            kernels.append((f"bptt[{layer}]", bptt_layer_bwd_kernel, config))
        for name, kernel, (constants, options) in kernels:
            compiled = compile_kernel(kernel, constants, options, target, state_dtype)
            registers, spill_bytes, program = _read(compiled, target)
            if constants.get("LOOP", not constants.get("RESIDENT", True)):
                program = []  # instructions in a loop are executed more often than they are there
            counted = program if name == "step" else _innermost_loop(program)
            shape = (name, target, spec.num_layers, spec.hidden_size, state_dtype)
            precision, block, warps = constants["PRECISION"], constants["BLOCK"], options["num_warps"]
            used = (registers, spill_bytes, compiled.metadata.shared, _count(counted, warps / block))
            yield CompiledKernel(*shape, precision, block, warps, *used)


def compile_nominal(target: configs.Family, aligned: bool = True, shared: bool = False) -> CompiledKernel:
    """Compiles the nominal step of float32 tensors, all of which are aligned or not.

    Raises:
        RuntimeError: As compile_report.
    """
    _refuse_the_interpreter()
    constants = nominal.constants(torch.float32, torch.float32, update=True, shared=shared, aligned=aligned)
    compiled = compile_kernel(nominal.nominal_step_kernel, constants, nominal.OPTIONS, target, "fp32")
    registers, spill_bytes, program = _read(compiled, target)
    warps = nominal.OPTIONS["num_warps"]
    counts = _count(program, warps / nominal.BLOCK)
    shape = ("nominal", target, 0, 0, "fp32", "none", nominal.BLOCK, warps)
    return CompiledKernel(*shape, registers, spill_bytes, compiled.metadata.shared, counts)


def _refuse_the_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it in a new process")


def compile_kernel(
    kernel: Any, constants: dict[str, Any], options: dict[str, Any], target: configs.Family, state_dtype: str
) -> Any:
    """Returns Triton's compiled kernel, for pointers that are aligned, as torch's are."""
    signature = {}
    for name in inspect.signature(kernel.fn).parameters:
        pointer = f"*{state_dtype}" if name in _STATES else "*fp32"
        signature[name] = "constexpr" if name in constants else _SCALARS.get(name, pointer)
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, type_ in enumerate(signature.values()) if type_.startswith("*")}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def _read(compiled: Any, target: configs.Family) -> tuple[int, int, list[str]]:
    """Reads (registers, spill bytes, SASS lines, none on AMD) off the binary that would be loaded."""
    if TARGETS[target].backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        return registers, 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", path)
        program = [line.strip() for line in _run(triton.knobs.nvidia.nvdisasm.path, "-c", path).splitlines()]
    stores = (re.search(r"\bSTL(?:\.\w+)*?(?:\.(64|128))?\s", line) for line in program)
    spill_bytes = sum(int(store[1] or 32) // 8 for store in stores if store)
    return _number(r"REG:(\d+)", usage), spill_bytes, program


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*);")
_KINDS = {
    "matrix": r"HMMA|HGMMA|UTC\w*MMA",
    "MUFU": r"MUFU",
    "float": r"FADD|FMUL|FFMA|FSEL|FSETP|FMNMX|F2F|HADD",
    "shared": r"LDS|STS|LDSM|STSM",
    "global": r"LDG|STG",
    "local": r"LDL|STL",
    "barrier": r"BAR|WARPSYNC",
    "shuffle": r"SHFL|PRMT|SEL",
}


def _innermost_loop(program: list[str]) -> list[str]:
    """Returns the shortest stretch that a branch back repeats and that multiplies matrices; else all."""
    labels: dict[str, int] = {}
    loops = []
    for i, line in enumerate(program):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = i
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and branch[1] in labels:
            loop = program[labels[branch[1]] : i + 1]
            if any(re.search(_KINDS["matrix"], instruction) for instruction in loop):
                loops.append(loop)
    return min(loops, key=len, default=program)


def _count(program: list[str], warps_per_coordinate: float) -> dict[str, float]:
    """Counts warp instructions per coordinate by kind; none of an empty program."""
    opcodes = [match[1] for line in program if (match := _INSTRUCTION.search(line))]
    counts = {"total": len(opcodes)} if opcodes else {}
    for opcode in opcodes:
        kind = next((kind for kind, pattern in _KINDS.items() if re.match(pattern, opcode)), "other")
        counts[kind] = counts.get(kind, 0) + 1
    return {kind: round(count * warps_per_coordinate, 1) for kind, count in counts.items()}


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}; has its format changed?")
    return int(match[1])
