"""Fused operators for learned optimizers: the coordinatewise LSTM's step and backward, and the nominal step.

`reference` is the definition; `step_`, `step`, `bptt` and `nominal_step` dispatch to the fused
implementation of the device.
"""

from l2l_kernels.backends import BACKEND_VARIABLE, BACKENDS, BackendUnavailableError, choose
from l2l_kernels.nominal import nominal_sizes, nominal_step, nominal_sums
from l2l_kernels.ops import bptt, step, step_
from l2l_kernels.spec import Coefficients, LSTMSpec, SizeHead

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "BackendUnavailableError",
    "Coefficients",
    "LSTMSpec",
    "SizeHead",
    "bptt",
    "choose",
    "nominal_sizes",
    "nominal_step",
    "nominal_sums",
    "step",
    "step_",
]
