"""Tables of aligned columns that break into several where a terminal is too narrow for one."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_GAP = "  "

#: A cell is never cut shorter than this, however narrow the terminal.
_NARROWEST = 8

Style = Callable[[str], str]


@dataclass(frozen=True)
class Column:
    """A column: its head, and a cell a row.

    Attributes:
        styles: By row, what a cell is drawn with.
    """

    head: str
    cells: Sequence[str]
    right: bool = False
    styles: Sequence[Style | None] = ()

    @property
    def width(self) -> int:
        """In columns of a terminal."""
        return max(map(width_of, (self.head, *self.cells)))

    def cut(self, width: int) -> Column:
        """The same, no wider than `width`; what is too long loses its middle."""
        return Column(shorten(self.head, width), [shorten(cell, width) for cell in self.cells], self.right, self.styles)


def table(columns: Sequence[Column], width: int | None, *, head: Style = str) -> list[str]:
    """The lines of one table; or of several, below each other and each with the first column, where that is needed.

    Args:
        columns: All with as many cells. The first names the rows.
        width: Columns of the terminal; None sets no limit, as in a pipe, where a row stays one line.
        head: What heads are drawn with.
    """
    if width is not None:
        first = columns[0].cut(max(_NARROWEST, width // 3))
        room = max(_NARROWEST, width - first.width - len(_GAP))
        columns = [first, *(column.cut(room) for column in columns[1:])]
    lines: list[str] = []
    for part in _parts(columns, width):
        lines += ["", *_lines(part, head)] if lines else _lines(part, head)
    return lines


def width_of(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def shorten(text: str, width: int) -> str:
    """Text of at most `width` columns, its middle left out."""
    if width_of(text) <= width:
        return text
    start, end = "", ""
    while True:
        letter = text[len(start)] if width_of(start) <= width_of(end) else text[-1 - len(end)]
        if width_of(start) + width_of(end) + width_of(letter) + 1 > width:
            return f"{start}…{end}"
        if width_of(start) <= width_of(end):
            start += letter
        else:
            end = letter + end


def _parts(columns: Sequence[Column], width: int | None) -> list[list[Column]]:
    """As many columns a part as fit; each part begins with the first."""
    first, *others = columns
    parts = [[first]]
    taken = first.width
    for column in others:
        needed = len(_GAP) + column.width
        if width is not None and taken + needed > width and len(parts[-1]) > 1:
            parts.append([first])
            taken = first.width
        parts[-1].append(column)
        taken += needed
    return parts


def _lines(columns: Sequence[Column], head: Style) -> list[str]:
    rows = [[_padded(column, column.head, head) for column in columns]]
    for number in range(len(columns[0].cells)):
        rows.append(
            [
                _padded(column, column.cells[number], (column.styles[number] if column.styles else None) or str)
                for column in columns
            ]
        )
    return [_GAP.join(cells).rstrip() for cells in rows]


def _padded(column: Column, text: str, style: Style) -> str:
    padding = " " * (column.width - width_of(text))
    return padding + style(text) if column.right else style(text) + padding
