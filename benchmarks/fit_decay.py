"""Fits the decay of a trained ZeroShot's weights to their gain and to the horizon, and writes the rule.

    python benchmarks/fit_decay.py zero-shot --replace zero-shot zero-shot-free
    python benchmarks/fit_decay.py zero-shot-elementwise --replace zero-shot-elementwise

A rule whose decay follows the first 2 of DECAY_FACTS gets all 4: every combination of three numbers of GRID
is tried, a shift and what the logarithms of the gain and of the horizon count; all other numbers of φ stay.
Chosen is what has the least mean log held-out loss over problems of each family, some of which are
overfitted, and functions whose examples do not end, which are not: those count as one family more, and no
problem for more than a factor of e. All candidates meet the same θ0 and minibatches, side by side. The check,
before and after, is on other problems. With --replace rules of the package get the new φ, and their cards
what was measured of it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from make_pretrained import measure
from make_zero_shot import headline
from torch import Tensor, nn

from l2l_lightning import ModuleTask, Optimizees, pretrained
from l2l_lightning.files import write_json
from l2l_lightning.provenance import commit, origin
from l2l_lightning.rollout.perturbed import PerturbedRollout
from l2l_lightning.rules import ZeroShot
from l2l_lightning.tasks import MNISTMLP, SmallProblem, Task
from l2l_lightning.tasks.small.families import FAMILIES

SEEDS, CHECK_SEEDS = range(5 * 10**8, 5 * 10**8 + 6), range(6 * 10**8, 6 * 10**8 + 6)
"""Of the problems of each family that the numbers are chosen by, and of those of the check."""
HORIZONS = (200, 700, 2000)
SHORT_ONLY = ("convolutions", "attention", "recurrent")
"""Families that take too long at the last horizon."""
GRID = {"one": (0.0, 0.5), "log gain": (0.0, 1.0, 2.0, 3.0), "log T": (0.0, 0.3, 0.6, 0.9)}
PIVOT = 1.0
"""The logarithm of the gain at which its factor leaves the decay as it is."""
MOST = 1.0
"""A problem counts for so much at most."""

Changes = dict[str, float]


def endless(
    widths: tuple[int, ...],
    activation: type[nn.Module],
    function: Callable[[Tensor], Tensor],
    noise: float = 0.0,
) -> ModuleTask:
    """The regression of a function on [−1, 1]^d, from new examples at every step; noise is in training."""

    def sample(generator: torch.Generator, split: str) -> tuple[Tensor, Tensor]:
        count, spread = (64, noise) if split == "train" else (512, 0.0)
        x = 2 * torch.rand(count, widths[0], generator=generator) - 1
        return x, function(x) + spread * torch.randn(count, widths[-1], generator=generator)

    def build() -> nn.Module:
        layers = [nn.Linear(*sides) for sides in itertools.pairwise(widths)]
        return nn.Sequential(*(part for layer in layers for part in (layer, activation())))[:-1]

    return ModuleTask(build, nn.functional.mse_loss, sample=sample)


def wave(x: Tensor) -> Tensor:
    """A function of one number, of several frequencies."""
    return (5 * x * x).cos() * x + 0.3 * (3 * x).cos()


def bump(x: Tensor) -> Tensor:
    """A function of two numbers."""
    return (-4 * x.square().sum(1, keepdim=True)).exp() - 0.5 * x[:, :1] * x[:, 1:]


def network(x: Tensor) -> Tensor:
    """A network that is drawn once: two functions of four numbers."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(4, 32, generator=generator), torch.randn(32, 2, generator=generator)
    return (x @ first).tanh() @ second / 32**0.5


ENDLESS: dict[str, Callable[[], Task]] = {
    "endless wave": partial(endless, (1, 48, 48, 1), nn.GELU, wave),
    "endless wave with noise": partial(endless, (1, 48, 48, 1), nn.Tanh, wave, 0.3),
    "endless bump": partial(endless, (2, 32, 32, 32, 1), nn.ReLU, bump),
    "endless network": partial(endless, (4, 32, 32, 2), nn.Tanh, network),
}
"""What cannot be overfitted."""


def problems(seeds: Iterable[int]) -> Iterator[tuple[str, int, int]]:
    """Names, seeds and horizons of problems, the longest first."""
    for horizon in sorted(HORIZONS, reverse=True):
        yield from ((name, 0, horizon) for name in ENDLESS)
        for seed, name in itertools.product(seeds, FAMILIES):
            if horizon < HORIZONS[-1] or name not in SHORT_ONLY:
                yield name, seed, horizon


