"""The name that the program was called by, for what it prints: whoever reads it can type it."""

from __future__ import annotations

import sys
from pathlib import Path

COMMAND = "l2l"
"""The command that installing the package adds."""


def program() -> str:
    """Returns "l2l" where that was typed, and "python -m l2l_lightning" wherever else this runs."""
    return COMMAND if Path(sys.argv[0]).stem == COMMAND else "python -m l2l_lightning"
