"""What `reproduce art` trains on and tests on: pictures that are optimised to have another one's style."""

from __future__ import annotations

from typing import Any

from l2l_lightning.reproduce.settings import Settings
from l2l_lightning.tasks import StyleTransfer

HORIZON = 128
"""Steps for a picture, as in the paper."""

SIZE = 64
"""Height and width that the rule is trained at, as in the paper; it is tested at twice of it, too."""

STYLE = "swirls"
"""The style that the rule is trained on, unless the settings name one."""

NEW_STYLES = ["mosaic", "dots"]
"""Styles that it is tested on, unless the settings name one."""


def training_task(settings: Settings) -> StyleTransfer:
    """Returns the task that the rule is trained on: one style, at 64×64."""
    return style_task(settings, new=False, size=SIZE)


def style_task(settings: Settings, *, new: bool, size: int) -> StyleTransfer:
    """Returns the task of the style that is trained on, or of new ones, at a size."""
    arguments: dict[str, Any] = {"styles": settings.style or STYLE}
    if new:
        arguments["styles"] = settings.new_style or NEW_STYLES
    if settings.contents is None:
        arguments["least_share"] = 0.5  # two photographs give more contents so
    else:
        arguments["contents"] = settings.contents
    return StyleTransfer(size=size, weights=settings.weights, **arguments)
