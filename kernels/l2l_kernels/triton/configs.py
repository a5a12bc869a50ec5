"""What each architecture is compiled with: blocks, warps and the rounding of matrix products.

A static table, not an autotuner: it is deterministic, safe under CUDA graphs, and every entry is compiled
without a device by aot.py, which reports its registers and spills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from l2l_kernels.spec import LSTMSpec

Precision = Literal["tf32", "tf32x3", "bf16"]


@dataclass
class Precisions:
    """How matrix products round their operands; they accumulate in float32, and all else is float32.

    "tf32x3": three TF32 products, as exact as float32. "tf32": one, 10 bits of mantissa. "bf16": 7 bits, half
    the shared memory. AMD's matrix cores multiply float32 itself, so there "tf32" and "tf32x3" both do that.

    The step defaults to "tf32x3": it is bound by memory bandwidth, and its errors would compound along the
    rollout. The backward defaults to "tf32": it is bound by arithmetic and registers, and its errors (about
    1e-3 of the gradient, less than a minibatch's noise) go no further than one meta-gradient.

    Example:
        >>> precisions.bptt = "tf32x3"  # for a comparison with the reference
    """

    step: Precision = "tf32x3"
    bptt: Precision = "tf32"


precisions = Precisions()
"""The setting in force, for the whole process."""


class Config(NamedTuple):
    """Coordinates per block and warps per program."""

    block: int
    num_warps: int


def is_hip() -> bool:
    """Whether torch was built for AMD's GPUs."""
    return torch.version.hip is not None


def pad(size: int) -> int:
    """The power of two ≥ 16 (the least that a matrix product takes) that holds size."""
    return max(16, 1 << (size - 1).bit_length())


def dot_precision(precision: Precision, hip: bool) -> str:
    """The kernels' PRECISION: Triton's input_precision, or "bf16"."""
    return "ieee" if hip and precision != "bf16" else precision


def num_programs(spec: LSTMSpec, N: int, device: torch.device) -> int:
    """Programs of the backward: as many as the device runs at once, since each leaves a partial sum."""
    blocks: int = -(-N // bptt_config(spec, 0)[0]["BLOCK"])
    if device.type != "cuda":
        return min(blocks, 2)
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return min(blocks, 2 * multiprocessors)


def step_config(spec: LSTMSpec, hip: bool | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The step kernel's (constants, launch options)."""
    hip = is_hip() if hip is None else hip
    HP = pad(spec.hidden_size)
    config = Config(64, 4)
    return _shape(spec) | {
        "HP": HP,
        "BLOCK": config.block,
        "PRECISION": dot_precision(precisions.step, hip),
    }, {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def bptt_config(spec: LSTMSpec, layer: int, hip: bool | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The backward kernel's (constants, launch options) for one layer's pass."""
    hip = is_hip() if hip is None else hip
    config = Config(16, 4)
    return _shape(spec) | {
        "FIRST": layer == 0,
        "TOP": layer == spec.num_layers - 1,
        "HP": pad(spec.hidden_size),
        "KP": pad(spec.layer_inputs(layer) + spec.hidden_size),
        "BLOCK": config.block,
        "PRECISION": dot_precision(precisions.bptt, hip),
        "RESIDENT": pad(spec.hidden_size) < 64,
    }, {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def _shape(spec: LSTMSpec) -> dict[str, Any]:
    return {"L": spec.num_layers, "H": spec.hidden_size, "LOG_SIGN": spec.preprocessing == "log_sign"}


def check_dtypes(float32: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
    """Refuses what the kernels would misread.

    Raises:
        TypeError: A dtype other than float32, or, for states, float32 or bfloat16.
    """
    for tensors, allowed in ((float32, (torch.float32,)), (states, (torch.float32, torch.bfloat16))):
        for name, tensor in tensors.items():
            if tensor.dtype not in allowed:
                raise TypeError(
                    f"the triton backend takes {name} as {' or '.join(map(str, allowed))}, "
                    f"got {tensor.dtype}: convert it, or use the backend 'reference', which takes any"
                )
