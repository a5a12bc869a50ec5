"""Presets: the files of options that `--config NAME` stands for."""

from importlib import resources
from pathlib import Path

DEFAULT_PRESET = "quadratic"
"""What runs where no preset is named."""


def presets() -> dict[str, Path]:
    """Returns the shipped presets by short name.

    Example:
        >>> "mnist" in presets()
        True
    """
    folder = Path(str(resources.files("l2l_lightning.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
