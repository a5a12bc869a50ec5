"""Tables that fit a terminal of any width, and cut no number off."""

from __future__ import annotations

import html
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from l2l_lightning.console import make_console


@dataclass(frozen=True)
class Column:
    """A column of a FittingTable.

    Args:
        name: Its head.
        is_number: Whether its cells are numbers: they stand on the right, each whole on one line. The words
            of other cells may be spread over lines.
        spare: Where the table is too wide, columns are left out in the order of this number; 0 never is.
    """

    name: str
    is_number: bool = False
    spare: int = 0


class FittingTable:
    """A table that prints itself as wide as it needs, and where that is too wide in another form.

    It is, whichever fits first: the whole table; the table without the columns that can be spared, one after
    another; with words below one another; without a frame; its rows below one another, a line for each cell.

    Args:
        title: The text above it.
        columns: The columns; the first one names the rows.
        rows: The cells, as text, of every row.
        bold: The positions of rows in bold.

    Example:
        >>> columns = [Column("optimizer"), Column("final loss", is_number=True)]
        >>> table = FittingTable("Quadratic", columns, [["adam", "0.358 ± 0.012"]])
        >>> print(table.text(width=20))
        Quadratic
        adam
          final loss
            0.358 ± 0.012
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[Column],
        rows: Sequence[Sequence[str]],
        bold: Collection[int] = (),
    ) -> None:
        self.title, self.columns, self.bold = title, list(columns), bold
        self.rows = [list(row) for row in rows]

    def text(self, width: int) -> str:
        """Returns the table as plain text of at most so many characters a line."""
        file = io.StringIO()
        Console(file=file, width=width, force_terminal=False, force_jupyter=False, color_system=None).print(
            self
        )
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __str__(self) -> str:
        return self.text(make_console().width)

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield from self._layout(options.max_width)

    def _repr_html_(self) -> str:
        """Shows the whole table in a notebook."""

        def row(cells: Sequence[str], tag: str, bold: bool = False) -> str:
            aligned = ("right" if column.is_number else "left" for column in self.columns)
            weight = "; font-weight: bold" if bold else ""
            inner = (
                f'<{tag} style="text-align: {side}{weight}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(cells, aligned, strict=True)
            )
            return f"<tr>{''.join(inner)}</tr>"

        head = row([column.name for column in self.columns], "th")
        body = "".join(row(cells, "td", number in self.bold) for number, cells in enumerate(self.rows))
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"

    def _layout(self, width: int) -> Iterator[RenderableType]:
        shown = list(range(len(self.columns)))
        spared = sorted((c.spare, place) for place, c in enumerate(self.columns) if c.spare)
        choices = [shown]
        for _, place in spared:
            choices.append([other for other in choices[-1] if other != place])
        for places in choices:
            if sum(self._natural(place) for place in places) + _framed(len(places)) <= width:
                yield self._table(places, [self._natural(place) for place in places], framed=True)
                return
        for framed, around in ((True, _framed(len(places))), (False, _frameless(len(places)))):
            if (widths := self._spread(places, width - around)) is not None:
                yield self._table(places, widths, framed)
                return
        yield from self._below_one_another(places[1:], width)

    def _natural(self, place: int) -> int:
        return max(cell_len(text) for text in self._texts(place))

    def _least(self, place: int) -> int:
        """The width of the longest text of the column that must not be spread over lines."""
        head, *cells = self._texts(place)
        whole = cells if self.columns[place].is_number else " ".join(cells).split()
        return max(map(cell_len, [*head.split(), *whole]), default=1)

    def _texts(self, place: int) -> list[str]:
        return [self.columns[place].name, *(row[place] for row in self.rows)]

    def _spread(self, places: Sequence[int], width: int) -> list[int] | None:
        """The columns' widths where all is to take so much, the widest ones being narrowed first."""
        widths, least = ([size(place) for place in places] for size in (self._natural, self._least))
        while sum(widths) > width:
            wide = [place for place in range(len(widths)) if widths[place] > least[place]]
            if not wide:
                return None
            widths[max(wide, key=lambda place: widths[place])] -= 1
        return widths

    def _table(self, places: Sequence[int], widths: Sequence[int], framed: bool) -> Table:
        table = Table(title=Text(self.title, style="italic"))
        if not framed:
            table.box, table.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
            table.show_edge = table.pad_edge = False
        for place, width in zip(places, widths, strict=True):
            column = self.columns[place]
            table.add_column(
                Text(column.name),
                justify="right" if column.is_number else "left",
                width=width,
                overflow="fold",
            )
        for number, row in enumerate(self.rows):
            cells = (Text(row[place]) for place in places)
            table.add_row(*cells, style="bold" if number in self.bold else None)
        return table

    def _below_one_another(self, places: Sequence[int], width: int) -> Iterator[Text]:
        names = max((cell_len(self.columns[place].name) for place in places), default=0)
        values = max((cell_len(row[place]) for place in places for row in self.rows), default=0)
        beside = 2 + names + 2 + values <= width
        yield Text(self.title, style="italic", overflow="fold")
        for number, row in enumerate(self.rows):
            yield Text(row[0], style="bold" if number in self.bold else "", overflow="fold")
            for place in places:
                name, cell = self.columns[place].name, row[place]
                if cell and beside:
                    yield Text(f"  {name:<{names}}  {cell}")
                elif cell:
                    yield Text(f"  {name}", overflow="fold")
                    yield Text(f"    {cell}", overflow="fold")


def _framed(columns: int) -> int:
    """Characters of a line of a table with a frame that are not its cells'."""
    return 3 * columns + 1


def _frameless(columns: int) -> int:
    return 2 * columns - 1
