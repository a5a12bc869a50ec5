"""Checks of a task's arguments, with messages that name the argument and the value."""

from __future__ import annotations

from l2l_lightning.data.images import Images


def check_at_least(minimum: float, **values: float) -> None:
    """Raises ValueError for the first value below the minimum.

    Example:
        >>> check_at_least(1, dim=10, batch_size=128)
    """
    for name, value in values.items():
        # Not `value < minimum`, which lets NaN pass.
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def need_images(images: Images | None, task: object) -> Images:
    """The images, or a ValueError that says what to pass."""
    if images is None:
        raise ValueError(
            f"{type(task).__name__} draws its minibatches from images and was given none: "
            "pass a split of l2l_lightning.data.load_images()"
        )
    return images