def with_decay(rule: ZeroShot, changes: Changes) -> ZeroShot:
    """Returns the rule with 4 facts, the decay's logarithm changed by a number of each of GRID."""
    new = ZeroShot(rule.orthogonal, rule.horizon_free, decay_facts=4)
    state = rule.state_dict()
    shift, of_gain, of_horizon = (changes.get(name, 0.0) for name in GRID)
    first, of_snr = state["decay"].tolist()
    state["decay"] = torch.tensor([first + shift - PIVOT * of_gain, of_snr, of_gain, of_horizon])
    new.load_state_dict(state)
    return new


def scores(rules: Sequence[ZeroShot], name: str, seed: int, horizon: int) -> Tensor:
    """The log held-out loss of each rule on one optimizee of a problem, in a process of one thread."""
    torch.set_num_threads(1)
    task = ENDLESS[name]() if name in ENDLESS else SmallProblem(name, seed)
    ones = Optimizees(task, None, 0, "train", [0] * len(rules))
    states = [rule.state_dict() for rule in rules]
    phis = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    PerturbedRollout(rules[0], ones, total_steps=horizon).window(phis, horizon)
    losses = ones.held_out_losses(None).nan_to_num(nan=torch.inf)
    return losses.clamp(1e-8, 1e8).log()


class Gain(NamedTuple):
    """How much lower the mean log held-out loss of a rule is than that of the first one."""

    all: float
    families: float
    endless: float


def gains(rules: Sequence[ZeroShot], seeds: Iterable[int], pool: ProcessPoolExecutor) -> list[Gain]:
    """Compares rules with the first one of them, on problems of these seeds and on the endless ones."""
    jobs = [
        (name, pool.submit(scores, rules, name, seed, horizon)) for name, seed, horizon in problems(seeds)
    ]
    lower: dict[str, list[Tensor]] = {}
    for name, job in jobs:
        found = job.result()
        lower.setdefault(name, []).append((found[0] - found).clamp(-MOST, MOST))
    means = {name: torch.stack(values).mean(0) for name, values in lower.items()}
    families = torch.stack([means[name] for name in FAMILIES])
    endless = torch.stack([means[name] for name in ENDLESS]).mean(0)
    every = torch.cat([families, endless[None]]).mean(0)
    return list(itertools.starmap(Gain, torch.stack([every, families.mean(0), endless], 1).tolist()))


def fit(rule: ZeroShot, pool: ProcessPoolExecutor) -> tuple[Changes, dict[str, Any]]:
    """Returns the changes that were chosen, and what to say of the search."""
    began = time.perf_counter()
    combinations = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    candidates: list[Changes] = [{}, *combinations]
    found = gains([with_decay(rule, changes) for changes in candidates], SEEDS, pool)
    chosen = max(zip(found, candidates, strict=True), key=lambda one: one[0].all)[1]
    tried = [changes | gain._asdict() for changes, gain in zip(candidates, found, strict=True)]
    return chosen, {"tried": tried, "seconds": round(time.perf_counter() - began)}


def replace(name: str, new: ZeroShot, search: dict[str, Any]) -> None:
    """Puts the new φ into a rule of the package, and what was measured of it into its card."""
    card, before = pretrained.card(name), pretrained.load(name)
    rule = ZeroShot(**{**new.config(), "horizon_free": before.config()["horizon_free"]})
    rule.load_state_dict(new.state_dict())
    card["meta_training"]["decay"] = {key: value for key, value in search.items() if key != "tried"}
    optimizers = card["headline"]["optimizers"]
    card |= {
        "rule": {"class": "ZeroShot", **rule.config()},
        "headline": headline(rule, {peer: optimizers[peer] for peer in optimizers if peer != "learned"}),
        "repeatable": measure(rule, MNISTMLP()),
        "measured_at": commit(),
    }
    package = Path(pretrained.__file__).parent
    pretrained.save(rule, package / f"{name}.safetensors")
    write_json(package / f"{name}.json", card)


def main() -> None:
    """Fits a rule's decay, and says how it does on other problems before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rule", help="name or file of a ZeroShot whose decay follows 2 facts")
    parser.add_argument("--out", type=Path, default=Path("decay.safetensors"), help="the new rule's file")
    parser.add_argument("--replace", nargs="*", default=[], metavar="NAME", help="rules of the package")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    args = parser.parse_args()
    rule = pretrained.load(args.rule)
    if not isinstance(rule, ZeroShot) or rule.decay_facts != 2:
        parser.error(f"{args.rule} is no ZeroShot whose decay follows 2 facts")
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        changes, search = fit(rule, pool)
        new = with_decay(rule, changes)
        check = gains([with_decay(rule, {}), new], CHECK_SEEDS, pool)[1]._asdict()
    print(changes, check)
    pretrained.save(new, args.out)
    document = {"changes": changes, **search, "check": check, **origin("cpu")}
    write_json(args.out.with_suffix(".json"), document)
    for name in args.replace:
        replace(name, new, document)


if __name__ == "__main__":
    main()
