"""What the benchmarks share: how work is timed, a plain table, strict JSON.

Needs torch alone, so that it runs on a machine where nothing else is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from l2l_lightning import files

BLOCKS, BLOCK_S = 5, 1e-3
"""Measurements on the CPU, each of as many calls as take about so many seconds: a clock tells no less."""


def time_ms(run: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of one call after warming up: the median and the .2 and .8 quantiles.

    On the CPU by PyTorch's timer, of some blocks of calls. On a GPU by Triton's, by CUDA events, with the L2
    cache flushed before every call: the flush takes the GPU longer than a launch takes the CPU, so that the
    launch's overhead stays out of the figure.
    """
    if device.startswith("cuda"):
        from triton.testing import do_bench

        median, low, high = do_bench(run, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
    else:
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        number = max(1, round(BLOCK_S / timer.timeit(1).median))
        seconds = torch.tensor([timer.timeit(number).median for _ in range(BLOCKS)], dtype=torch.float64)
        quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        median, low, high = (1e3 * seconds.quantile(quantiles)).tolist()
    return {"ms": median, "ms_p20": low, "ms_p80": high}


def copy_gb_per_s(device: str) -> float:
    """Bytes that a large copy reads and writes, in 10⁹ a second: what memory allows."""
    source = torch.ones((2**30 if device.startswith("cuda") else 2**28) // 4, device=device)
    copy = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return 1e-6 * moved / time_ms(lambda: copy.copy_(source), device)["ms"]


class Table(NamedTuple):
    """What answers a question: a heading, and rows of anything that can be written."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def print_table(table: Table) -> None:
    """Prints a table in aligned columns."""
    lines = [[str(cell) for cell in line] for line in (table.columns, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip(), flush=True)


def start_log(columns: Sequence[str]) -> Callable[[Sequence[object]], None]:
    """Prints a heading and returns what prints a row, as soon as it is measured, under it.

    They go to standard error: the table that answers the question is printed at the end.
    """
    widths = [max(len(column), 8) for column in columns]

    def print_row(cells: Sequence[object]) -> None:
        pairs = zip(cells, widths, strict=True)
        print("  ".join(str(cell).rjust(width) for cell, width in pairs), file=sys.stderr, flush=True)

    print_row(columns)
    return print_row


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Writes strict JSON, whole or not at all; nothing if no path was asked for.

    Raises:
        ValueError: A number is not finite: JSON has no NaN.
    """
    if path is not None:
        files.write_json(path, content)
