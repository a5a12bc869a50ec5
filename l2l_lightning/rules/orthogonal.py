"""Orthogonalised updates of matrices, by Newton and Schulz's iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_lightning.rules.layout import Layout, ParameterInfo

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LEAST = 4
"""The shorter side of the smallest matrix that is orthogonalised."""


def newton_schulz(matrices: Tensor) -> Tensor:
    r"""Returns matrices whose singular values are near 1 and whose singular vectors are those of the given.

    X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, five times from X / ‖X‖, with coefficients that bring small singular
    values up fast and leave all within about [0.7, 1.2]. A matrix of zeros stays zero.

    Args:
        matrices: [..., rows, columns].

    Source: Jordan et al. 2024, "Muon".

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> values = torch.linalg.svdvals(newton_schulz(torch.randn(8, 5)))
        >>> bool(((values > 0.6) & (values < 1.3)).all())
        True
    """
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    norm = wide.square().sum((-2, -1), keepdim=True).sqrt()
    x = wide / norm.clamp(min=torch.finfo(wide.dtype).tiny)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices else x.mT


def is_orthogonalised(tensor: ParameterInfo) -> bool:
    """Returns whether a tensor is a matrix whose sides are long enough."""
    return tensor.rank > 1 and min(tensor.fans) >= LEAST


def with_size_of(matrices: Tensor, new: Tensor) -> Tensor:
    """Returns new matrices [..., rows, columns], scaled to the mean squares of the given ones."""
    size, own = (x.square().mean((-2, -1), keepdim=True).sqrt() for x in (matrices, new))
    return new * (size / own.clamp(min=torch.finfo(own.dtype).tiny))


def orthogonalised(update: Tensor, layout: Layout) -> Tensor:
    """Returns an update in which every matrix is orthogonalised and keeps the mean of its squares.

    Of a tensor of more than two dimensions the first is the rows; tensors of one dimension, and matrices with
    a side shorter than four, stay as they are.

    Args:
        update: [copies · N], flat.
        layout: The tensors that it belongs to, none of which is sharded.
    """
    parts = []
    for part, tensor in zip(layout.split(update), layout.tensors, strict=True):
        matrix = part
        if is_orthogonalised(tensor):
            matrix = part.reshape(layout.copies, tensor.shape[0], -1)
            matrix = with_size_of(matrix, newton_schulz(matrix))
        parts.append(matrix.reshape(layout.copies, tensor.numel))
    return torch.cat(parts, -1).flatten()
