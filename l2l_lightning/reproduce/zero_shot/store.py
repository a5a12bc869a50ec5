"""What a peer did on a problem, found out once and kept: a small JSON file each."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from l2l_lightning.comparison.baselines import preferred_number
from l2l_lightning.comparison.tuning import best_position, search_rates
from l2l_lightning.files import write_json
from l2l_lightning.optim.state_dict import digest_of
from l2l_lightning.provenance import origin
from l2l_lightning.reproduce.zero_shot.peers import Peer, get_peer
from l2l_lightning.reproduce.zero_shot.problem import Problem, make_problem
from l2l_lightning.reproduce.zero_shot.runs import DIVERGED_AT, first_loss, train

FLOOR = 1e-8
"""Losses below count as this much: their ratios would say nothing."""

FINGERPRINT_STEPS = 6
"""Steps after which a learned optimizer is told from one with the same φ and another code."""


@dataclass(frozen=True)
class Effort:
    """Which seeds are tuned and reported on, and how far a quick run goes."""

    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    max_steps: int | None = None
    """Problems are cut to so many steps; None leaves them whole."""
    max_rates: int | None = None
    """Searches have so many rates, without widening; None is the peer's grid, widened."""


@dataclass(frozen=True)
class Trial:
    """A rate and setting of a search."""

    how: dict[str, float]
    score: float | None
    """The geometric mean over the tuning seeds of the held-out loss on validation data; None: diverged."""


@dataclass(frozen=True)
class Entry:
    """What a peer did on a problem."""

    problem: str
    peer: str
    family: str
    steps: int
    chosen: dict[str, float]
    """The rate and setting that did best on validation data; empty for a peer that is not tuned."""
    validation: float | None
    """Their score; None for a peer that is not tuned, or diverged with each."""
    trials: list[Trial]
    seeds: list[int]
    first: list[float]
    """The test loss at θ0, by seed."""
    test: list[float | None]
    """The test loss after the last step, by seed; None where it is not finite."""
    seconds: float

    @property
    def diverged(self) -> int:
        """Counts the seeds whose loss is not finite or above ten times the first."""
        limits = (DIVERGED_AT * first for first in self.first)
        return sum(loss is None or loss > limit for loss, limit in zip(self.test, limits, strict=True))

    @property
    def losses(self) -> list[float]:
        """The test losses by seed, from 1e-8 to ten times the first, as a diverged run counts."""
        return [
            max(FLOOR, DIVERGED_AT * first if loss is None else min(loss, DIVERGED_AT * first))
            for loss, first in zip(self.test, self.first, strict=True)
        ]


def entry_from_json(content: Mapping[str, Any]) -> Entry:
    """Returns the entry that `dataclasses.asdict` has made plain."""
    return Entry(**{**content, "trials": [Trial(**trial) for trial in content["trials"]]})


