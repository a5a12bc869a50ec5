"""A small causal transformer that predicts the next character of Python's own documentation."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from l2l_lightning.examples.problem import Problem

VOCABULARY = 128
"""ASCII."""


class CharacterTransformer(nn.Module):
    """A causal transformer: the character after each one from this and those before.

    Args:
        context: T, the longest text that it reads.
        dim: Numbers that stand for a character between the layers.
        num_heads: Attention heads, each of dim / num_heads numbers.
        num_layers: Layers of attention and a feed-forward part of 4 dim.

    Source: Vaswani et al. 2017, "Attention Is All You Need"; normalisation comes first, as in GPT-2.

    Example:
        >>> CharacterTransformer()(torch.zeros(2, 64, dtype=torch.int64)).shape
        torch.Size([2, 128, 64])
    """

    def __init__(self, context: int = 64, dim: int = 64, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Embedding(context, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        """Logits [B, VOCABULARY, T] of the characters that follow those of text, [B, T] int64."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        x = self.characters(text) + self.positions.weight[:length]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits.transpose(1, 2)


def documentation(pages: Mapping[str, str] = topics) -> str:
    r"""The pages that `help()` shows on Python's language, in ASCII.

    They are pydoc_data.topics, part of every CPython (under the PSF's licence), and differ from version to
    version. Many share sections, so that each paragraph is taken once only: none is in two splits.

    Example:
        >>> documentation({"A": "One.\n\nTwo.", "B": "Two.\n\nThree."})
        'One.\n\nTwo.\n\nThree.'
    """
    paragraphs = (paragraph for name in sorted(pages) for paragraph in pages[name].strip().split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs)).encode("ascii", "replace").decode()


def transformer_problem(
    *,
    context: int = 64,
    dim: int = 64,
    steps: int = 300,
    batch_size: int = 16,
    seed: int = 0,
    accelerator: str = "auto",
) -> Problem:
    """Training a CharacterTransformer from scratch on Python's documentation.

    The first 80% of the text are trained on, from any position; settings are chosen on the next 10%, and the
    last 10% are reported, both in pieces of `context` characters that do not overlap.

    Args:
        context: T, characters of a piece.
        dim: The transformer's.
        steps: Training steps.
        batch_size: Pieces in a minibatch.
        seed: Of every random draw.
        accelerator: Lightning's name of the kind of device.
    """
    text = documentation()
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    characters = torch.tensor(list(text.encode()))
    first, second = len(text) * 8 // 10, len(text) * 9 // 10

    def network() -> nn.Module:
        return CharacterTransformer(context, dim)

    parameters = sum(parameter.numel() for parameter in network().parameters())
    return Problem(
        name="transformer",
        description=(
            f"transformer of 2 layers ({parameters:,} parameters), {steps} steps of {batch_size} times "
            f"{context} characters"
        ),
        source=(
            f"documentation of Python {platform.python_version()} (pydoc_data.topics, each paragraph once: "
            f"{len(text):,} characters, SHA-256 {digest}…)"
        ),
        make_network=network,
        train=_pieces(characters[:first], context, 1),
        validation=_pieces(characters[first:second], context, context),
        test=_pieces(characters[second:], context, context),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        accelerator=accelerator,
    )


def _pieces(characters: Tensor, context: int, stride: int) -> TensorDataset:
    """Every stride-th piece [context], with the characters that follow each of its own."""
    pieces = characters.unfold(0, context + 1, stride)
    return TensorDataset(pieces[:, :-1], pieces[:, 1:])
