"""The command `compare RUN RUN…`: finished runs in one table and picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from l2l_lightning.cli.parser import CommandParser
from l2l_lightning.cli.plot import add_picture_options
from l2l_lightning.comparison.curves_file import csv_text, curves_text
from l2l_lightning.comparison.figures import FORMATS
from l2l_lightning.comparison.result import Comparison, chosen
from l2l_lightning.comparison.runs import Run, line_up, read_run, runs_table
from l2l_lightning.comparison.settings import differing
from l2l_lightning.console import make_console
from l2l_lightning.errors import ResultsError
from l2l_lightning.files import write_atomically, write_json


def compare_runs(arguments: Sequence[str]) -> None:
    """Runs the command: prints the table, and writes it with the curves to --out.

    Raises:
        ResultsError: A folder is no finished run's, the runs are not paired, or --out is not free.
        argparse.ArgumentError: There is no such option.
    """
    options = _parse(arguments)
    out = Path(options.out)
    runs = [read_run(folder) for folder in options.runs]
    _check_out(out)
    comparison = line_up(runs, paired=not options.unpaired)
    if options.optimizers:
        kept = [*comparison.learned, *options.optimizers]
        losses = chosen(comparison.losses, list(dict.fromkeys(kept)))
        comparison = replace(comparison, results={name: comparison.results[name] for name in losses})
    _write(comparison, runs, out, options)
    console = make_console()
    if len(runs) > 1:
        console.print(runs_table(runs))
    console.print(comparison.table())
    console.print(f"Table, curves and summary: {out}", soft_wrap=True)


def _parse(arguments: Sequence[str]) -> Any:
    parser = CommandParser(
        "compare",
        "Lines up finished runs, optimizee by optimizee, in one table and picture. Nothing is "
        "evaluated again. (A checkpoint is compared with tuned baselines by --ckpt_path CHECKPOINT.)",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders of finished runs; the first one is what the others are compared with",
    )
    parser.add_argument(
        "--out", default="comparison", help="folder for table.csv, curves.csv, summary.json and the picture"
    )
    parser.add_argument(
        "--unpaired",
        action="store_true",
        help="show runs side by side that are on other tasks, data, seeds or horizons, without differences",
    )
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the picture")
    add_picture_options(parser, "the baselines to show beside the runs; all without")
    return parser.parse_args(list(arguments))


def _check_out(out: Path) -> None:
    """Refuses a folder that holds anything but an earlier comparison of runs: it would be written over."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        is_ours = isinstance(summary, dict) and "runs" in summary
    except (OSError, ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        raise ResultsError(f"--out {out} holds something else than a comparison of runs: name another folder")


def _write(comparison: Comparison, runs: Sequence[Run], out: Path, options: Any) -> None:
    from l2l_lightning.comparison.plots import image_bytes  # here: matplotlib takes long to load

    settings = dict(zip(comparison.learned, differing([run.settings for run in runs]), strict=True))
    folders = dict(zip(comparison.learned, runs, strict=True))
    figure = comparison.figure(title=options.title, scale=options.scale)
    rows = []
    for row in comparison.rows():
        name = row["optimizer"]
        folder = str(folders[name].folder) if name in folders else ""
        chosen_settings = settings.get(name) or dict.fromkeys(next(iter(settings.values())))
        rows.append(row | chosen_settings | {"folder": folder})
    cells = [["" if value is None else value for value in row.values()] for row in rows]
    write_atomically(out / "table.csv", csv_text(list(rows[0]), cells))
    write_atomically(out / "curves.csv", curves_text(comparison.task, comparison.losses))
    write_atomically(out / f"curves.{options.format}", image_bytes(figure, options.format))
    summary = comparison.summary()
    summary["runs"] = summary.pop("settings")
    write_json(out / "summary.json", summary)
