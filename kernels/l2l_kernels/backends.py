"""Which implementation runs the operators: chosen by device, overridable, and never changed in silence."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from l2l_kernels.spec import LSTMSpec, SizeHead

BACKENDS = ("triton", "cpu", "reference")
BACKEND_VARIABLE = "L2L_KERNELS_BACKEND"
LEAST_CAPABILITY = (8, 0)
"""Of NVIDIA's devices: those before have no matrix products in TF32, and too little shared memory."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why and what to set instead."""


class Backend(Protocol):
    """An implementation: a module with these functions."""

    step_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, LSTMSpec], None]
    """Does what `reference.step_` does; new_state [L, 2, H, N] may be state itself."""
    bptt: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, LSTMSpec], tuple[Tensor, Tensor]]
    """Does what `reference.bptt` does."""
    nominal_step: Callable[..., Tensor]
    """Does what `reference.nominal_step` does."""
    nominal_sizes: Callable[[Tensor, Tensor, Tensor, SizeHead], Tensor]
    """Does what `reference.nominal_sizes` does."""
    nominal_sums: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
    """Does what `reference.nominal_sums` does, and gives the very sums that nominal_step gave."""


def choose(device: torch.device, backend: str | None = None) -> str:
    """Returns the name of the backend for tensors on a device.

    The argument wins over the variable L2L_KERNELS_BACKEND, which wins over the device's own: "triton" on
    CUDA and ROCm, "cpu" on the CPU, "reference" elsewhere, and, with a warning, on a GPU that the Triton
    kernels cannot use.

    Raises:
        BackendUnavailableError: The name is unknown, or the backend asked for cannot run on the device.
    """
    name = backend or os.environ.get(BACKEND_VARIABLE)
    if not name:
        return _own(device)
    if name not in BACKENDS:
        raise BackendUnavailableError(
            f"unknown kernel backend {name!r}: choose one of {', '.join(BACKENDS)} "
            f"(argument `backend` or variable {BACKEND_VARIABLE})"
        )
    reason = why_not(name, device)
    if reason:
        raise BackendUnavailableError(f"kernel backend {name!r} cannot run on {device}: {reason}")
    return name


@cache
def _own(device: torch.device) -> str:
    """Returns the backend of a device where none is asked for; warns once of what its kind would have."""
    name = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
    if name == "triton" and (reason := why_not(name, device)):
        warnings.warn(
            f"the Triton kernels cannot run on {device} ({reason}): the readable reference does, slower. "
            f"{BACKEND_VARIABLE}=reference says so beforehand",
            stacklevel=3,
        )
        return "reference"
    return name


def why_not(name: str, device: torch.device) -> str | None:
    """Says why a backend cannot run on a device; None if it can."""
    if name == "cpu" and device.type != "cpu":
        return "its tensors must be on the CPU"
    if name == "triton":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it needs a CUDA or ROCm device (or TRITON_INTERPRET=1, for tests)"
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(device)
            if capability < LEAST_CAPABILITY:
                needed, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
                return f"it needs compute capability {needed}, which is {found} here"
    return None


@cache
def load(name: str) -> Backend:
    """Imports the implementation behind a name when it is first used."""
    modules = {"triton": "l2l_kernels.triton", "cpu": "l2l_kernels.cpu", "reference": "l2l_kernels.reference"}
    return cast(Backend, importlib.import_module(modules[name]))
