"""The Triton implementation, for CUDA and ROCm.

`step_` is one launch, `bptt` one per layer, `nominal_step` one for tensors of one dtype and one for sums.
`configs.precisions` says how matrix products round; `aot` compiles every kernel without a GPU.
"""

from l2l_kernels.reference import nominal_sizes
from l2l_kernels.triton.bptt import bptt
from l2l_kernels.triton.nominal import nominal_step, nominal_sums
from l2l_kernels.triton.step import step_

__all__ = ["bptt", "nominal_sizes", "nominal_step", "nominal_sums", "step_"]
