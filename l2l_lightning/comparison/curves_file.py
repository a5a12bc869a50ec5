"""curves.csv: every loss of a comparison, a line each, written and read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2l_lightning.errors import ResultsError

COLUMNS = ("task", "optimizer", "seed", "step", "loss")
"""Of curves.csv; "seed" is the optimizee's index."""

NEEDED = COLUMNS[1:]
PANEL = "panel"
"""A column of a reproduced experiment's results.csv, which holds the curves of several pictures."""


class Curves(NamedTuple):
    """What a file of curves holds."""

    task: str
    """The task's description; "" without a column of that name."""
    losses: dict[str, Tensor]
    """f_t(θ_t) by optimizer, each [T, K] float64, in the file's order."""


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    r"""Returns a CSV file's text; nine digits tell every float32 from its neighbours.

    Example:
        >>> csv_text(("step", "loss"), [(0, 0.5), (1, float("nan"))])
        'step,loss\n0,0.5\n1,nan\n'
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{value:.9g}" if isinstance(value, float) else value for value in row] for row in rows)
    return buffer.getvalue()


def loss_rows(prefix: Sequence[Any], losses: Tensor) -> Iterator[list[Any]]:
    """Yields a row [*prefix, index of the optimizee, step, loss] for every entry of losses [T, K].

    Example:
        >>> import torch
        >>> list(loss_rows(["adam"], torch.tensor([[4.0, 3.0], [2.0, 1.0]])))
        [['adam', 0, 0, 4.0], ['adam', 0, 1, 2.0], ['adam', 1, 0, 3.0], ['adam', 1, 1, 1.0]]
    """
    for index, column in enumerate(losses.T.tolist()):
        for step, loss in enumerate(column):
            yield [*prefix, index, step, loss]


def curves_text(task: str, losses: Mapping[str, Tensor]) -> str:
    """Returns the text of a curves.csv: of losses [T, K] by optimizer, a line for every entry."""
    return csv_text(
        COLUMNS, (row for name, value in losses.items() for row in loss_rows([task, name], value))
    )


def read_curves(path: Path | str, panel: str | None = None) -> Curves:
    """Reads a comparison's curves.csv, or one panel of a reproduced experiment's results.csv.

    Args:
        path: The file.
        panel: Which panel, where the file has more than one.

    Raises:
        ResultsError: There is no such file, it holds something else, or a part is missing; the message names
            the file and the place.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return _parse(csv.reader(file), panel)
    except FileNotFoundError as error:
        raise ResultsError(f"there is no file {path}") from error
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path} is not a file of curves: it is not text in UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ResultsError(f"{path} is not a file of curves, or is damaged: {error}") from error


def _parse(lines: Iterator[list[str]], panel: str | None) -> Curves:
    head = next(lines, [])
    if lost := [name for name in NEEDED if name not in head]:
        raise ValueError(f"its first line has no column {', '.join(lost)}")
    places = [head.index(name) for name in NEEDED]
    found: dict[str, dict[tuple[int, int], float]] = {}
    tasks: dict[str, None] = {}
    panels: dict[str, None] = {}
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(head):
            raise ValueError(f"line {number} has {len(cells)} of {len(head)} cells")
        row = dict(zip(head, cells, strict=True))
        panels[row.get(PANEL, "")] = None
        if panel is not None and row.get(PANEL) != panel:
            continue
        tasks[row.get("task", "")] = None
        name, *numbers = (cells[place] for place in places)
        try:
            index, step, loss = int(numbers[0]), int(numbers[1]), float(numbers[2])
        except ValueError:
            raise ValueError(f"line {number} has {', '.join(numbers)} for seed, step and loss") from None
        losses = found.setdefault(name, {})
        if (index, step) in losses:
            several = len(panels) > 1 and panel is None
            more = f" (choose one with --panel: {', '.join(panels)})" if several else ""
            raise ValueError(f"line {number} is a second loss of {name}, seed {index}, step {step}{more}")
        losses[index, step] = loss
    if not found:
        if panel is not None:
            raise ValueError(f"it has no panel {panel}: choose from {', '.join(panels)}")
        raise ValueError("it holds no losses")
    return Curves(" / ".join(tasks), {name: _tensor(name, losses) for name, losses in found.items()})


def _tensor(name: str, losses: dict[tuple[int, int], float]) -> Tensor:
    """The losses [T, K] of one optimizer, of which none may be missing."""
    seeds, steps = (sorted({key[place] for key in losses}) for place in (0, 1))
    if (first := (seeds[0], steps[0])) != (0, 0):
        raise ValueError(f"{name} begins with seed {first[0]}, step {first[1]}, not with seed 0, step 0")
    rows = []
    for step in range(len(steps)):
        try:
            rows.append([losses[seed, step] for seed in range(len(seeds))])
        except KeyError as error:
            raise ValueError("{} has no loss of seed {}, step {}".format(name, *error.args[0])) from None
    return torch.tensor(rows, dtype=torch.float64)
