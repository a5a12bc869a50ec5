"""What a long command is doing, and about how long it will take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from l2l_lightning.reproduce.training import Report

LINE_EVERY = 30.0
"""Seconds between lines where there is no terminal to draw a bar on."""

FOUND = 0.2
"""Work that takes less, in seconds, was done before: it says nothing about the machine."""

PRIOR = 30.0
"""Seconds of work that count as having taken what was estimated, until there is more to go by."""


class Countdown:
    """Work with an estimated cost in seconds; the time left goes by what the work so far has taken.

    Args:
        total: The estimated seconds of all of it.
    """

    def __init__(self, total: float) -> None:
        self.total = total
        self.done = 0.0
        self.taken = 0.0
        self._last_line = -LINE_EVERY
        console = Console()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Countdown:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def left(self, done: float) -> str:
        """The time left in words, when `done` estimated seconds are."""
        pace = (self.taken + PRIOR) / (self.done + PRIOR)
        minutes = max(self.total - done, 0.0) * pace / 60
        return "under a minute left" if minutes < 1 else f"about {minutes:.0f} min left"

    @contextlib.contextmanager
    def work(self, cost: float, what: str) -> Iterator[Report]:
        """One piece of work; gives what it reports its progress to."""
        started = time.perf_counter()

        def report(fraction: float, text: str) -> None:
            done = self.done + cost * min(fraction, 1.0)
            line = f"{what}{text} · {self.left(done)}"
            if self._bar:
                self._bar.update(self._task, description=line, completed=done, total=self.total)
            elif time.perf_counter() - self._last_line >= LINE_EVERY:
                self._last_line = time.perf_counter()
                print(line, flush=True)

        yield report
        elapsed = time.perf_counter() - started
        if elapsed < FOUND:
            self.total -= cost
        else:
            self.done += cost
            self.taken += elapsed
