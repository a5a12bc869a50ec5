"""ZeroShot, with nothing tuned, beside AdamW and AdamW with warm-up and cosine, each tuned on every problem.

    python benchmarks/zero_shot.py [--seeds 3] [--problems NAME ...] [--json FILE]

A peer's rate is chosen among RATES on the validation loss of two tuning seeds; reported is the test loss
after the last step, the mean over other seeds. A seed is an initialisation and an order of minibatches, the
same for all. ZeroShot's start was fitted on small networks on digits and MNIST's training and validation
images, and on generated data, factorisations among it, of other sizes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from measuring import origin, write_json
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_lightning import LearnedOptimizer
from l2l_lightning.data import load_images
from l2l_lightning.rules import ZeroShot

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
TUNING_SEEDS = (1000, 1001)
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A network and what it is trained and judged on."""

    build: Callable[[], nn.Module]
    """Draws a fresh network from torch's global stream."""
    batch: Callable[[torch.Generator, str], Batch]
    """Draws (inputs, targets) of the "train", "validation" or "test" data."""
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int


def images(name: str, size: int) -> Callable[[torch.Generator, str], Batch]:
    """Minibatches of a data set's images, four times as large where they are held out."""
    splits = load_images(name)

    def batch(generator: torch.Generator, part: str) -> Batch:
        split = getattr(splits, part)
        return split.gather(split.sample_indices(size if part == "train" else 4 * size, generator))

    return batch


def mlp(*sizes: int, activation: type[nn.Module]) -> nn.Module:
    """A perceptron with these numbers of units, inputs and outputs included."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def sine(steps: int) -> Problem:
    """Regression of sin 6x, without noise."""

    def batch(generator: torch.Generator, part: str) -> Batch:
        x = 2 * torch.rand(64 if part == "train" else 256, 1, generator=generator) - 1
        return x, (6 * x).sin()

    return Problem(lambda: mlp(1, 64, 64, 1, activation=nn.Tanh), batch, F.mse_loss, steps)


def mnist(steps: int, activation: type[nn.Module], *hidden: int) -> Problem:
    """A perceptron on MNIST's embedded subset."""
    return Problem(
        lambda: mlp(784, *hidden, 10, activation=activation), images("mnist", 128), F.cross_entropy, steps
    )


def conv() -> nn.Module:
    """Two convolutions with batch normalisation, for MNIST."""
    return nn.Sequential(
        *(nn.Unflatten(-1, (1, 28, 28)), nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)),
    )


class Factors(nn.Module):
    """Matrix factorisation: a table of numbers as products of two embeddings."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(rows, rank), nn.Embedding(columns, rank)
        for table in (self.rows, self.columns):
            nn.init.normal_(table.weight, 0, 0.1)

    def forward(self, places: Tensor) -> Tensor:
        """The numbers [B] at places (row, column) [B, 2]."""
        return (self.rows(places[:, 0]) * self.columns(places[:, 1])).sum(-1)


def in_parts(values: Tensor) -> dict[str, Tensor]:
    """The first eight tenths for training, then a tenth each to tune and to test on."""
    tenth = len(values) // 10
    train, validation, test = values.tensor_split([8 * tenth, 9 * tenth])
    return {"train": train, "validation": validation, "test": test}


def factorisation() -> Problem:
    """A table of rank 6 of which 30% are known, and of those a tenth each is held out."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(200, 6, generator=generator) @ torch.randn(6, 150, generator=generator) / math.sqrt(6)
    known = (torch.rand(200, 150, generator=generator) < 0.3).nonzero()
    parts = in_parts(known[torch.randperm(len(known), generator=generator)])

    def batch(generator: torch.Generator, part: str) -> Batch:
        size = 256 if part == "train" else 1024
        places = parts[part][torch.randint(len(parts[part]), (size,), generator=generator)]
        return places, table[places[:, 0], places[:, 1]]

    return Problem(lambda: Factors(200, 150, 8), batch, F.mse_loss, 800)


class CharacterTransformer(nn.Module):
    """Two layers of width 64 that tell a text's next character, 32 at a time."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(characters, 64), nn.Parameter(torch.zeros(32, 64))
        nn.init.normal_(self.token.weight, 0, 0.1)
        nn.init.normal_(self.place, 0, 0.02)
        layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Logits [B·32, characters] of what follows each character of a text [B, 32]."""
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        hidden = self.layers(self.token(text) + self.place, mask, is_causal=True)
        return self.head(hidden).flatten(0, 1)


