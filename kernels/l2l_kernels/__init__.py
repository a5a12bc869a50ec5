"""Fused operators for the coordinatewise LSTM of a learned optimizer: one step, and a window's backward.

`reference` is the definition; `step_`, `step` and `bptt` dispatch to the fused implementation of the device.
"""

from l2l_kernels.backends import BACKEND_VARIABLE, BACKENDS, BackendUnavailableError, choose
from l2l_kernels.ops import bptt, step, step_
from l2l_kernels.spec import LSTMSpec

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "BackendUnavailableError",
    "LSTMSpec",
    "bptt",
    "choose",
    "step",
    "step_",
]
