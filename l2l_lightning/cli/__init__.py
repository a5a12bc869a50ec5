"""The command line, `l2l` or `python -m l2l_lightning`: fit, validate, test, tune, compare, reproduce, …."""

import importlib
from typing import TYPE_CHECKING

from l2l_lightning.cli.main import main
from l2l_lightning.configs import presets
from l2l_lightning.errors import CommandLineError

if TYPE_CHECKING:
    from l2l_lightning.cli.lightning_cli import MetaLearningCLI

__all__ = ["CommandLineError", "MetaLearningCLI", "main", "presets"]

if not TYPE_CHECKING:  # a type checker would take any name for it

    def __getattr__(name):
        if name == "MetaLearningCLI":  # when it is asked for: it imports Lightning
            return importlib.import_module("l2l_lightning.cli.lightning_cli").MetaLearningCLI
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