class Store:
    """Entries in a folder, each under a hash of all that determines it.

    Args:
        folder: Where they are.
        protocol: How they are made.
        known: Others, by their hashes, which stand for what the folder lacks.
    """

    def __init__(self, folder: Path, protocol: Effort, known: Mapping[str, Entry] | None = None) -> None:
        self.folder, self.protocol, self.known = folder, protocol, known or {}

    def problem(self, name: str) -> Problem:
        """Returns a problem as it is run, cut short if the protocol says so."""
        problem, limit = make_problem(name), self.protocol.max_steps
        if limit is not None and problem.steps > limit:
            problem = Problem(**{**vars(problem), "steps": limit})
        return problem

    def identity(self, problem: str, peer: str) -> dict[str, Any]:
        """Returns all that determines an entry, as plain JSON values."""
        definition, optimizer = self.problem(problem), get_peer(peer)
        identity = {
            "problem": problem,
            "problem_version": definition.version,
            "steps": definition.steps,
            "data": definition.data,
            "peer": peer,
            "peer_version": optimizer.version,
            "grid": None if optimizer.grid is None else list(optimizer.grid),
            "alternatives": [alternative._asdict() for alternative in optimizer.alternatives],
            "protocol": asdict(self.protocol),
        }
        if optimizer.rule is not None:
            identity["rule"] = rule_identity(peer)
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    def path(self, identity: Mapping[str, Any]) -> Path:
        """Returns the file of an entry."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{digest}.json"

    def read(self, problem: str, peer: str) -> Entry | None:
        """Returns an entry that was kept; None if there is none, or it cannot be read."""
        identity = self.identity(problem, peer)
        path = self.path(identity)
        with suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or none that can be used
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                return entry_from_json(kept["entry"])
        return self.known.get(path.stem)

    def taken(self, problem: str, peer: str) -> str | None:
        """Returns the hash of an entry that is one of the known ones; None if it is the folder's."""
        path = self.path(self.identity(problem, peer))
        return None if path.is_file() else path.stem

    def entry(self, problem: str, peer: str) -> Entry:
        """Returns an entry, made now and kept if it was not there."""
        if (kept := self.read(problem, peer)) is not None:
            return kept
        began, definition, optimizer = time.perf_counter(), self.problem(problem), get_peer(peer)
        trials = self._search(problem, definition, peer) if optimizer.tuned else []
        best = min(trials, key=lambda trial: math.inf if trial.score is None else trial.score, default=None)
        how = {} if best is None else best.how
        seeds = list(self.protocol.seeds)
        losses = [train(definition, optimizer, how, seed, "test") for seed in seeds]
        entry = Entry(
            *(problem, peer, definition.family, definition.steps, how),
            *(None if best is None else best.score, trials, seeds),
            [first_loss(definition, seed, "test") for seed in seeds],
            [loss if math.isfinite(loss) else None for loss in losses],
            round(time.perf_counter() - began, 2),
        )
        identity = self.identity(problem, peer)
        content = {"identity": identity, "entry": asdict(entry), "origin": origin("cpu")}
        write_json(self.path(identity), content)
        return entry

    def _search(self, name: str, problem: Problem, peer: str) -> list[Trial]:
        """Tries rates, then each alternative at three of them about the best."""
        optimizer = get_peer(peer)
        assert optimizer.grid is not None
        if optimizer.search_of is not None:
            scores = _positions(self.entry(name, optimizer.search_of).trials)
            trials = [_trial({}, position, score) for position, score in scores.items()]
        else:
            grid, extensions = optimizer.grid, {}
            if self.protocol.max_rates is not None:
                stride = -(-len(grid) // self.protocol.max_rates)
                grid, extensions = grid[stride // 2 :: stride], {"max_extensions": 0}
            scores = search_rates(grid, partial(self._score, problem, optimizer, {}), **extensions)
            trials = [_trial({}, position, score) for position, score in sorted(scores.items())]
        best = best_position(scores)
        for setting, offset in optimizer.alternatives:
            reach = 1 if self.protocol.max_rates is None else 0
            for position in range(best + offset - reach, best + offset + reach + 1):
                trials.append(_trial(setting, position, self._score(problem, optimizer, setting, position)))
        return trials

    def _score(self, problem: Problem, peer: Peer, setting: dict[str, float], position: int) -> float:
        how = {"rate": preferred_number(position), **setting}
        losses: list[float] = []
        for seed in self.protocol.tuning_seeds:
            losses.append(train(problem, peer, how, seed, "validation"))
            if losses[-1] == math.inf:
                return math.inf
        return statistics.geometric_mean(max(FLOOR, loss) for loss in losses)


def _trial(setting: dict[str, float], position: int, score: float) -> Trial:
    how = {"rate": preferred_number(position), **setting}
    return Trial(how, score if math.isfinite(score) else None)


def _positions(trials: list[Trial]) -> dict[int, float]:
    """Returns a search's scores by position in the 1–2–5 series, those of the default setting."""
    found = {trial.how["rate"]: trial.score for trial in trials if set(trial.how) == {"rate"}}
    positions = {preferred_number(position): position for position in range(-60, 61)}
    return {positions[rate]: math.inf if score is None else score for rate, score in found.items()}


@cache
def rule_identity(peer: str) -> dict[str, Any]:
    """Returns what results of a learned optimizer are kept by: the hash of φ, and what the rule does with it.

    The code of a rule can change under its φ: so where a few steps lead on a little network is kept, too.
    """
    optimizer = get_peer(peer)
    assert optimizer.rule is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            *(nn.Embedding(12, 9), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(16, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)),
        )
    inputs = torch.arange(12)
    parts = optimizer.make(module, FINGERPRINT_STEPS)
    for _ in range(FINGERPRINT_STEPS):
        module.zero_grad()
        loss = F.cross_entropy(module(inputs), inputs % 4)
        loss.backward()  # type: ignore[no-untyped-call]
        for acting in parts:
            acting.step()
    # Processors round differently, by far less.
    return {"phi": digest_of(optimizer.rule()), "fingerprint": f"{loss.item():.3g}"}
