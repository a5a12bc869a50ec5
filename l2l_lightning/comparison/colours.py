"""The colour and the line of every optimizer, by its name: the same in every figure."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple

# Okabe and Ito's palette, which readers with any colour vision can tell apart.
HIGHLIGHT = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Paul Tol's "muted" palette, made for the same readers.
OTHER_COLOURS = (
    *("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE"),
    *("#882255", "#44AA99", "#999933", "#AA4499"),
)
OTHER_DASHES = ("--", "-.", ":")


class LineStyle(NamedTuple):
    """How a curve is drawn."""

    colour: str
    dashes: str


OWN_STYLES = {
    name: LineStyle(colour, "-")
    for name, colour in zip(
        ("learned", "sgd", "momentum", "nag", "rmsprop", "adam", "adamw"), (HIGHLIGHT, *COLOURS), strict=True
    )
}
"""Of the optimizers of every comparison: solid, in a colour that is theirs alone."""

OTHER_STYLES = tuple(
    LineStyle(colour, dashes) for dashes, colour in itertools.product(OTHER_DASHES, OTHER_COLOURS)
)
"""Of all others: dashed, so that none can be taken for one of OWN_STYLES."""


def line_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    """Returns a figure's lines by name: an optimizer looks the same whatever else is in the figure.

    A name that is not of OWN_STYLES gets one of OTHER_STYLES by its hash. Of two in a figure that would share
    a colour, the later in the alphabet takes the next colour that is free; beyond nine such names, the next
    style that is free; beyond 27, its own all the same.

    Example:
        >>> line_styles(["adam", "lion"])["adam"] == line_styles(["adam"])["adam"]
        True
        >>> line_styles(["lion"])["lion"].dashes in OTHER_DASHES
        True
    """
    styles = {}
    taken: set[LineStyle] = set()
    for name in sorted(set(names)):
        styles[name] = OWN_STYLES[name] if name in OWN_STYLES else _free_style(name, taken)
        taken.add(styles[name])
    return styles


def _free_style(name: str, taken: set[LineStyle]) -> LineStyle:
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % len(OTHER_STYLES)
    in_order = OTHER_STYLES[start:] + OTHER_STYLES[:start]
    colours = {style.colour for style in taken}
    free = [style for style in in_order if style not in taken]
    fresh = [style for style in free if style.colour not in colours]
    return next(iter([*fresh, *free, in_order[0]]))
