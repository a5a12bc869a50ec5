"""Lines that say how far long work has come, where there is no terminal to draw a bar on."""

from __future__ import annotations

import time
from collections.abc import Callable

LINE_EVERY = 30.0
"""Seconds from one line to the next."""
FIRST_LINE = 5.0
"""Seconds after which the first line comes: by then it can say how long all will take."""


def duration(seconds: float) -> str:
    """Returns a time in the unit that people would say it in.

    Example:
        >>> [duration(seconds) for seconds in (0.4, 42, 600, 9000)]
        ['1 s', '42 s', '10 min', '2.5 h']
    """
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class ProgressLines:
    """Prints how far work has come: a line soon after its start, and then one every so often.

    Args:
        first: Seconds from the start to the first line.
        clock: Tells the time, in seconds.

    Example:
        >>> times = iter([0.0, 6.0, 7.0])
        >>> lines = ProgressLines(clock=lambda: next(times))
        >>> lines.report(lambda: "meta-step 3 of 33", 3, 33)
        meta-step 3 of 33, about 60 s left
        >>> lines.report(lambda: "meta-step 4 of 33", 4, 33)  # a second later: nothing
    """

    def __init__(self, first: float = FIRST_LINE, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._next = self._began + first

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._began

    def report(self, text: Callable[[], str], done: float = 0, total: float = 0) -> None:
        """Says what is done, if a line is due, and how long the rest takes at the rate since the start.

        Args:
            text: Makes the line's words, when they are needed.
            done: Pieces of work that have been done since the start.
            total: Pieces of work; where that is not known, nothing is said of the time.
        """
        now = self._clock()
        if now < self._next:
            return
        self._next = now + LINE_EVERY
        rest = (now - self._began) * (total - done) / done if done else 0.0
        print(text() + (f", about {duration(rest)} left" if rest > 0 else ""), flush=True)
