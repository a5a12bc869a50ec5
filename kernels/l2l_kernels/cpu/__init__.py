"""The CPU implementation: C++ that is compiled when first used, on as many threads as torch uses.

Arithmetic is in float64 if φ is, else in float32. Without a C++ compiler a warning says so, once, and the
reference runs.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from l2l_kernels import reference
from l2l_kernels.backends import BackendUnavailableError
from l2l_kernels.cpu import library
from l2l_kernels.spec import Coefficients, LSTMSpec, SizeHead

__all__ = ["bptt", "nominal_sizes", "nominal_step", "nominal_sums", "step_"]

NO_COEFFICIENTS = [0.0] * len(Coefficients._fields)


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
    kernel = getattr(kernels, _variant("step", dtype, stored, spec))
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
    kernel = getattr(kernels, _variant("bptt", dtype, stored, spec))
    T, N = d_updates.shape
    kernel(torch.get_num_threads(), _constants(spec), N, T, *pointers)
    return d_phi.to(phi.dtype), d_initial_state.to(phi.dtype)


def check_precision(spec: LSTMSpec, dtype: torch.dtype = torch.float32) -> None:
    """Tells whether products can be rounded as the spec's precision says, in this dtype of φ.

    Raises:
        BackendUnavailableError: They cannot; the message names the option.
    """
    if spec.precision is None or (kernels := library.load()) is None:
        return
    reason = None
    if dtype == torch.float64:
        reason = "is for φ in float32, which is in float64 here"
    elif not set(library.ROUNDED_VARIANTS) <= set(library.variants(kernels)):
        reason = f"needs AVX512_BF16, which the CPU kernels do not have here ({library.describe()})"
    if reason:
        raise BackendUnavailableError(
            f"precision={spec.precision!r} {reason}: leave precision out, or take the backend 'reference', "
            "which rounds likewise, but is slower than float32"
        )


def nominal_step(
    targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    statistics: Tensor,
    offsets: Sequence[int],
    sizes: Tensor,
    moves: Sequence[bool],
    coefficients: Coefficients,
    maximize: bool,
) -> Tensor:
    """Does what `reference.nominal_step` does, in one pass over memory.

    Tensors of float16, of float64 (unless the statistics are), and not contiguous ones go by way of a copy.
    """
    kernels = library.load()
    if kernels is None:
        return reference.nominal_step(
            targets, grads, statistics, offsets, sizes, moves, coefficients, maximize
        )
    rows, copies, kept = array("q"), [], []
    for target, grad, offset, moved in zip(targets, grads, offsets, moves, strict=True):
        ours, gradient = _readable(target, statistics.dtype), _readable(grad, statistics.dtype)
        kept.append(gradient)  # until the kernel has read it
        if ours is not target:
            copies.append((target, ours))
        bfloat16 = ours.dtype == torch.bfloat16, gradient.dtype == torch.bfloat16
        rows.extend((ours.data_ptr(), gradient.data_ptr(), offset, target.numel(), *bfloat16, moved))
    sums = _nominal(kernels, rows, len(targets), statistics, sizes.contiguous(), coefficients, maximize)
    for target, ours in copies:
        target.copy_(ours)
    return sums


def nominal_sums(statistics: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Does what `reference.nominal_sums` does: the very sums of the step that left these statistics."""
    kernels = library.load()
    if kernels is None:
        return reference.nominal_sums(statistics, offsets, sizes)
    rows = array("q")
    for offset, size in zip(offsets, sizes, strict=True):
        rows.extend((0, 0, offset, size, 0, 0, 0))
    return _nominal(kernels, rows, len(sizes), statistics)


def nominal_sizes(sums: Tensor, log_sizes: Tensor, decays: Tensor, head: SizeHead) -> Tensor:
    """Does what `reference.nominal_sizes` does."""
    kernels = library.load()
    if kernels is None:
        return reference.nominal_sizes(sums, log_sizes, decays, head)
    sizes = torch.empty(len(sums), 2, dtype=log_sizes.dtype)
    numbers, given = array("d", head), [x.contiguous() for x in (sums, log_sizes, decays)]
    kernel = getattr(kernels, f"nominal_sizes_{log_sizes.dtype}".replace("torch.", ""))
    kernel(len(sums), *(x.data_ptr() for x in given), numbers.buffer_info()[0], sizes.data_ptr())
    return sizes


def _nominal(
    kernels: ctypes.CDLL,
    rows: array[int],
    count: int,
    statistics: Tensor,
    table: Tensor | None = None,
    coefficients: Sequence[float] = NO_COEFFICIENTS,
    maximize: bool = False,
) -> Tensor:
    sums = torch.empty(count, 3, dtype=torch.float64)
    kernel = getattr(kernels, f"nominal_{statistics.dtype}".replace("torch.", ""))
    numbers = array("d", coefficients)
    tensors = (rows.buffer_info()[0], None if table is None else table.data_ptr())
    shared = len(statistics) == 2
    memory = (shared, statistics.shape[1], statistics.data_ptr(), numbers.buffer_info()[0])
    sign = -1.0 if maximize else 1.0
    kernel(torch.get_num_threads(), count, *tensors, *memory, sign, sums.data_ptr())
    return sums


def _readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor that nominal.cpp can read: itself, or a contiguous copy."""
    if tensor.dtype not in (dtype, torch.bfloat16):
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def _dtypes(phi: Tensor, state: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Chooses the dtypes of the arithmetic and of the stored state: its own, if the kernels can read it."""
    dtype = torch.float64 if phi.dtype == torch.float64 else torch.float32
    bfloat16 = state.dtype == torch.bfloat16 and dtype == torch.float32
    return dtype, torch.bfloat16 if bfloat16 else dtype


def _variant(name: str, dtype: torch.dtype, stored: torch.dtype, spec: LSTMSpec) -> str:
    variant = f"{name}_{dtype}_{stored}".replace("torch.", "")
    if spec.precision is None:
        return variant
    check_precision(spec, dtype)
    return f"{variant}_{spec.precision}"


@lru_cache
def _constants(spec: LSTMSpec) -> library.Spec:
    flags = {"log_sign": spec.preprocessing == "log_sign", "tanh_output": spec.output == "tanh"}
    sizes = {"layers": spec.num_layers, "hidden": spec.hidden_size, "width": spec.width}
    return library.Spec(**flags, **sizes, p=spec.p, output_scale=spec.output_scale)


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()
