"""Where tables are printed."""

from __future__ import annotations

import os

from rich.console import Console

WIDTH = 80
"""Characters of a line where the output is a file or a pipe; the variable COLUMNS says otherwise."""


def make_console() -> Console:
    """Returns a console as wide as the terminal, or where there is none as COLUMNS says, or WIDTH."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)
