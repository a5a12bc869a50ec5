"""The Triton implementation, for CUDA and ROCm: `step_` is one launch, `bptt` one launch per layer.

`configs.precisions` says how matrix products round; `aot` compiles every kernel without a GPU.
"""

from l2l_kernels.triton.bptt import bptt
from l2l_kernels.triton.step import step_

__all__ = ["bptt", "step_"]
