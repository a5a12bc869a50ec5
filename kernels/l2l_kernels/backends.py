"""Which implementation runs the operators: chosen by device, overridable, and never changed in silence."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from l2l_kernels.spec import LSTMSpec

BACKENDS = ("triton", "cpu", "reference")
BACKEND_VARIABLE = "L2L_KERNELS_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why and what to set instead."""


class Backend(Protocol):
    """What an implementation provides: a module with these two functions."""

    def step_(
        self, theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor, phi: Tensor, spec: LSTMSpec
    ) -> None:
        """Adds u_t to θ [N] in place and writes s_{t+1} into new_state [L, 2, H, N] (may be state itself)."""

    def bptt(
        self,
        inputs: Tensor,
        history: Tensor,
        d_updates: Tensor,
        d_final_state: Tensor | None,
        phi: Tensor,
        spec: LSTMSpec,
    ) -> tuple[Tensor, Tensor]:
        """As reference.bptt: (d_phi [P], d_initial_state [L, 2, H, N])."""


def choose(device: torch.device, backend: str | None = None) -> str:
    """The backend's name for tensors on a device.

    The argument wins over the variable L2L_KERNELS_BACKEND, which wins over the device's own:
    "triton" on CUDA and ROCm, "cpu" on the CPU, "reference" elsewhere.

    Raises:
        BackendUnavailableError: The name is unknown, or the backend asked for cannot run on the device.
    """
    name = backend or os.environ.get(BACKEND_VARIABLE)
    if not name:
        return {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
    if name not in BACKENDS:
        raise BackendUnavailableError(
            f"unknown kernel backend {name!r}: choose one of {', '.join(BACKENDS)} "
            f"(argument `backend` or variable {BACKEND_VARIABLE})"
        )
    reason = why_not(name, device)
    if reason:
        raise BackendUnavailableError(f"kernel backend {name!r} cannot run on {device}: {reason}")
    return name


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, or None if it can."""
    if name == "cpu" and device.type != "cpu":
        return "its tensors must be on the CPU"
    if name == "triton":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it needs a CUDA or ROCm device (or TRITON_INTERPRET=1, for tests)"
    return None


@cache
def load(name: str) -> Backend:
    """The implementation behind a name, imported when first used."""
    module: ModuleType
    if name == "triton":
        import l2l_kernels.triton as module
    elif name == "cpu":
        import l2l_kernels.cpu as module
    else:
        import l2l_kernels._reference_backend as module
    return cast(Backend, module)
