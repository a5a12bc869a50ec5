"""Rollouts in progress, from the processes that saved them to as many as go on with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def reshard(rollouts: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """A process's rollout, from those that any number of processes saved, in the order of their ranks.

    The optimizees keep their order: of N·k in all, process r of R goes on with those from r·N·k/R on. Nothing
    is drawn anew, so that the run goes on as it would have on the processes that saved it.

    Args:
        rollouts: One `Rollout.state_dict` per saving process: θ [k, N], states and statistics [..., k·N],
            masks [k], k instances, k generators.
        rank: Which of the processes that go on.
        world_size: How many those are.

    Raises:
        ValueError: The optimizees cannot be shared out evenly.
    """
    optimizees = [rollout["optimizees"] for rollout in rollouts]
    theta = torch.cat([saved["theta"] for saved in optimizees])
    total = len(theta)
    if total % world_size:
        raise ValueError(f"{total} optimizees cannot be shared out evenly among {world_size} processes")
    share = total // world_size
    mine = slice(rank * share, (rank + 1) * share)
    carried: dict[str, list[torch.Tensor]] = {}
    for name in ("state", "statistics"):
        # Of every part of the rule; an older version's rollouts had one, as a tensor, and no statistics.
        saved = [
            [one] if isinstance(one := rollout.get(name, []), torch.Tensor) else one for rollout in rollouts
        ]
        carried[name] = [
            _share(torch.cat(part, dim=-1), total, mine).clone() for part in zip(*saved, strict=True)
        ]
    return {
        "optimizees": {
            "theta": theta[mine].clone(),
            **{
                name: [one for saved in optimizees for one in saved[name]][mine]
                for name in ("instances", "generators")
            },
        },
        **carried,
        # Nor had the first version's any masks.
        "masked": torch.cat([rollout["masked"] for rollout in rollouts])[mine].clone()
        if "masked" in rollouts[0]
        else torch.zeros(share, dtype=torch.bool),
        "steps_done": rollouts[0]["steps_done"],
    }


def _share(carried: torch.Tensor, total: int, mine: slice) -> torch.Tensor:
    """Of values [..., total · n] those of some optimizees."""
    n = carried.shape[-1] // total
    return carried[..., mine.start * n : mine.stop * n]
