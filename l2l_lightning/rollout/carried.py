"""What a rollout carries from window to window, and how it is saved and taken up again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2l_lightning.checks import check_whole_numbers
from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rollout.parts import parts_of
from l2l_lightning.rules.base import Rule


class CarriedRollout:
    """K optimizees in the middle of a rollout: θ, states, statistics, generators, masks and steps done.

    Args:
        rule: m_φ, or a `Grouped` of several.
        optimizees: What it optimises; their θ is advanced in place.
        total_steps: T, the rollout's horizon, for features that read it; None if it is not known.

    Raises:
        ValueError: total_steps < 1, or the rule has no member for one of the task's tensors.
    """

    def __init__(self, rule: Rule, optimizees: Optimizees, total_steps: int | None = None) -> None:
        if total_steps is not None:
            check_whole_numbers(1, 10**9, total_steps=total_steps)
        self.rule = rule
        self.optimizees = optimizees
        self.total_steps = total_steps
        self.parts = parts_of(rule, optimizees)
        self.masked = torch.zeros(len(optimizees), dtype=torch.bool)  # on the CPU: the host decides by it
        self.steps_done = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns what resuming in mid-rollout needs, as tensors and plain values."""
        return {
            "optimizees": self.optimizees.state_dict(),
            "state": [part.state.clone() for part in self.parts],
            "statistics": [part.statistics.clone() for part in self.parts],
            "masked": self.masked.clone(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a rollout of the same rule and optimizees was saved.

        Raises:
            ValueError: It is of other optimizees, or of a rule that reads no features.
        """
        self.optimizees.load_state_dict(state["optimizees"])
        # Older versions had one part, as a tensor, and no statistics.
        saved = {
            name: [carried] if isinstance(carried := state.get(name, []), Tensor) else carried
            for name in ("state", "statistics")
        }
        for name, ours in (
            ("state", [part.state for part in self.parts]),
            ("statistics", [part.statistics for part in self.parts]),
        ):
            theirs = saved[name]
            if not theirs and not any(whole.numel() for whole in ours):
                continue
            if [whole.shape for whole in theirs] != [whole.shape for whole in ours]:
                raise ValueError(
                    f"it has the {name} {[list(whole.shape) for whole in theirs]}, "
                    f"and the rule's is {[list(whole.shape) for whole in ours]}"
                )
            for whole, new in zip(ours, theirs, strict=True):
                whole.copy_(new)  # windows may update it in place: the saved one stays what it is
        self.masked = state["masked"].cpu()
        self.steps_done = state["steps_done"]