def characters() -> Problem:
    """A character transformer on this project's licence."""
    text = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    parts = in_parts(torch.tensor([alphabet.index(letter) for letter in text]))

    def batch(generator: torch.Generator, part: str) -> Batch:
        size = 16 if part == "train" else 64
        starts = torch.randint(len(parts[part]) - 33, (size, 1), generator=generator)
        windows = parts[part][starts + torch.arange(33)]
        return windows[:, :-1], windows[:, 1:].flatten()

    return Problem(lambda: CharacterTransformer(len(alphabet)), batch, F.cross_entropy, 300)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "matrix factorisation, 800 steps": factorisation,
    "sine, 500 steps": lambda: sine(500),
    "sine, 3000 steps": lambda: sine(3000),
    "logistic regression on digits, 300": lambda: Problem(
        lambda: nn.Linear(64, 10), images("digits", 64), F.cross_entropy, 300
    ),
    "logistic regression on digits, 3000": lambda: Problem(
        lambda: nn.Linear(64, 10), images("digits", 64), F.cross_entropy, 3000
    ),
    "MNIST 784-20-10 sigmoid, 100": lambda: mnist(100, nn.Sigmoid, 20),
    "MNIST 784-20-10 ReLU, 300": lambda: mnist(300, nn.ReLU, 20),
    "MNIST 784-20-20-10 sigmoid, 600": lambda: mnist(600, nn.Sigmoid, 20, 20),
    "MNIST 784-100-10 ReLU, 300": lambda: mnist(300, nn.ReLU, 100),
    "MNIST conv net with BatchNorm, 300": lambda: Problem(conv, images("mnist", 64), F.cross_entropy, 300),
    "character transformer, 300": characters,
}
"""The problems by name."""


def cosine(step: int, steps: int) -> float:
    """Warm-up over a twentieth of the steps, then half a cosine to 0."""
    return min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


Make = Callable[[nn.Module], torch.optim.Optimizer]


def train(problem: Problem, make: Make, seed: int, decays: bool, part: str) -> float:
    """The loss after the last step on held-out data, the mean of eight minibatches."""
    torch.manual_seed(seed)
    module, generator = problem.build(), torch.Generator().manual_seed(seed)
    optimizer = make(module)
    factor = (lambda step: cosine(step, problem.steps)) if decays else (lambda step: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(problem.steps):
        inputs, targets = problem.batch(generator, "train")
        optimizer.zero_grad()
        problem.loss(module(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    module.eval()
    with torch.no_grad():
        batches = (problem.batch(generator, part) for _ in range(8))
        losses = [problem.loss(module(inputs), targets).item() for inputs, targets in batches]
    return sum(losses) / len(losses)


def mean(problem: Problem, make: Make, seeds: Sequence[int], decays: bool, part: str) -> float:
    """The mean of `train` over seeds, infinite where one is not finite."""
    found = sum(train(problem, make, seed, decays, part) for seed in seeds) / len(seeds)
    return found if math.isfinite(found) else math.inf


def measure(problem: Problem, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Each optimizer's rate, if it has one, and test loss."""

    def ours(module: nn.Module) -> torch.optim.Optimizer:
        return LearnedOptimizer(module.named_parameters(), ZeroShot(), total_steps=problem.steps)

    def adamw(rate: float) -> Make:
        return lambda module: torch.optim.AdamW(module.parameters(), rate)

    result = {"zero-shot": {"loss": mean(problem, ours, seeds, False, "test")}}
    for name, decays in (("adamw", False), ("adamw-cosine", True)):
        tried = {rate: mean(problem, adamw(rate), TUNING_SEEDS, decays, "validation") for rate in RATES}
        best = min(tried, key=lambda rate: tried[rate])
        result[name] = {"rate": best, "loss": mean(problem, adamw(best), seeds, decays, "test")}
    return result


def main() -> None:
    """Prints a row for each problem, and the geometric mean of the ratios to the better peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS), metavar="NAME"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    results, ratios = {}, []
    print(f"{'problem':<38}{'zero-shot':>11}{'AdamW':>11}{'rate':>7}{'cosine':>11}{'rate':>7}{'ratio':>8}")
    for name in args.problems:
        found = results[name] = measure(PROBLEMS[name](), range(args.seeds))
        ours, adamw, scheduled = (found[key] for key in ("zero-shot", "adamw", "adamw-cosine"))
        ratios.append(ours["loss"] / min(adamw["loss"], scheduled["loss"]))
        print(
            f"{name:<38}{ours['loss']:>11.4g}{adamw['loss']:>11.4g}{adamw['rate']:>7g}"
            f"{scheduled['loss']:>11.4g}{scheduled['rate']:>7g}{ratios[-1]:>8.3f}",
            flush=True,
        )
    geometric = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean of the ratios to the better peer: {geometric:.3f}")
    if args.json:
        content = {
            "origin": origin("cpu"),
            "seeds": args.seeds,
            "results": results,
            "geometric_mean": geometric,
        }
        write_json(args.json, content)


if __name__ == "__main__":
    main()
