"""Checks of a task's arguments and values, with messages that say what was expected and what was given."""

from __future__ import annotations

import math

from torch import Tensor

from l2l_lightning.data.images import Images


def check_at_least(minimum: float, **values: float) -> None:
    """Raises ValueError for the first value below the minimum or not finite, TypeError for what is no number.

    Example:
        >>> check_at_least(1, dim=10, batch_size=128)
    """
    for name, value in values.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not (value >= minimum and math.isfinite(value)):
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def need_images(images: Images | None, task: object) -> Images:
    """The images, or a ValueError that says what to pass."""
    if images is None:
        raise ValueError(
            f"{type(task).__name__} draws its minibatches from images and was given none: "
            "pass a split of l2l_lightning.data.load_images()"
        )
    return images


def check_scalar(value: object, name: str) -> None:
    """Raises unless the value of one optimizee's loss is a scalar tensor.

    Raises:
        TypeError: It is not a tensor.
        ValueError: It has dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a scalar tensor, got {type(value).__name__}")
    if value.ndim:
        raise ValueError(f"{name} must return a scalar tensor, got one of shape {list(value.shape)}")
