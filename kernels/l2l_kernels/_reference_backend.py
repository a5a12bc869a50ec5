"""The reference, with the signature that the backends share."""

from __future__ import annotations

from torch import Tensor

from l2l_kernels import reference
from l2l_kernels.reference import bptt
from l2l_kernels.spec import LSTMSpec

__all__ = ["bptt", "step_"]


def step_(
    theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor, phi: Tensor, spec: LSTMSpec
) -> None:
    """Adds u_t to θ in place and writes s_{t+1} into new_state."""
    new_theta, updated = reference.step(theta, inputs, state, phi, spec)
    theta.copy_(new_theta)
    new_state.copy_(updated)
