"""Embeddings: matrix factorisation, word vectors, a language model of the kind before transformers."""

from __future__ import annotations

import functools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_lightning.reproduce.zero_shot import data
from l2l_lightning.reproduce.zero_shot.problem import PROBLEMS, QUICK, Problem, prediction
from l2l_lightning.reproduce.zero_shot.problems.networks import mlp


class Factors(nn.Module):
    """A table of numbers as the products of two embeddings."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(rows, rank), nn.Embedding(columns, rank)
        for table in (self.rows, self.columns):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, places: Tensor) -> Tensor:
        """The numbers [B] at places (row, column) [B, 2]."""
        products: Tensor = self.rows(places[:, 0]) * self.columns(places[:, 1])
        return products.sum(-1)


@functools.cache
def known_numbers(rows: int, columns: int, rank: int, noise: float) -> data.Data:
    """Places [M, 2] and numbers [M] of a random table of a rank, of which 30% are known."""
    generator = torch.Generator().manual_seed(rows)
    table = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    known = (torch.rand(rows, columns, generator=generator) < 0.3).nonzero()
    numbers = table[known[:, 0], known[:, 1]] / math.sqrt(rank)
    numbers = numbers + noise * torch.randn(len(numbers), generator=generator)
    return data.Data.split(f"generated, {rows}×{columns}", known, numbers)


def factorisation(rows: int, columns: int, noise: float, steps: int) -> Problem:
    """A table of rank 6 by embeddings of 8, 256 of its known numbers at a time."""
    numbers, loss = known_numbers(rows, columns, 6, noise), prediction(F.mse_loss)
    build = partial(Factors, rows, columns, 8)
    return Problem(
        "factorisation", steps, build, numbers.batches(256), numbers.held_out, loss, numbers.source
    )


def skip_gram(vocabulary: int, steps: int) -> Problem:
    """Words from their neighbours, at most four away, by a softmax (Mikolov et al. 2013)."""
    rows, loss = data.words(vocabulary, 4), prediction(F.cross_entropy)

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(vocabulary, 32), nn.Linear(32, vocabulary))

    return Problem("embeddings", steps, build, rows.batches(128), rows.held_out, loss, rows.source)


def neural_n_gram(steps: int) -> Problem:
    """The next character from the eight before it, by embeddings and a perceptron (Bengio et al. 2003)."""
    rows = data.characters("help", 8)

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), mlp((128, 64, 128), nn.Tanh))

    def loss(module: nn.Module, batch: data.Rows) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1][:, -1])

    return Problem("embeddings", steps, build, rows.batches(64), rows.held_out, loss, rows.source)


PROBLEMS |= {
    "factorisation 200×150, 800": partial(factorisation, 200, 150, 0.0, 800),
    "factorisation 120×80, 300": partial(factorisation, 120, 80, 0.0, 300),
    "factorisation 300×200, 3000": partial(factorisation, 300, 200, 0.0, 3000),
    "factorisation 150×100 with noise, 1000": partial(factorisation, 150, 100, 0.3, 1000),
    "skip-gram 500 words, 300": partial(skip_gram, 500, 300),
    "skip-gram 1000 words, 1000": partial(skip_gram, 1000, 1000),
    "neural n-gram, 300": partial(neural_n_gram, 300),
    "neural n-gram, 1000": partial(neural_n_gram, 1000),
}
QUICK += ["factorisation 120×80, 300", "skip-gram 500 words, 300"]
