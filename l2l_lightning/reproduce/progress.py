"""A bar over a long command's pieces of work: k of N, what is being computed, and the time since it began."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY = 30.0
"""Seconds from one line to the next where there is no terminal to draw a bar on."""


class ProgressBar(Progress):
    """rich's bar for one list of work, to be entered; where the output is no terminal, a line now and then.

    Args:
        total: N, the pieces of work.
    """

    def __init__(self, total: int) -> None:
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._work = self.add_task("", total=total)
        self._next_line = 0.0

    def report(self, text: str) -> None:
        """Says what is being computed."""
        self.update(self._work, description=text)
        if self.disable and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            task = self.tasks[0]
            print(f"{task.completed:.0f} of {task.total:.0f}: {text}", flush=True)

    def count(self) -> None:
        """Counts one piece of work as done."""
        self.advance(self._work)
