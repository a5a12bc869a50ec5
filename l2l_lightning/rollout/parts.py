"""A part is the tensors of K optimizees that one update rule moves, with what it carries for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rules.base import Rule, UpdateRule
from l2l_lightning.rules.layout import Layout


class Part:
    """Holds the state and the features' statistics of one rule, for some of the tensors of K optimizees.

    Args:
        rule: m_φ.
        layout: The part's own tensors, n coordinates of each optimizee.
        columns: Where those are among an optimizee's N, int64 [n]; None if they are all.
        dtype: θ's.
    """

    def __init__(self, rule: UpdateRule, layout: Layout, columns: Tensor | None, dtype: torch.dtype) -> None:
        self.rule = rule
        self.layout = layout
        self.columns = columns
        self.state = rule.init_state(layout.copies * layout.num_coordinates)
        self.statistics = rule.init_statistics(layout.copies * layout.num_coordinates, dtype)

    def take(self, values: Tensor) -> Tensor:
        """Returns the part's coordinates of values [K, N], flat, [K·n]; a view if the part has all."""
        return (values if self.columns is None else values[:, self.columns]).reshape(-1)

    def added(self, theta: Tensor, update: Tensor) -> Tensor:
        """Returns θ [K, N] with the part's update [K·n] added, as a new tensor."""
        update = update.view(len(theta), -1)
        return theta + update if self.columns is None else theta.index_add(1, self.columns, update)

    def add_(self, theta: Tensor, update: Tensor) -> None:
        """Adds the part's update [K·n] to θ [K, N] in place."""
        update = update.view(len(theta), -1)
        if self.columns is None:
            theta.add_(update)
        else:
            theta.index_add_(1, self.columns, update)

    def by_optimizee(self, values: Tensor) -> Tensor:
        """Returns values [..., K·n] as a view [..., K, n]."""
        return values.view(*values.shape[:-1], self.layout.copies, self.layout.num_coordinates)


def parts_of(rule: Rule, optimizees: Optimizees) -> list[Part]:
    """Returns a part for every member of the rule that moves one of the task's tensors.

    Raises:
        ValueError: A tensor belongs to no member.
    """
    layout = Layout(optimizees.task.tensors, len(optimizees))
    chosen: dict[int, list[int]] = {}
    for index, tensor in enumerate(layout.tensors):
        chosen.setdefault(rule.member_for(tensor), []).append(index)
    return [
        Part(
            rule.members[member],
            layout.select(indices),
            None if len(chosen) == 1 else layout.columns(indices).to(optimizees.device),
            optimizees.dtype,
        )
        for member, indices in sorted(chosen.items())
    ]


def in_order(rule: Rule, parts: Sequence[Part], gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Returns all parts' gradients in the order of φ, zeros for a member that moves nothing."""
    known = {id(part.rule): found for part, found in zip(parts, gradients, strict=True)}
    return [
        gradient
        for member in rule.members
        for gradient in known.get(id(member)) or map(torch.zeros_like, member.parameters())
    ]
