"""One run: a network trained by an optimizer from a seed, and its held-out loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2l_lightning.reproduce.zero_shot.peers import Peer, Stepper
from l2l_lightning.reproduce.zero_shot.problem import Part, Problem

NORMALISATION_BATCHES = 50
"""Training minibatches that running statistics are computed of where θ is an average."""

DIVERGED_AT = 10.0
"""A run has diverged if its held-out loss is not finite or above this multiple of the first."""


def start(problem: Problem, seed: int) -> tuple[nn.Module, torch.Generator]:
    """Returns a seed's network and the generator of its minibatches, the same for every optimizer.

    The global stream is left where the network's draws end.
    """
    torch.manual_seed(seed)
    return problem.build(), torch.Generator().manual_seed(seed + 2**32)


def first_loss(problem: Problem, seed: int, part: Part) -> float:
    """Returns the held-out loss at θ0."""
    with torch.random.fork_rng(devices=[]):
        return problem.held_out_loss(start(problem, seed)[0], part)


def train(problem: Problem, peer: Peer, how: Mapping[str, float], seed: int, part: Part) -> float:
    """Returns the held-out loss after the last step; inf once a training loss, or it, is not finite.

    Args:
        problem: What is trained.
        peer: By what.
        how: The peer's rate and setting; empty where nothing is tuned.
        seed: Of the initialisation and of the minibatches.
        part: What it is judged on.
    """
    with torch.random.fork_rng(devices=[]):
        return _train(problem, peer, how, seed, part)


def _train(problem: Problem, peer: Peer, how: Mapping[str, float], seed: int, part: Part) -> float:
    module, generator = start(problem, seed)
    parts = peer.make(module, problem.steps, **how)
    _switch(parts, "train")
    for _ in range(problem.steps):
        module.zero_grad()
        loss = problem.loss(module, problem.batch(generator))
        if not math.isfinite(loss.item()):
            return math.inf
        loss.backward()  # type: ignore[no-untyped-call]
        for acting in parts:
            acting.step()
    if _switch(parts, "eval"):
        _renormalise(problem, module, generator)
    final = problem.held_out_loss(module, part)
    return final if math.isfinite(final) else math.inf


def _switch(parts: Sequence[Stepper], mode: Literal["train", "eval"]) -> bool:
    """Tells those that average θ what it is wanted for; says whether there were any."""
    averaging = [acting for acting in parts if hasattr(acting, mode)]
    for acting in averaging:
        getattr(acting, mode)()
    return bool(averaging)


@torch.no_grad()
def _renormalise(problem: Problem, module: nn.Module, generator: torch.Generator) -> None:
    """Computes BatchNorm's running statistics anew: those that were met belong to another θ."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    for _ in range(NORMALISATION_BATCHES if norms else 0):
        problem.loss(module, problem.batch(generator))
