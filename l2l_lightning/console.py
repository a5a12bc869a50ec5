"""Where tables and progress are shown."""

from __future__ import annotations

from rich.console import Console

WIDTH = 80
"""Characters of a line where the output is a file or a pipe, whatever terminal the command was typed in."""


def make_console() -> Console:
    """Returns a console as wide as the terminal, or WIDTH where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def is_drawn_on(console: Console) -> bool:
    """Tells whether a progress bar can be drawn on a console: on a terminal, and in a notebook."""
    return console.is_terminal or console.is_jupyter
