"""Checks of settings, given by a caller or found in a file, with messages that name the setting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def check_whole_numbers(minimum: int, maximum: int, **values: Any) -> None:
    """Raises TypeError for the first value that is no whole number, ValueError for one out of its range.

    Example:
        >>> check_whole_numbers(1, 10**6, num_tasks=8)
    """
    for name, value in values.items():
        if type(value) is not int:
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < minimum:
            least = "not be negative" if minimum == 0 else f"be at least {minimum}"
            raise ValueError(f"{name} must {least}, got {value}")
        if value > maximum:
            raise ValueError(f"{name} must be at most {maximum}, got {value}")


def check_at_least(minimum: float, **values: Any) -> None:
    """Raises TypeError for the first value that is no number, ValueError for one not finite or too small.

    Example:
        >>> check_at_least(1, dim=10, batch_size=128)
    """
    for name, value in values.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not (value >= minimum and math.isfinite(value)):
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_finite(**values: Any) -> None:
    """Raises TypeError for the first value that is no number, ValueError for one that is not finite.

    Example:
        >>> check_finite(forget_bias=-1.0)
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def check_positive(**values: Any) -> None:
    """Raises TypeError for the first value that is no number, ValueError for one not finite or not above 0.

    Example:
        >>> check_positive(learning_rate=0.003)
    """
    check_finite(**values)
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def check_switches(**values: Any) -> None:
    """Raises TypeError for the first value that is not True or False.

    Example:
        >>> check_switches(second_order=False)
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be true or false, got {value!r}")


def check_choice(choices: Iterable[str], **values: Any) -> None:
    """Raises ValueError for the first value that is none of the choices.

    Example:
        >>> check_choice(["constant", "cosine"], lr_schedule="cosine")
    """
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
