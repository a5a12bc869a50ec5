"""The settings of a data module, as they are given and as a checkpoint has them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from l2l_lightning.checks import check_at_least, check_choice, check_switches, check_whole_numbers
from l2l_lightning.data.own import FROM_PYTHON, NAMES


def check_data_settings(settings: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for settings that MetaData's constructor does not take.

    Data of the user's own is left to `check_own`.
    """
    for name in ("root", "text"):
        if (value := settings[name]) is not None and not isinstance(value, str | os.PathLike):
            kind = "folder" if name == "root" else "file"
            raise TypeError(f"{name} must be a {kind}'s path or None, got {value!r}")
    check_switches(download=settings["download"])
    check_whole_numbers(1, 10**7, num_rollouts=settings["num_rollouts"])
    check_whole_numbers(1, 10**6, text_length=settings["text_length"])
    check_choice(("characters", "bytes"), text_symbols=settings["text_symbols"])
    check_at_least(0, memory_limit=settings["memory_limit"])
    check_whole_numbers(0, 1024, num_workers=settings["num_workers"])
    if (size := settings["image_size"]) is not None:
        if not (isinstance(size, list | tuple) and len(size) == 2):
            raise TypeError(f"image_size must be a height and a width, such as [32, 32], got {size!r}")
        check_whole_numbers(1, 10**5, **{f"image_size[{index}]": length for index, length in enumerate(size)})
    if settings["text"] is not None and settings["train"] is not None:
        raise ValueError("text and train are two data sets: give one of them")


def check_stored_settings(settings: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for settings that `MetaData.settings` never gives."""
    check_data_settings(settings)
    for name in NAMES:
        value = settings[name]
        if isinstance(value, dict) and value.keys() == {FROM_PYTHON}:
            value = value[FROM_PYTHON]
        if not (value is None or isinstance(value, str)):
            raise TypeError(f"{name} must be a dotted path, a folder or None, got {value!r}")


def named_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a data module's settings that may name code, which is imported when one is made of them."""
    return {name: settings.get(name) for name in NAMES}


def given_from_python(settings: Mapping[str, Any]) -> str | None:
    """Returns what a checkpoint's settings say of data that only Python can give again; None if of none.

    Example:
        >>> given_from_python({"train": {"from_python": "TensorDataset"}, "test": "my_data.test"})
        'train (TensorDataset)'
    """
    found = [
        f"{name} ({value[FROM_PYTHON]})" for name in NAMES if isinstance(value := settings.get(name), dict)
    ]
    return ", ".join(found) or None
