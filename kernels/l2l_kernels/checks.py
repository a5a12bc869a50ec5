"""Checks of the operators' tensors, for all backends alike, before a pointer is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from l2l_kernels.spec import LSTMSpec

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_step(
    spec: LSTMSpec, phi: Tensor, theta: Tensor, inputs: Tensor, state: Tensor, new_state: Tensor | None = None
) -> None:
    """Raises ValueError unless θ is [N], the inputs are [N] or [width, N], states [L, 2, H, N] and φ [P].

    All must be dense, of a floating dtype and on one device.
    """
    _check_kinds(phi, theta=theta, inputs=inputs, state=state, new_state=new_state)
    if theta.ndim != 1 or inputs.shape != spec.input_shape(theta.shape[0]):
        expected = "[width, N]" if spec.preprocessing == "features" else "[N]"
        raise ValueError(
            f"theta and inputs must be [N] and {expected} for {spec}, got {list(theta.shape)} and "
            f"{list(inputs.shape)}"
        )
    shape = (*spec.state_shape, theta.shape[0])
    _check_shapes(spec, phi, shape, state=state, new_state=new_state)


def check_bptt(
    spec: LSTMSpec,
    phi: Tensor,
    inputs: Tensor,
    history: Tensor,
    d_updates: Tensor,
    d_final_state: Tensor | None,
) -> None:
    """Raises ValueError unless d_updates are [T, N], inputs [T, N] or [T, width, N], φ is [P], and so on.

    The history must be [T+1, L, 2, H, N] and d_final_state, if given, [L, 2, H, N].
    """
    _check_kinds(phi, inputs=inputs, history=history, d_updates=d_updates, d_final_state=d_final_state)
    if d_updates.ndim != 2 or inputs.shape != (len(d_updates), *spec.input_shape(d_updates.shape[1])):
        expected = "[T, width, N]" if spec.preprocessing == "features" else "[T, N]"
        raise ValueError(
            f"inputs and d_updates must be {expected} and [T, N] for {spec}, got {list(inputs.shape)} and "
            f"{list(d_updates.shape)}"
        )
    T, N = d_updates.shape
    _check_shapes(spec, phi, (T + 1, *spec.state_shape, N), history=history)
    _check_shapes(spec, phi, (*spec.state_shape, N), d_final_state=d_final_state)


def check_overlap(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a tensor that is written shares memory with itself or another.

    `new_state` may be `state` itself. Memory is taken from a tensor's first number to its last, so that two
    interleaved ones count as overlapping.
    """
    tensors = {**read, **written}
    spans = {name: span(tensor) for name, tensor in tensors.items()}
    for name, tensor in written.items():
        if not (tensor.is_contiguous() or has_distinct_elements(tensor)):
            raise ValueError(f"{name} must not hold one number twice (it is expanded or overlaps itself)")
        start, end = spans[name]
        for other, (theirs, their_end) in spans.items():
            if theirs >= end or start >= their_end or other == name:
                continue
            if not (name == "new_state" and other == "state" and _is_same(tensor, tensors[other])):
                raise ValueError(f"{name} is written and must not overlap {other} in memory")


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype


def _check_kinds(phi: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in (("phi", phi), *tensors.items()):
        if tensor is None:
            continue
        if tensor.layout != torch.strided or tensor.is_nested:
            raise ValueError(f"{name} must be dense, got one of layout {tensor.layout}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be floating-point of 16, 32 or 64 bits, got {tensor.dtype}")
        if tensor.device != phi.device:
            raise ValueError(f"{name} is on {tensor.device} but phi is on {phi.device}")


def _check_shapes(spec: LSTMSpec, phi: Tensor, shape: Sequence[int], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {list(shape)} for {spec}, got {list(tensor.shape)}")
    spec.check_length(phi)


def span(tensor: Tensor) -> tuple[int, int]:
    """Returns the addresses of a tensor's first byte and of the one after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def has_distinct_elements(tensor: Tensor) -> bool:
    """Tells whether each index has its own address: every stride reaches beyond all that smaller ones do."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True
