"""The suite's optimizers: ours, and what a user would otherwise take, tuned or said to need none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from l2l_lightning.comparison.baselines import Alternative
from l2l_lightning.errors import ReproductionError
from l2l_lightning.optim import LearnedOptimizer
from l2l_lightning.pretrained import load
from l2l_lightning.rules import Rule


class Stepper(Protocol):
    """Something that acts after each backward pass: an optimizer, its schedule, an average of θ.

    If it has methods `train` and `eval`, as Schedule-Free's optimizers, they are called before training and
    before a network is judged.
    """

    def step(self) -> Any:
        """Acts once."""


@dataclass(frozen=True)
class Peer:
    """An optimizer and how it is tuned; the package's docstring shows how a script adds one."""

    make: Callable[..., Sequence[Stepper]]
    """Makes of (module, steps, rate, **setting) what acts at every step, in this order."""
    grid: range | None = None
    """Positions of the rates in the 1–2–5 series where the search starts; None tunes nothing."""
    alternatives: tuple[Alternative, ...] = ()
    """Settings that are tried at three rates about the best one, besides the default {}."""
    search_of: str | None = None
    """The peer whose search over the rates is this one's too, so that it need not be run twice."""
    rule: Callable[[], Rule] | None = None
    """Of a learned optimizer, its rule: results are kept by φ and by what it does."""
    ours: bool = False
    """It is what the others are compared with."""
    version: int = 1
    """To be raised when the definition changes: results are kept by it."""

    @property
    def tuned(self) -> bool:
        """Whether its rate is searched for on each problem."""
        return self.grid is not None


def constant(step: int, steps: int) -> float:
    """Returns 1."""
    return 1.0


def cosine(step: int, steps: int) -> float:
    """Warm-up times half a cosine: min(1, (t+1) / 0.05 T) · (1 + cos πt/T) / 2."""
    return min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def scheduled(optimizer: Optimizer, steps: int, factor: Callable[[int, int], float]) -> list[Stepper]:
    """Returns an optimizer and the schedule of its rate."""
    return [optimizer, LambdaLR(optimizer, lambda step: factor(step, steps))]


def adamw(
    module: nn.Module, steps: int, rate: float, beta1: float = 0.9, beta2: float = 0.999
) -> list[Stepper]:
    """AdamW at a constant rate."""
    return [AdamW(module.parameters(), rate, (beta1, beta2))]


def adamw_cosine(module: nn.Module, steps: int, rate: float) -> list[Stepper]:
    """AdamW with warm-up and cosine."""
    return scheduled(AdamW(module.parameters(), rate), steps, cosine)


def nag(module: nn.Module, steps: int, rate: float) -> list[Stepper]:
    """Nesterov's momentum, 0.9."""
    return [SGD(module.parameters(), rate, momentum=0.9, nesterov=True)]


