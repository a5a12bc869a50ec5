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
"""The setting in force, for the whole process, where a spec has no precision of its own."""


class Config(NamedTuple):
    """How a kernel is launched."""

    block: int
    """Coordinates of a program, at a time."""
    num_warps: int
    max_registers: int | None = None
    """The most of a thread, on NVIDIA only; beyond them the compiler spills."""
    lanes: bool = False
    """Of the step: by lanes.py, in float32, and not in tiles."""
    launches: int = 1
    """Of a layer's backward: 2 have half of the gates' weight gradients each, in half the registers."""


Family = Literal["sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "gfx1100"]
"""Architectures that share configurations: what decides is how Triton compiles a matrix product, and how much
shared memory a program may have."""

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

# Two coordinates of a lane share the loads of the weights. Warp instructions a coordinate on sm_90, in lanes
# and in tiles 128/4: 1×4: 12, 39; 2×4: 23, 76; 1×8: 37, 40; 2×8: 80, 79; 2×20: 362, 171 (128/8).
LANES = Config(256, 4, lanes=True)
LARGEST_IN_LANES = 4
"""Units of a layer up to which the step is computed in lanes."""

STEP_OF: dict[Family, dict[int, Config]] = {
    "sm_80": {32: Config(64, 4)},
    "sm_86": {32: Config(64, 4)},
    # A thread holds all units of a coordinate, so that the compiler drops the padding's arithmetic.
    "sm_100": {32: Config(128, 4)},
    "gfx942": {64: Config(16, 4)},  # with eight warps one layer spills 52 bytes
    # Without matrix products of float32 tiles spill 3 KB at 2×20, and lanes nothing. At 64 units both spill,
    # and lanes take minutes to compile.
    "gfx1100": {16: LANES, 32: Config(128, 4, lanes=True)},
}
BPTT_OF: dict[Family, dict[int, Config]] = {
    "gfx942": {64: Config(16, 4)},  # 512 registers instead of 256, which spill 1.9 KB
}


ALTERNATIVES: dict[Literal["step", "bptt"], list[Config]] = {
    "step": [
        *(Config(64, 4), Config(64, 4, 168), Config(64, 4, 128), Config(128, 8), Config(128, 8, 128)),
        *(Config(128, 4), Config(32, 4), Config(256, 4, lanes=True), Config(512, 4, lanes=True)),
    ],
    "bptt": [
        *(Config(16, 4), Config(16, 4, 168), Config(64, 4), Config(64, 4, launches=2)),
        *(Config(32, 4), Config(32, 4, launches=2), Config(64, 8, launches=2), Config(16, 2)),
    ],
}
"""What `benchmarks/kernel_throughput.py --sweep` times on a device, and compile_report.py counts without one,
the likeliest first."""

# As registers and shared memory have it, whether 16 divides N or not (compiled by Triton 3.8).
PROGRAMS: dict[tuple[Family, int] | tuple[Family, int, Precision], tuple[int, int]] = {
    ("sm_80", 16): (4, 4),
    ("sm_80", 32): (2, 2),
    ("sm_80", 32, "tf32x3"): (2, 1),
    ("sm_86", 16): (4, 4),
    ("sm_86", 16, "tf32x3"): (3, 2),
    ("sm_86", 32): (2, 1),
    ("sm_86", 32, "tf32x3"): (2, 2),
    ("sm_86", 32, "bf16"): (3, 2),
    ("sm_90", 16): (4, 4),
    ("sm_90", 32): (3, 2),
    ("sm_90", 32, "tf32x3"): (2, 1),
    ("sm_100", 16): (4, 4),
    ("sm_100", 32): (3, 2),
    ("sm_100", 32, "tf32x3"): (2, 1),
    ("gfx942", 16): (4, 4),
    ("gfx1100", 16): (5, 5),
    ("gfx1100", 32): (2, 2),
}
"""How many programs of the first layer's backward, and of another's, a multiprocessor holds at once, by
family and padded units, and precision where it differs; 1 where nothing is said."""


def family(device: torch.device | None = None) -> Family:
    """Returns the family of a device; the nearest one for architectures that the table does not name.

    sm_89 and sm_12x have the matrix instructions and the 99 KiB of shared memory of sm_86. Without a GPU it
    is Hopper's.
    """
    if device is not None and device.type == "cuda":
        if torch.version.hip is not None:
            name = torch.cuda.get_device_properties(device).gcnArchName
            return "gfx942" if name.startswith("gfx9") else "gfx1100"
        return family_of(torch.cuda.get_device_capability(device))
    return "sm_90" if torch.version.hip is None else "gfx942"


def family_of(capability: tuple[int, int]) -> Family:
    """Returns the family of NVIDIA's devices of a compute capability.

    Example:
        >>> family_of((8, 9))
        'sm_86'
    """
    if capability in ((8, 0), (8, 7)):
        return "sm_80"
    families: dict[int, Family] = {9: "sm_90", 10: "sm_100", 11: "sm_100"}
    return families.get(capability[0], "sm_86")


def pad(size: int) -> int:
    """Returns the least power of two that holds size and that a matrix product takes (16 or more)."""
    return max(16, 1 << (size - 1).bit_length())


def dot_precision(precision: Precision, family: Family) -> str:
    """Returns the kernels' PRECISION: Triton's input_precision, or "bf16"."""
    return "ieee" if family.startswith("gfx") and precision != "bf16" else precision


def num_programs(spec: LSTMSpec, layer: int, N: int, device: torch.device) -> int:
    """Returns how many programs a layer's backward has, each of which leaves a partial sum."""
    blocks: int = -(-N // bptt_config(spec, layer, family(device))[0]["BLOCK"])
    if device.type != "cuda":
        return min(blocks, 2)
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return min(blocks, programs_at_once(spec, layer, family(device)) * multiprocessors)


def programs_at_once(spec: LSTMSpec, layer: int, family: Family) -> int:
    """Returns how many programs of a layer's backward a multiprocessor holds at once."""
    HP = pad(spec.hidden_size)
    precision = spec.precision or precisions.bptt
    first, others = PROGRAMS.get((family, HP, precision)) or PROGRAMS.get((family, HP), (1, 1))
    return first if layer == 0 else others


def step_config(
    spec: LSTMSpec, family: Family = "sm_90", config: Config | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the step kernel's (constants, launch options); of the kernel in tiles if there is an "HP"."""
    HP = pad(spec.hidden_size)
    if config is None and spec.hidden_size <= LARGEST_IN_LANES:
        config = LANES
    config = config or STEP_OF.get(family, {}).get(HP, STEP[HP])
    if config.lanes and spec.precision is not None:
        config = STEP[HP]  # lanes multiply in float32, whatever is asked for
    constants = _shape(spec) | {"BLOCK": config.block}
    if config.lanes:
        return constants, _options(config)
    constants |= {
        "HP": HP,
        "LATE_C": HP == 32 and family in ("sm_80", "sm_86"),
        "LOOP": HP == 64,
        "PRECISION": dot_precision(spec.precision or precisions.step, family),
    }
    return constants, _options(config)


def bptt_config(
    spec: LSTMSpec, layer: int, family: Family = "sm_90", config: Config | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the (constants, launch options) of the backward kernel's pass over one layer.

    The constant GATES names those whose weight gradients a launch has, "if" or "go", or "all".
    """
    HP = pad(spec.hidden_size)
    config = config or BPTT_OF.get(family, {}).get(HP, BPTT[HP])
    PRECISION = dot_precision(spec.precision or precisions.bptt, family)
    constants = _shape(spec) | {
        "FIRST": layer == 0,
        "TOP": layer == spec.num_layers - 1,
        "HP": HP,
        "KP": pad(spec.layer_inputs(layer) + spec.hidden_size),
        "BLOCK": config.block,
        "PRECISION": PRECISION,
        "GATES": "all" if config.launches == 1 else "if",
        "RESIDENT": HP < 64 and not (HP == 32 and PRECISION == "tf32x3" and family == "sm_86"),
    }
    return constants, _options(config)


def _options(config: Config) -> dict[str, Any]:
    limit = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    return {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True} | limit


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
