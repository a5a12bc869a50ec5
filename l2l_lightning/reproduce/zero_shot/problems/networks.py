"""Small networks that several problems use."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def mlp(sizes: Sequence[int], activation: type[nn.Module], normalised: bool = False) -> nn.Sequential:
    """A perceptron with these numbers of units, inputs and outputs included, LayerNorm before activations."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        norm = [nn.LayerNorm(outputs)] if normalised else []
        layers += [nn.Linear(inputs, outputs), *norm, activation()]
    return nn.Sequential(*layers[: -1 - normalised])


def blocks(width: int, depth: int) -> nn.ModuleList:
    """Transformer layers [B, T, width] of four heads without dropout, normalisation first, as in GPT-2."""
    layer = nn.TransformerEncoderLayer
    return nn.ModuleList(
        layer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(depth)
    )


class CausalTransformer(nn.Module):
    """Tells the next character after each one of a text."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.layers, self.norm = blocks(width, depth), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, text: Tensor) -> Tensor:
        """Logits [B, vocabulary, T] of what follows each character of a text [B, T]."""
        x = self.token(text) + self.place.weight[: text.shape[1]]
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x)).mT
        return logits


class Recurrent(nn.Module):
    """Tells the next character after each one of a text by an LSTM or a GRU."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], vocabulary: int, width: int) -> None:
        super().__init__()
        self.token, self.cells = nn.Embedding(vocabulary, width), kind(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, text: Tensor) -> Tensor:
        """Logits [B, vocabulary, T] of what follows each character of a text [B, T]."""
        logits: Tensor = self.head(self.cells(self.token(text))[0]).mT
        return logits


class VisionTransformer(nn.Module):
    """Classifies images of 28×28 pixels, cut into 16 patches."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Linear(49, width)
        self.place = nn.Embedding(16, width)
        nn.init.normal_(self.place.weight, std=0.02)
        self.layers, self.norm, self.head = blocks(width, depth), nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, 10] of pixels [B, 784]."""
        cut = pixels.view(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)
        x = self.patches(cut) + self.place.weight
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits
