"""Fits the decay of a trained ZeroShot's weights to their gain, and writes the rule and the search.

    python benchmarks/fit_decay.py zero-shot --replace zero-shot zero-shot-free
    python benchmarks/fit_decay.py zero-shot-elementwise --replace zero-shot-elementwise

A rule whose decay follows the first 2 of DECAY_FACTS gets all 3, and two numbers are chosen one after the
other, from GRID: what the logarithm of the gain counts, and a shift; all other numbers of φ stay. Chosen is
what has the least mean log held-out loss on a problem of each family, which can be overfitted, and on
functions whose examples do not end, which cannot, at several horizons: no problem counts for more than a
factor of e. With --replace rules of the package get the new φ, and their cards what was measured of it. The
check, before and after, is on problems that nothing was chosen by, those that
make_zero_shot.py chooses checkpoints by.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from make_pretrained import measure
from make_zero_shot import headline, log_held_out_loss
from torch import Tensor, nn

from l2l_lightning import ModuleTask, Optimizees, pretrained, run_rule
from l2l_lightning.files import write_json
from l2l_lightning.provenance import commit, origin
from l2l_lightning.rules import ZeroShot
from l2l_lightning.tasks import MNISTMLP, SmallProblem, Task
from l2l_lightning.tasks.small.families import FAMILIES

SEED = 5 * 10**8
"""Of the problem of each family that the numbers are chosen by; no rollout is of it."""
HORIZONS = (100, 300, 1000, 3000)
SHORT_ONLY = ("convolutions", "attention", "recurrent", "fine_tuning")
"""Families that take too long at the last horizon."""
GRID = {"log gain": (1.0, 2.0, 3.0, 4.0), "one": (-1.0, 1.0)}
PIVOT = 1.0
"""The logarithm of the gain at which its factor leaves the decay as it is."""
MOST = 1.0
"""A problem counts for so much at most."""


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


def problems() -> Iterator[tuple[str, int]]:
    """Problems and horizons, the longest first."""
    for horizon in sorted(HORIZONS, reverse=True):
        for name in (*ENDLESS, *FAMILIES):
            if horizon < HORIZONS[-1] or name not in SHORT_ONLY:
                yield name, horizon


def with_decay(rule: ZeroShot, changes: dict[str, float]) -> ZeroShot:
    """Returns the rule with 3 facts, the decay's logarithm changed by a number of each of GRID."""
    new = ZeroShot(rule.orthogonal, rule.horizon_free, decay_facts=3)
    state = rule.state_dict()
    shift, of_gain = (changes.get(name, 0.0) for name in ("one", "log gain"))
    first, of_snr = state["decay"].tolist()
    state["decay"] = torch.tensor([first + shift - PIVOT * of_gain, of_snr, of_gain])
    new.load_state_dict(state)
    return new


def score(rule: ZeroShot, name: str, horizon: int) -> float:
    """The mean log held-out loss of two optimizees of a problem, in a process of one thread."""
    torch.set_num_threads(1)
    task = ENDLESS[name]() if name in ENDLESS else SmallProblem(name, SEED)
    ones = Optimizees(task, None, 0, "train", range(2))
    run_rule(rule, ones, horizon)
    losses = ones.held_out_losses(None).nan_to_num(nan=torch.inf)
    return float(losses.clamp(1e-8, 1e8).log().mean())


def fit(rule: ZeroShot, pool: ProcessPoolExecutor) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the changes that were chosen, and what to say of the search."""
    began, chosen, tried = time.perf_counter(), dict[str, float](), []

    def scores(changes: dict[str, float]) -> dict[tuple[str, int], float]:
        jobs = [(p, pool.submit(score, with_decay(rule, changes), *p)) for p in problems()]
        return {p: job.result() for p, job in jobs}

    before = scores({})

    def gain(changes: dict[str, float]) -> float:
        """How much lower the mean log held-out loss is."""
        lower = {p: min(max(before[p] - s, -MOST), MOST) for p, s in scores(changes).items()}
        of_kinds = {
            kind: torch.tensor([g for (name, _), g in lower.items() if (name in ENDLESS) == is_endless])
            for kind, is_endless in (("families", False), ("endless", True))
        }
        means = {kind: of_kind.mean().item() for kind, of_kind in of_kinds.items()}
        mean = torch.cat(list(of_kinds.values())).mean().item()
        tried.append({"changes": dict(changes), "lower_by": mean, **means})
        print(json.dumps(tried[-1]), flush=True)
        return mean

    best, better = 0.0, chosen
    for name, values in GRID.items():
        for value in values:
            if (found := gain({**chosen, name: value})) > best:
                best, better = found, {**chosen, name: value}
        chosen = better
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
        before, after = pool.map(log_held_out_loss, (rule, new))
    check = {"before": before, "after": after}
    print(changes, check)
    pretrained.save(new, args.out)
    document = {"changes": changes, **search, "check": check, **origin("cpu")}
    write_json(args.out.with_suffix(".json"), document)
    for name in args.replace:
        replace(name, new, document)


if __name__ == "__main__":
    main()
