"""The CPU implementation. (Being written: the reference stands in.)"""

from l2l_kernels._reference_backend import bptt, step_

__all__ = ["bptt", "step_"]
