"""Compiles the kernels for GPUs that are not there, and reads what the compiler says of them.

Registers and spills decide these kernels' speed and are known without a device: the assembler's log has them.
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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from l2l_kernels.spec import LSTMSpec
from l2l_kernels.triton import configs
from l2l_kernels.triton.bptt import bptt_layer_bwd_kernel
from l2l_kernels.triton.step import step_fwd_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""NVIDIA Ampere (A100) and Hopper (H100), AMD MI300."""

_SCALARS = {
    "inverse_p": "fp32",
    "exp_p": "fp32",
    "output_scale": "fp32",
    "T": "i32",
    "N": "i32",
    "P": "i32",
    "zero": "i32",
}
_STATES = ("state", "new_state", "history", "d_final_state")


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as compiled for one target."""

    kernel: str
    """"step", or "bptt[layer]"."""
    target: str
    num_layers: int
    hidden_size: int
    state_dtype: str
    precision: str
    block: int
    num_warps: int
    registers: int
    """Per thread: 255 at most on NVIDIA, 512 on AMD."""
    spill_bytes: int
    """Stored to memory per thread for want of registers."""
    shared_bytes: int
    """Per program."""


def compile_report(
    spec: LSTMSpec, targets: Iterable[str] = tuple(TARGETS), state_dtype: str = "fp32"
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
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it in a new process")
    for target in targets:
        hip = TARGETS[target].backend == "hip"
        kernels = [("step", step_fwd_kernel, configs.step_config(spec, hip))]
        for layer in reversed(range(spec.num_layers)):
            config = configs.bptt_config(spec, layer, hip)
            kernels.append((f"bptt[{layer}]", bptt_layer_bwd_kernel, config))
        for name, kernel, (constants, options) in kernels:
            registers, spill_bytes, shared_bytes = _compile(kernel, constants, options, target, state_dtype)
            yield CompiledKernel(
                name,
                target,
                spec.num_layers,
                spec.hidden_size,
                state_dtype,
                constants["PRECISION"],
                constants["BLOCK"],
                options["num_warps"],
                registers,
                spill_bytes,
                shared_bytes,
            )


def _compile(
    kernel: Any, constants: dict[str, Any], options: dict[str, Any], target: str, state_dtype: str
) -> tuple[int, int, int]:
    """(registers, spill bytes, shared bytes) of a kernel whose pointers are aligned, as torch's are."""
    signature = {}
    for name in inspect.signature(kernel.fn).parameters:
        pointer = f"*{state_dtype}" if name in _STATES else "*fp32"
        signature[name] = "constexpr" if name in constants else _SCALARS.get(name, pointer)
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, type_ in enumerate(signature.values()) if type_.startswith("*")}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "hip":
        registers = _number(r"\.vgpr_count:\s+(\d+)", compiled.asm["amdgcn"])
        spill_bytes = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
    else:
        log = _ptxas_log(compiled.asm["ptx"], TARGETS[target].arch)
        registers = _number(r"Used (\d+) registers", log)
        spill_bytes = _number(r"(\d+) bytes spill stores", log)
    return registers, spill_bytes, compiled.metadata.shared


def _ptxas_log(ptx: str, arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", path]
        run = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=True)
    return run.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}; has its format changed?")
    return int(match[1])
