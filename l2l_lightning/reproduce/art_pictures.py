"""The pictures of `reproduce art`: contents, styles, and what optimizers make of them, side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from l2l_lightning.reproduce.result_store import Request, ResultStore
from l2l_lightning.rollout.optimizees import Optimizees, derive_generator
from l2l_lightning.tasks import StyleTransfer


class Strip(NamedTuple):
    """A row of pictures."""

    title: str
    pictures: Mapping[str, Tensor]
    """[3, H, W] by the columns' names; colours outside [0, 1] are shown as the nearest inside."""


def styled(store: ResultStore, requests: Mapping[str, Request]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns the first test optimizee's content and style, and what each request's optimizer makes of it."""
    results, seed = {}, store.settings.seed
    for name, request in requests.items():
        optimizees = Optimizees(request.task, None, seed, "test", [0])
        store.optimizer(request).run(optimizees, request.horizon)
        task = optimizees.task
        assert isinstance(task, StyleTransfer)
        results[name] = optimizees.theta[0].view(3, task.size, task.size)
        generator = derive_generator(seed, "test", 0)
        task.init(generator)  # what an optimizee draws first
        content, style = task.draw(generator)
    return content, style, results


def pictures_figure(strips: Sequence[Strip]) -> Figure:
    """Draws pictures in rows that have the same columns, each pixel a square.

    Example:
        >>> import torch
        >>> figure = pictures_figure([Strip("64×64", {"content": torch.rand(3, 8, 8)})])
        >>> len(figure.axes)
        1
    """
    columns = list(strips[0].pictures)
    figure = Figure(figsize=(1.55 * len(columns) + 1.1, 1.6 * len(strips) + 0.3), layout="constrained")
    grid = figure.subplots(len(strips), len(columns), squeeze=False)
    for strip, row in zip(strips, grid, strict=True):
        for name, axes in zip(columns, row, strict=True):
            axes.imshow(strip.pictures[name].clamp(0, 1).movedim(0, -1).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if strip is strips[0]:
                axes.set_title(name, fontsize=9)
        row[0].set_ylabel(strip.title, fontsize=8)
    return figure


def in_a_palette(content: bytes) -> bytes:
    """Returns a PNG file's picture as one of 256 colours, which takes less than half of the bytes.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (2, 2), "red").save(file, "PNG")
        >>> Image.open(io.BytesIO(in_a_palette(file.getvalue()))).convert("RGB").getpixel((1, 1))
        (255, 0, 0)
    """
    file = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return file.getvalue()
