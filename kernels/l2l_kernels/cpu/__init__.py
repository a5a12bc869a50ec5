"""The CPU implementation: kernels.cpp, compiled when first used, on as many threads as torch uses.

Arithmetic is in float64 if φ is, else in float32. Without a C++ compiler a warning says so, once, and the
reference runs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from l2l_kernels import reference
from l2l_kernels.cpu import library
from l2l_kernels.spec import LSTMSpec

__all__ = ["bptt", "step_"]


def step_(
    theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor, phi: Tensor, spec: LSTMSpec
) -> None:
    """Does what `reference.step_` does; new_state [L, 2, H, N] may be state itself."""
    kernels = library.load()
    if kernels is None:
        return reference.step_(theta, inputs, state, new_state, phi, spec)
    dtype, stored = _dtypes(phi, state)
    inputs, source, phi = _contiguous(inputs, dtype), _contiguous(state, stored), _contiguous(phi, dtype)
    updated = _contiguous(theta, dtype)
    fits = new_state.dtype == stored and new_state.is_contiguous()
    target = new_state if fits else torch.empty(new_state.shape, dtype=stored)
    pointers = [tensor.data_ptr() for tensor in (updated, inputs, source, target, phi)]
    kernel = getattr(kernels, _variant("step", dtype, stored))
    kernel(torch.get_num_threads(), _constants(spec), theta.shape[0], *pointers)
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
    """Does what `reference.bptt` does."""
    kernels = library.load()
    if kernels is None:
        return reference.bptt(inputs, history, d_updates, d_final_state, phi, spec)
    dtype, stored = _dtypes(phi, history)
    inputs, d_updates, weights = (_contiguous(tensor, dtype) for tensor in (inputs, d_updates, phi))
    history = _contiguous(history, stored)
    d_final = None if d_final_state is None else _contiguous(d_final_state, dtype)
    d_phi, d_initial_state = torch.empty_like(weights), torch.empty(history.shape[1:], dtype=dtype)
    tensors = (inputs, history, d_updates, d_final, weights, d_phi, d_initial_state)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    kernel = getattr(kernels, _variant("bptt", dtype, stored))
    T, N = d_updates.shape
    kernel(torch.get_num_threads(), _constants(spec), N, T, *pointers)
    return d_phi.to(phi.dtype), d_initial_state.to(phi.dtype)


def _dtypes(phi: Tensor, state: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Chooses the dtypes of the arithmetic and of the stored state: its own, if the kernels can read it."""
    dtype = torch.float64 if phi.dtype == torch.float64 else torch.float32
    bfloat16 = state.dtype == torch.bfloat16 and dtype == torch.float32
    return dtype, torch.bfloat16 if bfloat16 else dtype


def _variant(name: str, dtype: torch.dtype, stored: torch.dtype) -> str:
    return f"{name}_{dtype}_{stored}".replace("torch.", "")


@lru_cache
def _constants(spec: LSTMSpec) -> library.Spec:
    flags = {"log_sign": spec.preprocessing == "log_sign", "tanh_output": spec.output == "tanh"}
    sizes = {"layers": spec.num_layers, "hidden": spec.hidden_size, "width": spec.width}
    return library.Spec(**flags, **sizes, p=spec.p, output_scale=spec.output_scale)


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()
