"""Rollouts in progress, from the processes that saved them to as many as go on with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def reshard(rollouts: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """A process's rollout, from those that any number of processes saved, in the order of their ranks.

    The optimizees keep their order: of N·k in all, process r of R goes on with those from r·N·k/R on. Nothing
    is drawn anew, so that the run goes on as it would have on the processes that saved it.

    Args:
        rollouts: One `Rollout.state_dict` per saving process: θ [k, N], buffers [k, ...], states and
            statistics [..., k·N], masks [k], k instances, k generators.
        rank: Which of the processes that go on.
        world_size: How many those are.

    Raises:
        ValueError: The optimizees cannot be shared out evenly.
    """
    optimizees = [rollout["optimizees"] for rollout in rollouts]
    total = sum(len(saved["theta"]) for saved in optimizees)
    if total % world_size:
        raise ValueError(f"{total} optimizees cannot be shared out evenly among {world_size} processes")
    share = total // world_size

    def mine(saved: Iterable[Tensor], dim: int = 0) -> Tensor:
        whole = torch.cat(list(saved), dim)
        n = whole.shape[dim] // total
        return whole.narrow(dim, rank * share * n, share * n).clone()

    def parts(rollout: dict[str, Any], name: str) -> Sequence[Tensor]:
        """Of every part of the rule; an older version had one, as a tensor, and no statistics."""
        saved: Any = rollout.get(name, [])
        return [saved] if isinstance(saved, Tensor) else saved

    def listed(name: str) -> list[Any]:
        return [one for saved in optimizees for one in saved[name]][rank * share : (rank + 1) * share]

    buffers = {
        name: mine(saved["buffers"][name] for saved in optimizees)
        for name in optimizees[0].get("buffers", {})
    }
    return {
        "optimizees": {
            "theta": mine(saved["theta"] for saved in optimizees),
            "instances": listed("instances"),
            "generators": listed("generators"),
            **({"buffers": buffers} if buffers else {}),
        },
        **{
            name: [mine(part, -1) for part in zip(*(parts(r, name) for r in rollouts), strict=True)]
            for name in ("state", "statistics")
        },
        # Nor had the first version's any masks.
        "masked": mine(
            rollout.get("masked", torch.zeros(len(rollout["optimizees"]["theta"]), dtype=torch.bool))
            for rollout in rollouts
        ),
        "steps_done": rollouts[0]["steps_done"],
    }
