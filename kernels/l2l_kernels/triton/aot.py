"""Compiles the kernels for GPUs that are not there.

Their binaries tell registers, spills and instructions, which decide these kernels' speed.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from l2l_kernels.spec import Coefficients, LSTMSpec
from l2l_kernels.triton import configs, nominal
from l2l_kernels.triton.bptt import bptt_layer_bwd_kernel
from l2l_kernels.triton.step import step_kernel

TARGETS: dict[configs.Family, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
"""NVIDIA Ampere (A100; RTX 30 and, like it, Ada), Hopper (H100) and Blackwell (B200), AMD MI300 and RX 7000:
one for each family of configs.py."""


class Limits(NamedTuple):
    """What a device has, as its maker says."""

    registers: int
    """Of a thread."""
    shared_kib: int
    """Of a program."""
    shared_kib_of_all: int
    """Of all programs on a multiprocessor or compute unit."""
    warps: int
    """On a multiprocessor at once."""


LIMITS: dict[configs.Family, Limits] = {
    "sm_80": Limits(255, 163, 164, 64),
    "sm_86": Limits(255, 99, 100, 48),
    "sm_90": Limits(255, 227, 228, 64),
    "sm_100": Limits(255, 227, 228, 64),
    "gfx942": Limits(512, 64, 64, 32),
    "gfx1100": Limits(256, 64, 64, 32),
}

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
        precision: Of matrix products, or "none".
        max_registers: Of a thread, where the compiler is given a limit.
        launches: 2 where each has half of the gates' weight gradients; all else is of one of them.
        divisible: Whether N is a multiple of 16, which Triton compiles to wider accesses; of "nominal",
            whether its tensors are aligned.
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
    max_registers: int | None
    launches: int
    divisible: bool
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, float]

    @property
    def programs_at_once(self) -> int:
        """How many a multiprocessor or compute unit holds at once."""
        limits = LIMITS[cast(configs.Family, self.target)]
        if self.target.startswith("gfx"):
            # Of a SIMD unit: registers of 64 lanes, by four units; of 32 lanes, in steps of 24, by two.
            wide = self.target == "gfx942"
            waves = 4 * (512 // self.registers) if wide else 2 * (1536 // (-(-self.registers // 24) * 24))
            shared = self.shared_bytes
        else:
            waves = 65536 // (32 * 8 * -(-self.registers // 8))
            shared = self.shared_bytes + 1024  # which every program needs
        fit = 1024 * limits.shared_kib_of_all // max(shared, 1)
        return min(min(waves, limits.warps) // self.num_warps, fit)


def compile_report(
    spec: LSTMSpec,
    targets: Iterable[configs.Family] = tuple(TARGETS),
    state_dtype: str = "fp32",
    divisible: Sequence[bool] = (True, False),
    alternatives: bool = False,
) -> Iterator[CompiledKernel]:
    """Compiles the step and every layer's backward, as configs.py has them, for each target.

    Args:
        spec: The LSTM's shape.
        targets: Keys of TARGETS.
        state_dtype: "fp32" or "bf16", of the stored states.
        divisible: For numbers of coordinates that are multiples of 16 (True), that are not (False), or both.
        alternatives: Every configuration of `configs.ALTERNATIVES`, in place of the table's own.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so there is nothing to compile.

    Example:
        >>> [report] = [r for r in compile_report(LSTMSpec(), ["sm_90"]) if r.kernel == "step"]
        >>> report.spill_bytes
        0
    """
    _refuse_the_interpreter()
    for target in targets:
        for name, layer in [("step", 0), *((f"bptt[{i}]", i) for i in reversed(range(spec.num_layers)))]:
            of = configs.ALTERNATIVES["step" if name == "step" else "bptt"] if alternatives else [None]
            for config, multiple in itertools.product(of, divisible):
                if config is None or config.max_registers is None or not target.startswith("gfx"):
                    yield _report(name, layer, config, spec, target, state_dtype, multiple)


def _report(
    name: str,
    layer: int,
    config: configs.Config | None,
    spec: LSTMSpec,
    target: configs.Family,
    state_dtype: str,
    divisible: bool,
) -> CompiledKernel:
    if name == "step":
        constants, options = configs.step_config(spec, target, config)
        kernel = step_kernel(constants)
    else:
        constants, options = configs.bptt_config(spec, layer, target, config)
        kernel = bptt_layer_bwd_kernel
    compiled = compile_kernel(kernel, constants, options, target, state_dtype, divisible)
    registers, spill_bytes, program = _read(compiled, target)
    if name == "step":
        program = program if "HP" in constants else _repeated(program, spec.hidden_size)
    elif program:
        program = _innermost_loop(program)
    if constants.get("LOOP", not constants.get("RESIDENT", True)):
        program = []  # instructions in a loop are executed more often than they are there
    block, warps = constants["BLOCK"], options["num_warps"]
    shape = (name, target, spec.num_layers, spec.hidden_size, state_dtype, constants.get("PRECISION", "none"))
    launches = 1 if constants.get("GATES", "all") == "all" else 2
    used = (registers, spill_bytes, compiled.metadata.shared, _count(program, warps / block))
    return CompiledKernel(*shape, block, warps, options.get("maxnreg"), launches, divisible, *used)


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
    shape = ("nominal", target, 0, 0, "fp32", "none", nominal.BLOCK, warps, None, 1, aligned)
    return CompiledKernel(*shape, registers, spill_bytes, compiled.metadata.shared, counts)


def _refuse_the_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it in a new process")


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    options: dict[str, Any],
    target: configs.Family,
    state_dtype: str,
    divisible: bool = False,
) -> Any:
    """Returns Triton's compiled kernel, for aligned pointers, as torch's are, and N that 16 divides if so."""
    signature = {}
    for name in inspect.signature(kernel.fn).parameters:
        pointer = f"*{state_dtype}" if name in _STATES else "*fp32"
        signature[name] = "constexpr" if name in constants else _SCALARS.get(name, pointer)
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, (name, type_) in enumerate(signature.items())
        if type_.startswith("*") or (name == "N" and divisible)
    }
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


def _loops(program: list[str]) -> Iterator[slice]:
    """Yields the stretches that a branch back repeats."""
    labels: dict[str, int] = {}
    for i, line in enumerate(program):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = i
        elif branch := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line):
            start = labels.get(branch[1], i)
            if start < i - 1:  # the last line of a program branches to itself
                yield slice(start, i + 1)


def _innermost_loop(program: list[str]) -> list[str]:
    """Returns the shortest stretch that a branch back repeats and that multiplies matrices; else all."""
    loops = (program[loop] for loop in _loops(program))
    multiplying = [loop for loop in loops if any(re.search(_KINDS["matrix"], line) for line in loop)]
    return min(multiplying, key=len, default=program)


def _repeated(program: list[str], times: int) -> list[str]:
    """Returns a program whose loops, none within another, are written out so many times."""
    written, end = [], 0
    for loop in _loops(program):
        written += program[end : loop.start] + times * program[loop]
        end = loop.stop
    return written + program[end:]


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
