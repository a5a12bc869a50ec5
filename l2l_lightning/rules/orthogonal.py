"""Orthogonalised updates of matrices, by Newton and Schulz's iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_lightning.rules.layout import Layout, ParameterInfo
from l2l_lightning.rules.shards import gathered, shard_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LEAST = 4
"""The shorter side of the smallest matrix that is orthogonalised."""
TOGETHER = 2**24
"""Sharded matrices are gathered so many coordinates at a time, 64 MiB in float32, and one matrix at least."""


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
    # Clamped before the roots, here and below, whose derivative at zero would make NaN of a zero.
    norm = wide.square().sum((-2, -1), keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny).sqrt()
    x = wide / norm
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices else x.mT


def is_orthogonalised(tensor: ParameterInfo) -> bool:
    """Returns whether a tensor is a matrix whose sides are long enough."""
    return tensor.rank > 1 and min(tensor.fans) >= LEAST


def with_size_of(matrices: Tensor, new: Tensor) -> Tensor:
    """Returns new matrices [..., rows, columns], scaled to the mean squares of the given ones."""
    tiny = torch.finfo(new.dtype).tiny
    size, own = (x.square().mean((-2, -1), keepdim=True).clamp(min=tiny).sqrt() for x in (matrices, new))
    return new * (size / own)


def orthogonalised(update: Tensor, layout: Layout) -> Tensor:
    """Returns an update in which every matrix is orthogonalised and keeps the mean of its squares.

    Of a tensor of more than two dimensions the first is the rows; tensors of one dimension, and matrices with
    a side shorter than four, stay as they are. Sharded matrices are gathered, `TOGETHER` coordinates at a
    time; every process orthogonalises the whole ones and keeps its shards.

    Args:
        update: [copies · N], flat.
        layout: The tensors that it belongs to.
    """
    parts = layout.split(update)
    for chosen in _bunches(layout):
        tensors = [layout.tensors[index] for index in chosen]
        wholes = [parts[index] for index in chosen]
        if any(tensor.cuts for tensor in tensors):  # of an optimizer's, which has one copy
            shards = [whole.squeeze(0) for whole in wholes]
            wholes = [whole[None] for whole in gathered(shards, [tensor.cuts or () for tensor in tensors])]
        for index, tensor, whole in zip(chosen, tensors, wholes, strict=True):
            matrix = whole.reshape(layout.copies, tensor.shape[0], -1)
            new = with_size_of(matrix, newton_schulz(matrix)).view(whole.shape)
            parts[index] = shard_of(new[0], tensor.cuts)[None] if tensor.cuts else new
    flat = [
        part.reshape(layout.copies, tensor.numel_here)
        for part, tensor in zip(parts, layout.tensors, strict=True)
    ]
    return torch.cat(flat, -1).flatten()


def _bunches(layout: Layout) -> list[list[int]]:
    """Returns the positions of the matrices to orthogonalise, those together that are gathered together."""
    bunches: list[list[int]] = []
    coordinates = TOGETHER
    for index, tensor in enumerate(layout.tensors):
        if is_orthogonalised(tensor):
            coordinates += tensor.numel
            if coordinates > TOGETHER:
                bunches.append([])
                coordinates = tensor.numel
            bunches[-1].append(index)
    return bunches
