"""What an experiment is: the losses that it needs, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from l2l_lightning.reproduce.result_store import Request, ResultStore


class Finding(NamedTuple):
    """One line of the report: a number of theirs, ours, and whether it reproduced."""

    what: str
    study: str
    """What Bradford, Giancola and Petri report; "–" if nothing."""
    paper: str
    """What Andrychowicz et al. report; "–" if nothing."""
    ours: str
    verdict: str
    """A sentence; starts with "Reproduced", "Not reproduced", "Better", "New" or "Not measured"."""


@dataclass
class Outcome:
    """What an experiment leaves in its folder."""

    findings: list[Finding]
    results: dict[str, Any]
    """The numbers in results.json, beside the provenance."""
    columns: tuple[str, ...]
    """The columns of results.csv, which is in long form."""
    rows: Iterable[Sequence[Any]]
    pictures: dict[str, bytes]
    """PNG files by name, without the ending."""
    tables: list[str]
    """Markdown for the report, under the findings."""
    notes: list[str] = field(default_factory=list)
    """Paragraphs for the report: what did not reproduce, and why as far as it was tested."""


class Experiment(NamedTuple):
    """One of the names that `reproduce` takes."""

    title: str
    """A line that says which figures of whom it repeats."""
    requests: Callable[[ResultStore], dict[Any, Request]]
    """Lists the losses that it needs, in the order in which they are to be computed, by keys of its own."""
    outcome: Callable[[ResultStore, Mapping[Any, Tensor], Path], Outcome]
    """Makes its results of the losses by key; files of a kind of its own go to the folder."""
    keeps_its_own: bool = False
    """Its folder keeps what it has computed, so that it is asked again each time."""
    in_all: bool = True
    """Whether `all` runs it; one that takes long even with the package's rules is named."""


def markdown_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table in Markdown, one line a row.

    Example:
        >>> print(markdown_table(["rule", "loss"], [["adam", 0.5]]))
        | rule | loss |
        | --- | --- |
        | adam | 0.5 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