def muon_split(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits parameters into the matrices inside a network, which are Muon's, and the others, AdamW's.

    Embeddings, the last layer (the last weight of more than one dimension) and vectors are AdamW's, as
    K. Jordan's "Muon" (2024) has it.
    """
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    weights = [p for p in module.parameters() if p.ndim >= 2 and id(p) not in tables]
    inside = {id(p) for p in weights[:-1]}
    parameters = list(module.parameters())
    return [p for p in parameters if id(p) in inside], [p for p in parameters if id(p) not in inside]


class FlatMuon:
    """torch.optim.Muon, of convolutions too: each is the matrix [outputs, inputs · height · width]."""

    def __init__(self, weights: list[nn.Parameter], rate: float) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ReproductionError(
                f"torch {torch.__version__} has no Muon: update it, or leave it out with --peers"
            )
        self.weights = weights
        self.matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in weights]  # the same storage
        scaled = "match_rms_adamw"
        self.optimizer = torch.optim.Muon(self.matrices, rate, weight_decay=0.01, adjust_lr_fn=scaled)

    def step(self) -> None:
        """Moves the weights."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.optimizer.step()  # type: ignore[no-untyped-call]


def muon(module: nn.Module, steps: int, rate: float, decays: float = 1.0) -> list[Stepper]:
    """Muon and AdamW at one rate, as Muon's updates are scaled to AdamW's size (Liu et al. 2025)."""
    inside, others = muon_split(module)
    factor = cosine if decays else constant
    parts = scheduled(AdamW(others, rate), steps, factor)
    if inside:
        flat = FlatMuon(inside, rate)
        parts += [flat, LambdaLR(flat.optimizer, lambda step: factor(step, steps))]
    return parts


def optional(module: str) -> Any:
    """Imports a peer's package.

    Raises:
        ReproductionError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ReproductionError(
            f"a peer's package cannot be imported ({error}): pip install 'l2l-lightning[peers]', or name "
            "other peers with --peers"
        ) from error


def prodigy(module: nn.Module, steps: int, decays: bool = False) -> list[Stepper]:
    """Prodigy at the rate 1 (Mishchenko and Defazio 2023); with cosine, as its README recommends."""
    optimizer = optional("prodigyopt").Prodigy(module.parameters())
    return scheduled(
        optimizer, steps, lambda step, steps: (1 + math.cos(math.pi * step / steps)) / 2 if decays else 1.0
    )


class Averaged:
    """The polynomial average of θ that DoG is judged by (Ivgi et al. 2023)."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.averager = module, optional("dog").PolynomialDecayAverager(module)

    def step(self) -> None:
        """Averages."""
        self.averager.step()

    def train(self) -> None:
        """Leaves θ as it is."""

    def eval(self) -> None:
        """Puts the average into the network."""
        self.module.load_state_dict(self.averager.averaged_model.state_dict())


def dog(module: nn.Module, steps: int) -> list[Stepper]:
    """DoG at the rate 1, averaged."""
    return [optional("dog").DoG(module.parameters()), Averaged(module)]


def schedule_free(module: nn.Module, steps: int) -> list[Stepper]:
    """Schedule-Free AdamW at its own rate, 0.0025 (Defazio et al. 2024)."""
    return [optional("schedulefree").AdamWScheduleFree(module.parameters())]


def learned(rule: Callable[[], Rule], ours: bool = False) -> Peer:
    """Makes a peer of a rule, at the rate 1."""

    def make(module: nn.Module, steps: int) -> list[Stepper]:
        return [LearnedOptimizer(module.named_parameters(), rule(), total_steps=steps)]

    return Peer(make, rule=rule, ours=ours)


def _betas(*pairs: tuple[float, float]) -> tuple[Alternative, ...]:
    return tuple(Alternative({"beta1": beta1, "beta2": beta2}) for beta1, beta2 in pairs)


ADAMW_RATES, NAG_RATES = range(-9, -1), range(-8, 1)
"""0.001 … 0.2 and 0.002 … 1."""

PEERS: dict[str, Peer] = {
    "adamw": Peer(adamw, ADAMW_RATES),
    "adamw-cosine": Peer(adamw_cosine, ADAMW_RATES),
    "nag": Peer(nag, NAG_RATES),
    "muon": Peer(muon, ADAMW_RATES, (Alternative({"decays": 0.0}),)),
    "adamw-betas": Peer(
        adamw, ADAMW_RATES, _betas((0.5, 0.99), (0.9, 0.95), (0.9, 0.99), (0.95, 0.99)), search_of="adamw"
    ),
    "adamw-0.001": Peer(partial(adamw, rate=1e-3)),
    "prodigy": Peer(prodigy),
    "prodigy-cosine": Peer(partial(prodigy, decays=True)),
    "dog": Peer(dog),
    "schedule-free": Peer(schedule_free),
    "lstm-mnist-mixture": learned(partial(load, "lstm-mnist-mixture")),
    "zero-shot": learned(partial(load, "zero-shot"), ours=True),
    "zero-shot-free": learned(partial(load, "zero-shot-free"), ours=True),
    "zero-shot-elementwise": learned(partial(load, "zero-shot-elementwise"), ours=True),
}
"""Every optimizer by name."""

BEST_OF = ("adamw", "adamw-cosine", "nag")
"""The three of which the best, on each problem, is the bar."""


def get_peer(name: str) -> Peer:
    """Returns a registered peer.

    Raises:
        ReproductionError: There is none of that name.
    """
    if name not in PEERS:
        raise ReproductionError(f"--peers: there is no peer {name!r}, only {', '.join(PEERS)}")
    return PEERS[name]
