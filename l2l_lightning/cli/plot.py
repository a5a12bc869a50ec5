"""The command `plot FOLDER`: the picture of a curves.csv, as PNG, PDF or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2l_lightning.cli.parser import CommandParser
from l2l_lightning.comparison.curves_file import read_curves
from l2l_lightning.comparison.figures import FORMATS, losses_figure
from l2l_lightning.comparison.result import LEARNED, chosen
from l2l_lightning.errors import ResultsError
from l2l_lightning.files import write_atomically


def plot(arguments: Sequence[str]) -> None:
    """Runs the command: draws the curves, and prints where the picture is.

    Raises:
        ResultsError: The file is not one of curves, an optimizer is not in it, or --out has another ending.
        argparse.ArgumentError: There is no such option.
    """
    options = _parse(arguments)
    path = Path(options.path)
    if path.is_dir():
        path = _curves_in(path)
    out = Path(options.out) if options.out else path.with_suffix(".png")
    suffix = out.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise ResultsError(f"--out {out}: a picture's name must end in one of {endings}")
    curves = read_curves(path, options.panel)
    losses = chosen(curves.losses, options.optimizers)
    title = options.title if options.title is not None else curves.task
    highlight = options.highlight if options.highlight is not None else [LEARNED]
    figure = losses_figure(losses, title, highlight, options.scale)
    from l2l_lightning.comparison.plots import image_bytes  # here: matplotlib takes long to load

    write_atomically(out, image_bytes(figure, suffix))
    print(f"Picture: {out}")


def add_picture_options(parser: CommandParser, optimizers: str) -> None:
    """Adds the options that say what a picture shows, and how."""
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help=optimizers)
    parser.add_argument("--title", help="the text above the picture; the task without")
    parser.add_argument(
        "--scale", choices=("log", "linear"), help="of the loss axis; log without, if every mean is positive"
    )


def _parse(arguments: Sequence[str]) -> Any:
    parser = CommandParser(
        "plot",
        "Draws the curves of a finished run, or of any other curves.csv: mean losses by step "
        "with 95%% intervals. The same data give the same file, byte for byte.",
    )
    parser.add_argument(
        "path", metavar="FOLDER_OR_CSV", help="a run's folder, or a file such as its curves.csv"
    )
    parser.add_argument("--out", help="the picture, a .png, .pdf or .svg; without, a .png beside the curves")
    add_picture_options(parser, "the optimizers to show; all without")
    parser.add_argument("--highlight", nargs="+", metavar="NAME", help="those in bold; learned without")
    parser.add_argument("--panel", help="which of a reproduced experiment's pictures")
    return parser.parse_args(list(arguments))


def _curves_in(folder: Path) -> Path:
    path = folder / "curves.csv"
    if not path.is_file():
        members = sorted(str(member.parent) for member in folder.glob("member-*/curves.csv"))
        more = f"; a run on a mixture: name one member's folder, such as {members[0]}" if members else ""
        raise ResultsError(f"there is no curves.csv in {folder}{more}")
    return path
