"""How far long work is and how long it will still take: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from l2l_lightning.console import is_drawn_on, make_console

LINE_EVERY = 30.0
"""Seconds from one line to the next where there is nothing to draw a bar on."""

Clock = Callable[[], float]
"""Seconds since any fixed moment."""


def duration(seconds: float) -> str:
    """Returns a time in words, as precise as an estimate of it is.

    Example:
        >>> [duration(seconds) for seconds in (0.2, 42, 700, 3570, 5400, 300000)]
        ['less than 10 s', 'about 40 s', 'about 12 min', 'about 1 h', 'about 1 h 30 min', 'about 83 h']
    """
    if seconds < 10:
        return "less than 10 s"
    if seconds < 55:
        return f"about {round(seconds, -1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"about {hours} h {rest} min" if rest and hours < 10 else f"about {hours} h"


class WorkProgress(Progress):
    """How many of N pieces of work are done, and what is being done.

    A bar, which goes when the work is done; where there is no terminal a line, at most one every LINE_EVERY
    seconds, that says what the times of the pieces so far make of the rest.

    Args:
        total: Pieces of work; `expect` changes it.
        unit: What a piece is, in the plural.
        first_after: Seconds before which no line is printed: short work says nothing.
        quiet: Say nothing at all, as all processes but the first do.
        clock: The time.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        first_after: float = 0.0,
        quiet: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        console = make_console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        drawn = is_drawn_on(console)
        super().__init__(*columns, console=console, transient=True, disable=quiet or not drawn)
        self._unit = unit
        self._lines = not (quiet or drawn)
        self._clock, self._begun = clock, clock()
        self._next_line = self._begun + first_after
        self._work = self.add_task("", total=total)

    def report(self, text: str) -> None:
        """Says what is being done."""
        self.update(self._work, description=text)
        if self._lines and self._clock() >= self._next_line:
            self._next_line = self._clock() + LINE_EVERY
            left = self.at_this_pace(self._total - self._done, " left")
            print(f"{self._done:,} of {self._total:,} {self._unit}: {text}{left}", flush=True)

    def count(self) -> None:
        """Counts one piece of work as done."""
        self.advance(self._work)

    def expect(self, rest: int) -> None:
        """Says how many pieces are left."""
        self.update(self._work, total=self._done + rest)

    def at_this_pace(self, pieces: int, end: str = "") -> str:
        """Says how long so many pieces will take, as part of a sentence; "" where none is done yet."""
        if not self._done:
            return ""
        seconds = (self._clock() - self._begun) / self._done * pieces
        return f"; at this pace {duration(seconds)}{end}"

    @property
    def _done(self) -> int:
        return int(self.tasks[0].completed)

    @property
    def _total(self) -> int:
        return int(self.tasks[0].total or 0)
