"""Fits the decay of a trained ZeroShot's weights to the horizon, and writes the rule and the search.

    python benchmarks/fit_decay.py zero-shot --out decay.safetensors

A rule whose decay follows the first 2 of DECAY_FACTS gets all 4, and three numbers are chosen one after
another, from GRID: what the logarithm of the slow mean's signal to noise counts, a shift, and what the
logarithm of the horizon counts. Chosen is what has the least mean log held-out loss on training's first
problem of each family; all other numbers of φ stay. The check, before and after, is on problems that nothing
was chosen by, those that make_zero_shot.py chooses checkpoints by from now on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from make_zero_shot import log_held_out_loss

from l2l_lightning import Optimizees, pretrained, run_rule
from l2l_lightning.files import write_json
from l2l_lightning.provenance import origin
from l2l_lightning.rules import ZeroShot
from l2l_lightning.tasks import SmallProblem
from l2l_lightning.tasks.small.families import FAMILIES

SEED = 0
"""Of the problem of each family that the numbers are chosen by."""
HORIZONS = (100, 300, 1000, 3000)
SHORT_ONLY = ("convolutions", "attention", "recurrent", "fine_tuning")
"""Families that take too long at the last horizon."""
GRID = {"log slow SNR": (-0.5, -1.0, -1.5), "one": (0.5, 1.0, 1.5), "log T": (0.4, 0.8)}
TYPICAL = -3.0
"""The logarithm of the slow mean's signal to noise at which its factor leaves the decay as it is."""


def problems() -> Iterator[tuple[str, int]]:
    """Families and horizons, the longest first."""
    for horizon in sorted(HORIZONS, reverse=True):
        for family in FAMILIES:
            if horizon < HORIZONS[-1] or family not in SHORT_ONLY:
                yield family, horizon


def with_decay(rule: ZeroShot, changes: dict[str, float]) -> ZeroShot:
    """Returns the rule with 4 facts, the decay's logarithm changed by a number of each of GRID."""
    new = ZeroShot(rule.orthogonal, rule.horizon_free, decay_facts=4)
    state = rule.state_dict()
    shift, of_horizon, of_slow = (changes.get(name, 0.0) for name in ("one", "log T", "log slow SNR"))
    first, of_snr = state["decay"].tolist()
    state["decay"] = torch.tensor([first + shift - TYPICAL * of_slow, of_snr, of_horizon, of_slow])
    new.load_state_dict(state)
    return new


def score(rule: ZeroShot, family: str, horizon: int) -> float:
    """The mean log held-out loss of two optimizees of a problem, in a process of one thread."""
    torch.set_num_threads(1)
    ones = Optimizees(SmallProblem(family, SEED), None, 0, "validation", range(2))
    run_rule(rule, ones, horizon)
    losses = ones.held_out_losses(None).nan_to_num(nan=torch.inf)
    return float(losses.clamp(1e-8, 1e8).log().mean())


def fit(rule: ZeroShot, pool: ProcessPoolExecutor) -> tuple[dict[str, float], dict[str, object]]:
    """Returns the changes that were chosen, and what to say of the search."""
    began, chosen, tried = time.perf_counter(), dict[str, float](), []

    def mean(changes: dict[str, float]) -> float:
        jobs = [(p, pool.submit(score, with_decay(rule, changes), *p)) for p in problems()]
        scores = {p: job.result() for p, job in jobs}
        by_horizon = {
            horizon: torch.tensor([s for (_, h), s in scores.items() if h == horizon]).mean().item()
            for horizon in HORIZONS
        }
        result = sum(by_horizon.values()) / len(HORIZONS)  # every horizon counts alike
        tried.append({"changes": dict(changes), "mean": result, "by_horizon": by_horizon})
        print(json.dumps(tried[-1]), flush=True)
        return result

    best, better = mean({}), chosen
    for name, values in GRID.items():
        for value in values:
            if (found := mean({**chosen, name: value})) < best:
                best, better = found, {**chosen, name: value}
        chosen = better
    return chosen, {"tried": tried, "seconds": round(time.perf_counter() - began)}


def main() -> None:
    """Fits a rule's decay, and says how it does on other problems before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rule", help="name or file of a ZeroShot whose decay follows 2 facts")
    parser.add_argument("--out", type=Path, default=Path("decay.safetensors"), help="the new rule's file")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    args = parser.parse_args()
    rule = pretrained.load(args.rule)
    if not isinstance(rule, ZeroShot) or rule.decay_facts != 2:
        parser.error(f"{args.rule} is no ZeroShot whose decay follows 2 facts")
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        changes, search = fit(rule, pool)
    new = with_decay(rule, changes)
    check = {"before": log_held_out_loss(rule), "after": log_held_out_loss(new)}
    print(changes, check)
    pretrained.save(new, args.out)
    write_json(args.out.with_suffix(".json"), {"changes": changes, **search, "check": check, **origin("cpu")})


if __name__ == "__main__":
    main()
