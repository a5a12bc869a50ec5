"""Pictures to take a style from that are generated: nobody's, and the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SIDE = 256
"""Height and width of a generated picture, in pixels."""


def _grid() -> tuple[Tensor, Tensor]:
    """The pixels' rows and columns from 0 to 1, [SIDE, SIDE] each."""
    places = (torch.arange(SIDE) + 0.5) / SIDE
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    return rows, columns


def _colour(values: Tensor, palette: list[tuple[float, float, float]]) -> Tensor:
    """Colours values in [0, 1] by a palette, between whose entries it is linear: [H, W] to [3, H, W]."""
    colours = torch.tensor(palette)
    place = values.clamp(0, 1) * (len(palette) - 1)
    below = place.floor().clamp(max=len(palette) - 2)
    mixed = torch.lerp(colours[below.long()], colours[below.long() + 1], (place - below)[..., None])
    return mixed.movedim(-1, 0)


def swirls() -> Tensor:
    """Bands of blue, white and yellow that wind around one another, [3, SIDE, SIDE]."""
    y, x = _grid()
    for turn in range(1, 4):
        wind = 0.12 / turn
        x, y = (
            x + wind * torch.sin(2 * math.pi * (turn * 1.5 * y + 0.2 * turn)),
            y + wind * torch.cos(2 * math.pi * (turn * 1.5 * x + 0.3 * turn)),
        )
    bands = 0.5 + 0.5 * torch.sin(2 * math.pi * 5 * (x + 0.6 * y))
    return _colour(bands, [(0.05, 0.10, 0.35), (0.15, 0.35, 0.70), (0.85, 0.90, 0.90), (0.95, 0.75, 0.20)])


def mosaic() -> Tensor:
    """Tiles of warm and green glass with dark joints: cells around random points, [3, SIDE, SIDE]."""
    generator = torch.Generator().manual_seed(0)
    count = 70
    points = torch.rand(count, 2, generator=generator)
    palette = torch.tensor([(0.85, 0.25, 0.15), (0.95, 0.65, 0.15), (0.30, 0.60, 0.30), (0.95, 0.90, 0.70)])
    colours = palette[torch.randint(len(palette), (count,), generator=generator)]
    places = torch.stack(_grid(), -1).view(-1, 2)
    (nearest, second), (cell, _) = (part.T for part in torch.cdist(places, points).topk(2, largest=False))
    joint = ((second - nearest) / 0.02).clamp(0, 1)[:, None]
    mosaic: Tensor = (joint * colours[cell]).T.reshape(3, SIDE, SIDE)
    return mosaic


def dots() -> Tensor:
    """Round dots of several colours and sizes, one over another, on violet, [3, SIDE, SIDE]."""
    generator = torch.Generator().manual_seed(0)
    y, x = _grid()
    picture = torch.tensor((0.30, 0.15, 0.40))[:, None, None].expand(3, SIDE, SIDE)
    palette = torch.tensor([(0.95, 0.45, 0.60), (0.20, 0.75, 0.75), (0.98, 0.93, 0.55), (0.55, 0.35, 0.75)])
    for index in range(160):
        row, column, size = torch.rand(3, generator=generator).tolist()
        distance = ((y - row).square() + (x - column).square()).sqrt()
        inside = ((0.02 + 0.04 * size - distance) * SIDE + 0.5).clamp(0, 1)
        picture = torch.lerp(picture, palette[index % len(palette)][:, None, None], inside)
    return picture


TEXTURES: dict[str, Callable[[], Tensor]] = {"swirls": swirls, "mosaic": mosaic, "dots": dots}
"""The generated pictures by name: functions without arguments to colours in [0, 1], [3, SIDE, SIDE]."""
