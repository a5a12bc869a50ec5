"""The package's extras: what to install where a package that not everybody needs is missing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from l2l_lightning.errors import MissingPackageError

EXTRAS = {
    "train": ("lightning", "jsonargparse", "torchmetrics", "wandb", "rich", "matplotlib", "tensorboardX"),
    "data": ("torchvision", "PIL", "scipy"),
    "hub": ("huggingface_hub",),
    "analysis": ("pandas",),
    "peers": ("prodigyopt", "dog", "schedulefree"),
    "reproduce": ("sklearn",),
}
"""What each extra of pyproject.toml brings, by the names that are imported; docs/dependencies.md says why."""


def install_command(extra: str) -> str:
    """Returns what to type to get an extra.

    Example:
        >>> install_command("train")
        "pip install 'l2l-lightning[train]'"
    """
    return f"pip install 'l2l-lightning[{extra}]'"


@contextlib.contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Names the extra to install where a package of one cannot be imported; a decorator, too.

    Args:
        what: What cannot be had without it, as the message's subject.

    Raises:
        MissingPackageError: A package of EXTRAS cannot be imported; what else fails is raised as it is.

    Example:
        >>> with needed_by("reproduce zero-shot"):
        ...     from sklearn import datasets
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # Lightning raises one without a name for what it has looked for itself.
        words = [error.name.partition(".")[0]] if error.name else re.findall(r"\w+", str(error))
        for extra, packages in EXTRAS.items():
            for package in packages:
                if package in words:
                    raise MissingPackageError(
                        f"{what} needs the package {package}: {install_command(extra)}", name=package
                    ) from error
        raise
