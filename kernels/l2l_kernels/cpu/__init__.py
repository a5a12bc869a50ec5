"""The CPU implementation: kernels.cpp, compiled when first used, on as many threads as torch uses.

Without a C++ compiler a warning says so, once, and the reference runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_kernels import _reference_backend as reference
from l2l_kernels.cpu import library
from l2l_kernels.spec import LSTMSpec

__all__ = ["bptt", "step_"]


def step_(theta: Tensor, grad: Tensor, state: Tensor, new_state: Tensor, phi: Tensor, spec: LSTMSpec) -> None:
    """Adds u_t to θ [N] in place and writes s_{t+1} into new_state [L, 2, H, N] (may be state itself)."""
    kernels = library.load()
    if kernels is None or phi.dtype not in (torch.float32, torch.float64):
        return reference.step_(theta, grad, state, new_state, phi, spec)
    stored = _stored_dtype(state, phi)
    grad, source, phi = _contiguous(grad, phi.dtype), _contiguous(state, stored), phi.contiguous()
    update = theta if _fits(theta, phi.dtype) else torch.zeros_like(theta, dtype=phi.dtype).contiguous()
    target = new_state if _fits(new_state, stored) else torch.empty(new_state.shape, dtype=stored)
    getattr(kernels, f"step_{_variant(phi, stored)}")(
        torch.get_num_threads(),
        _constants(spec),
        theta.shape[0],
        update.data_ptr(),
        grad.data_ptr(),
        source.data_ptr(),
        target.data_ptr(),
        phi.data_ptr(),
    )
    if update is not theta:
        theta.add_(update)
    if target is not new_state:
        new_state.copy_(target)


def bptt(
    grads: Tensor,
    history: Tensor,
    d_updates: Tensor,
    d_final_state: Tensor | None,
    phi: Tensor,
    spec: LSTMSpec,
) -> tuple[Tensor, Tensor]:
    """As reference.bptt: (d_phi [P], d_initial_state [L, 2, H, N])."""
    kernels = library.load()
    if kernels is None or phi.dtype not in (torch.float32, torch.float64):
        return reference.bptt(grads, history, d_updates, d_final_state, phi, spec)
    dtype, stored = phi.dtype, _stored_dtype(history, phi)
    grads, d_updates, phi = _contiguous(grads, dtype), _contiguous(d_updates, dtype), phi.contiguous()
    history = _contiguous(history, stored)
    d_final = None if d_final_state is None else _contiguous(d_final_state, dtype)
    d_phi, d_initial_state = torch.empty_like(phi), torch.empty(history.shape[1:], dtype=dtype)
    getattr(kernels, f"bptt_{_variant(phi, stored)}")(
        torch.get_num_threads(),
        _constants(spec),
        grads.shape[1],
        grads.shape[0],
        grads.data_ptr(),
        history.data_ptr(),
        d_updates.data_ptr(),
        None if d_final is None else d_final.data_ptr(),
        phi.data_ptr(),
        d_phi.data_ptr(),
        d_initial_state.data_ptr(),
    )
    return d_phi, d_initial_state


def _stored_dtype(state: Tensor, phi: Tensor) -> torch.dtype:
    """The dtype in which the kernels read the state: its own if they can, else φ's."""
    return torch.bfloat16 if (state.dtype, phi.dtype) == (torch.bfloat16, torch.float32) else phi.dtype


def _variant(phi: Tensor, stored: torch.dtype) -> str:
    return f"{phi.dtype}_{stored}".replace("torch.", "")


def _constants(spec: LSTMSpec) -> library.Spec:
    log_sign = spec.preprocessing == "log_sign"
    return library.Spec(spec.num_layers, spec.hidden_size, log_sign, spec.p, spec.output_scale)


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_contiguous()


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()
