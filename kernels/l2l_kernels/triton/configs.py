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

    "tf32x3": three TF32 products, nearly as exact as float32. "tf32": one, of 10-bit mantissas. "bf16": 7-bit
    ones, in half the shared memory. AMD's matrix cores multiply float32 itself: there the first two do that.

    The step defaults to "tf32x3": it is bound by memory bandwidth, and its errors would compound along the
    rollout. The backward defaults to "tf32": it is bound by arithmetic and registers, and its errors, of the
    order of 2^-11 a product, go no further than one meta-gradient.

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


# By padded hidden size. The step's blocks amortise the weights that each program loads, up to the registers.
STEP = {16: Config(64, 4), 32: Config(64, 8), 64: Config(16, 8)}
# A block of 16 lets the warps share out the units; larger ones give every warp all of them, and spill.
# At 64 a layer's weights, 64 KiB for each of four gates, exceed shared memory: they are not RESIDENT.
BPTT = {16: Config(16, 4), 32: Config(16, 4), 64: Config(16, 8)}


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
    """Programs of the backward: two per multiprocessor, as fit at H ≤ 32, since each leaves a partial sum."""
    blocks: int = -(-N // bptt_config(spec, 0)[0]["BLOCK"])
    if device.type != "cuda":
        return min(blocks, 2)
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return min(blocks, 2 * multiprocessors)


def step_config(spec: LSTMSpec, hip: bool | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The step kernel's (constants, launch options); hip is this process's own platform by default."""
    hip = is_hip() if hip is None else hip
    HP = pad(spec.hidden_size)
    config = STEP[HP]
    constants = _shape(spec) | {
        "HP": HP,
        "BLOCK": config.block,
        "PRECISION": dot_precision(precisions.step, hip),
    }
    return constants, _options(config)


def bptt_config(spec: LSTMSpec, layer: int, hip: bool | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """As step_config, for the backward kernel's pass over one layer."""
    hip = is_hip() if hip is None else hip
    HP = pad(spec.hidden_size)
    config = BPTT[HP]
    constants = _shape(spec) | {
        "FIRST": layer == 0,
        "TOP": layer == spec.num_layers - 1,
        "HP": HP,
        "KP": pad(spec.layer_inputs(layer) + spec.hidden_size),
        "BLOCK": config.block,
        "PRECISION": dot_precision(precisions.bptt, hip),
        "RESIDENT": HP < 64,
    }
    return constants, _options(config)


def _options(config: Config) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True}


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
