"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

WIDTH = 140
"""Characters of a line where the output is a file or a pipe, for which rich would take 80 and cut tables."""


def make_console() -> Console:
    """Returns a console as wide as the terminal, or WIDTH where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
