"""A small causal transformer that predicts the next character of Python's own documentation."""

from __future__ import annotations

import hashlib
import platform
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
from loop import Problem
from torch import Tensor, nn
from torch.utils.data import TensorDataset

VOCABULARY = 128
"""The characters of ASCII."""


class CharacterTransformer(nn.Module):
    """A causal transformer of 2 layers and 4 heads: the character after each one of up to `context`.

    Source: Vaswani et al. 2017, "Attention Is All You Need"; normalisation comes first, as in GPT-2.
    """

    def __init__(self, context: int = 64, dim: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Embedding(context, dim)
        layer = partial(nn.TransformerEncoderLayer, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer(dim, 4, 4 * dim, activation="gelu") for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        """Returns logits [B, VOCABULARY, T] of the characters that follow those of text, [B, T] int64."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        x = self.characters(text) + self.positions.weight[:length]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x)).transpose(1, 2)


def documentation() -> str:
    """Returns the pages that `help()` shows on Python's language, in ASCII.

    They are pydoc_data.topics, part of every CPython (under the PSF's licence), and differ from version to
    version. Many share sections, so that each paragraph is taken once only: none is in two splits.
    """
    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].strip().split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs)).encode("ascii", "replace").decode()


def transformer_problem(args: Any) -> Problem:
    """Training a CharacterTransformer of width args.dim from scratch, on pieces of args.context characters.

    The first 80% of the text are trained on, from any position; settings are chosen on the next 10%, and the
    last 10% are reported, both in pieces that do not overlap.
    """
    text, context = documentation(), args.context
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    characters = torch.tensor(list(text.encode()))
    first, second = len(text) * 8 // 10, len(text) * 9 // 10

    def pieces(characters: Tensor, stride: int) -> TensorDataset:
        cut = characters.unfold(0, context + 1, stride)
        return TensorDataset(cut[:, :-1], cut[:, 1:])

    return Problem(
        f"transformer of 2 layers, on {context} characters",
        f"documentation of Python {platform.python_version()} (pydoc_data.topics, each paragraph once: "
        f"{len(text):,} characters, SHA-256 {digest}…)",
        partial(CharacterTransformer, context, args.dim),
        pieces(characters[:first], 1),
        pieces(characters[first:second], context),
        pieces(characters[second:], context),
    )
