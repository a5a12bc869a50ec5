"""The command line: `python -m l2l_lightning fit | validate | test | tune | compare | reproduce | …`."""

from l2l_lightning.cli.main import main
from l2l_lightning.configs import presets
from l2l_lightning.errors import CommandLineError

__all__ = ["CommandLineError", "main", "presets"]
