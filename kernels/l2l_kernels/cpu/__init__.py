"""The CPU implementation: kernels.cpp, compiled when first used, on as many threads as torch uses.

Arithmetic is in float64 if φ is, else in float32. Without a C++ compiler a warning says so, once, and the
reference runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_kernels import _reference_backend as reference
from l2l_kernels.cpu import library
from l2l_kernels.spec import LSTMSpec

__all__ = ["bptt", "step_"]


def step_(
    theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor, phi: Tensor, spec: LSTMSpec
) -> None:
    """Adds u_t to θ [N] in place and writes s_{t+1} into new_state [L, 2, H, N] (may be state itself)."""
    kernels = library.load()
    if kernels is None:
        return reference.step_(theta, inputs, state, new_state, phi, spec)
    dtype, stored = _dtypes(phi, state)
    inputs, source, phi = _contiguous(inputs, dtype), _contiguous(state, stored), _contiguous(phi, dtype)
    updated = _contiguous(theta, dtype)
    target = new_state if _fits(new_state, stored) else torch.empty(new_state.shape, dtype=stored)
    getattr(kernels, _variant("step", dtype, stored))(
        torch.get_num_threads(),
        _constants(spec),
        theta.shape[0],
        updated.data_ptr(),
        inputs.data_ptr(),
        source.data_ptr(),
        target.data_ptr(),
        phi.data_ptr(),
    )
    if updated is not theta:
        theta.copy_(updated)
    if target is not new_state:
        new_state.copy_(target)


def bptt(
    inputs: Tensor,
    history: Tensor,
    d_updates: Tensor,
    d_final_state: Tensor | None,
    phi: Tensor,
    spec: LSTMSpec,
) -> tuple[Tensor, Tensor]:
    """As reference.bptt: (d_phi [P], d_initial_state [L, 2, H, N])."""
    kernels = library.load()
    if kernels is None:
        return reference.bptt(inputs, history, d_updates, d_final_state, phi, spec)
    dtype, stored = _dtypes(phi, history)
    inputs, d_updates, weights = (_contiguous(tensor, dtype) for tensor in (inputs, d_updates, phi))
    history = _contiguous(history, stored)
    d_final = None if d_final_state is None else _contiguous(d_final_state, dtype)
    d_phi, d_initial_state = torch.empty_like(weights), torch.empty(history.shape[1:], dtype=dtype)
    getattr(kernels, _variant("bptt", dtype, stored))(
        torch.get_num_threads(),
        _constants(spec),
        d_updates.shape[1],
        d_updates.shape[0],
        inputs.data_ptr(),
        history.data_ptr(),
        d_updates.data_ptr(),
        None if d_final is None else d_final.data_ptr(),
        weights.data_ptr(),
        d_phi.data_ptr(),
        d_initial_state.data_ptr(),
    )
    return d_phi.to(phi.dtype), d_initial_state.to(phi.dtype)


def _dtypes(phi: Tensor, state: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the arithmetic and of the state that the kernels read: its own if they can."""
    dtype = torch.float64 if phi.dtype == torch.float64 else torch.float32
    bfloat16 = state.dtype == torch.bfloat16 and dtype == torch.float32
    return dtype, torch.bfloat16 if bfloat16 else dtype


def _variant(name: str, dtype: torch.dtype, stored: torch.dtype) -> str:
    return f"{name}_{dtype}_{stored}".replace("torch.", "")


def _constants(spec: LSTMSpec) -> library.Spec:
    log_sign, tanh_output = spec.preprocessing == "log_sign", spec.output == "tanh"
    return library.Spec(
        spec.num_layers, spec.hidden_size, log_sign, spec.width, tanh_output, spec.p, spec.output_scale
    )


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_contiguous()


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()
