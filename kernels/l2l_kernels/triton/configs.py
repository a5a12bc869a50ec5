"""Blocks, warps and the rounding of matrix products, by architecture.

The table is static, and no autotuner fills it: it is deterministic and safe under CUDA graphs, and aot.py
compiles every entry without a device and reports its registers and spills.
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

    The step defaults to "tf32x3": it is bound by memory bandwidth. The backward defaults to "tf32": it is
    bound by arithmetic and registers. Errors ‖a − b‖ / ‖b‖ against float64, 2×20 with float32 states, 100
    steps, emulated by benchmarks/product_precision.py, which truncates TF32's operands as Triton does:

                 θ        s_T      d_φ      d_s_0
        tf32x3   1.6e-7   3.1e-7   7.2e-7   5.9e-7
        tf32     1.5e-4   7.4e-4   1.6e-3   1.3e-3
        bf16     5.6e-4   1.8e-3   2.6e-3   2.3e-3

    They do not grow with the rollout: after 20 steps they are within a factor of two. States stored in
    bfloat16 cost 2.2e-3 in s_T and 9e-4 in d_φ whatever the products are.

    Example:
        >>> precisions.bptt = "tf32x3"  # for a comparison with the reference
    """

    step: Precision = "tf32x3"
    bptt: Precision = "tf32"


precisions = Precisions()
"""The setting in force, for the whole process."""


class Config(NamedTuple):
    """Coordinates per block, and warps per program."""

    block: int
    num_warps: int


Family = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
"""Architectures that share configurations: what decides is how Triton compiles a matrix product."""

# By padded hidden size: Hopper's, and every family's that has none of its own below. The step's blocks
# amortise the weights that each program loads, up to the registers. Eight warps take 128 coordinates: at 64
# two warps do the same arithmetic. Instructions as below, tf32x3 on sm_90: 128/8: 178; 64/4: 190; 128/4: 154,
# but 256 bytes spilled; 32/4: 466. At 64 it multiplies in a LOOP. One to three layers
# of 16, 20 and 64 units spill nothing; at 29 and 32, where less of the padding's arithmetic drops out, up to
# 144 bytes are spilled.
STEP = {16: Config(64, 4), 32: Config(128, 8), 64: Config(16, 8)}
# A block of 16 lets the warps share out the units; larger ones give every warp all of them, and spill. Warp
# instructions per coordinate and step of both layers of 2×20 in tf32 on sm_90 (bytes spilled in each), which
# decide, since the backward is bound by them: 16/4: 285 (0, 0); 16/8: 549 (0, 0); 32/4: 507 (372, 200); 32/8:
# 984 (208, 284); 64/4 and 64/8 spill 936 and more in the upper layer. Leaving that dW to a matrix product of
# stored dz instead: 160 for the upper layer's 153, and the product and its 640 bytes on top.
# At 16 two warps have a matrix instruction's eight units each, and four would do the work twice. At 64 a
# layer's weights, 64 KiB for each of four gates, exceed shared memory: they are not RESIDENT. The weights'
# gradient takes 128 registers of each thread there: sm_80 and sm_90 spill 420 and 504 bytes in the upper
# layer. A launch for half of the gates' gradients spills 100 and 48, but two do everything else twice.
BPTT = {16: Config(16, 2), 32: Config(16, 4), 64: Config(16, 8)}

STEP_OF: dict[Family, dict[int, Config]] = {
    "sm_80": {32: Config(64, 4)},
    # A thread holds all units of a coordinate, so that the compiler drops the padding's arithmetic.
    "sm_100": {32: Config(128, 4)},
    "gfx942": {64: Config(16, 4)},  # with eight warps one layer spills 52 bytes
}
BPTT_OF: dict[Family, dict[int, Config]] = {
    "gfx942": {64: Config(16, 4)},  # 512 registers instead of 256, which spill 1.9 KB
}


def family(device: torch.device | None = None) -> Family:
    """Returns the family of a device; the nearest one for architectures that the table does not name.

    sm_12x has the matrix instructions of sm_80, not those of sm_100. Without a GPU it is Hopper's.
    """
    if torch.version.hip is not None:
        return "gfx942"
    if device is None or device.type != "cuda":
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    return "sm_100" if major in (10, 11) else "sm_80"


def pad(size: int) -> int:
    """Returns the least power of two that holds size and that a matrix product takes (16 or more)."""
    return max(16, 1 << (size - 1).bit_length())


def dot_precision(precision: Precision, family: Family) -> str:
    """Returns the kernels' PRECISION: Triton's input_precision, or "bf16"."""
    return "ieee" if family == "gfx942" and precision != "bf16" else precision


def num_programs(spec: LSTMSpec, N: int, device: torch.device) -> int:
    """Returns how many programs the backward has, each of which leaves a partial sum.

    Two per multiprocessor fit at H ≤ 32.
    """
    blocks: int = -(-N // bptt_config(spec, 0, family(device))[0]["BLOCK"])
    if device.type != "cuda":
        return min(blocks, 2)
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return min(blocks, 2 * multiprocessors)


def step_config(spec: LSTMSpec, family: Family = "sm_90") -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the step kernel's (constants, launch options)."""
    HP = pad(spec.hidden_size)
    config = STEP_OF.get(family, {}).get(HP, STEP[HP])
    constants = _shape(spec) | {
        "HP": HP,
        "BLOCK": config.block,
        "LATE_C": HP == 32 and family == "sm_80",
        "LOOP": HP == 64,
        "PRECISION": dot_precision(precisions.step, family),
    }
    return constants, _options(config)


def bptt_config(
    spec: LSTMSpec, layer: int, family: Family = "sm_90"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the (constants, launch options) of the backward kernel's pass over one layer."""
    HP = pad(spec.hidden_size)
    config = BPTT_OF.get(family, {}).get(HP, BPTT[HP])
    constants = _shape(spec) | {
        "FIRST": layer == 0,
        "TOP": layer == spec.num_layers - 1,
        "HP": HP,
        "KP": pad(spec.layer_inputs(layer) + spec.hidden_size),
        "BLOCK": config.block,
        "PRECISION": dot_precision(precisions.bptt, family),
        "RESIDENT": HP < 64,
    }
    return constants, _options(config)


def _options(config: Config) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def _shape(spec: LSTMSpec) -> dict[str, Any]:
    return {
        "L": spec.num_layers,
        "H": spec.hidden_size,
        "X": spec.num_inputs,
        "PREPROCESSING": spec.preprocessing,
        "TANH_OUTPUT": spec.output == "tanh",
    }


def check_dtypes(float32: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
    """Raises TypeError for a dtype other than float32 or, of states, bfloat16: kernels would misread it."""
    for tensors, allowed in ((float32, (torch.float32,)), (states, (torch.float32, torch.bfloat16))):
        for name, tensor in tensors.items():
            if tensor.dtype not in allowed:
                raise TypeError(
                    f"the triton backend takes {name} as {' or '.join(map(str, allowed))}, "
                    f"got {tensor.dtype}: convert it, or use the backend 'reference', which takes any"
                )
