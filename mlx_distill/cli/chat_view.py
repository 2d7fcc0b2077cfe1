"""Draws the answers of a conversation as they are written: in two columns, or one after the other."""

from __future__ import annotations

import os
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, TextIO

import click

from mlx_distill.chat.session import Answer, Event, Piece
from mlx_distill.cli.columns import shorten
from mlx_distill.errors import MlxDistillError
from mlx_distill.records import Contender

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: A terminal of fewer columns shows one answer after the other.
_NARROWEST = 80

#: Seconds between two drawings.
_PERIOD = 0.1

_TAB = 4

#: Control characters; what reorders text or takes no room; halves of characters; separators of lines.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}

#: Of these the ones that text needs. The joiners write Persian, Hindi and many an emoji.
_HARMLESS = "\n\t\u200c\u200d"


def visible(text: str) -> str:
    """Text that may be given to a terminal: what would command it, or show other text than there is, as escapes."""
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if letter not in _HARMLESS and unicodedata.category(letter) in _UNSEEN
        else letter
        for letter in text
    )


class Paper:
    """Where a conversation is written: a terminal, or a file.

    Args:
        file: Of text.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.on_terminal = file.isatty()
        self._styled = self.on_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def write(self, text: str, *, bold: bool = False, dim: bool = False) -> None:
        """Write text as it is, at once."""
        styled = self._styled and (bold or dim)
        self.file.write(click.style(text, bold=bold or None, dim=dim or None) if styled else text)
        self.file.flush()


class OneByOne:
    """Shows answers one after the other, each under its name.

    Args:
        paper: Where to.
        names: What to call the contenders.
    """

    together = False

    def __init__(self, paper: Paper, names: Mapping[Contender, str]) -> None:
        self._paper, self._names = paper, names

    def show(self, events: Iterable[Event]) -> None:
        """Draw answers while they come."""
        named: Contender | None = None
        try:
            for event in events:
                if event.contender != named:
                    named = event.contender
                    self._paper.write(f"{self._names[named]}:", bold=True)
                    self._paper.write("\n")
                self._paper.write(visible(event.text) if isinstance(event, Piece) else "\n\n")
        except MlxDistillError:
            if named:
                self._paper.write("\n")
            raise


class SideBySide:
    """Shows answers in columns, all at once.

    While they are written, the end of each is seen; then all of them stand in the terminal, to be scrolled through.

    Args:
        console: Of rich, on a terminal.
        names: What to call the contenders, each of which gets a column.
    """

    together = True

    def __init__(self, console: Console, names: Mapping[Contender, str]) -> None:
        self._console, self._names = console, names

    def show(self, events: Iterable[Event]) -> None:
        """Draw answers while they come."""
        from rich.live import Live

        texts: dict[Contender, str] = dict.fromkeys(self._names, "")
        drawn = 0.0
        try:
            with Live(
                self._frame(texts, whole=False),
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            ) as live:
                for event in events:
                    if isinstance(event, Answer):
                        texts[event.contender] = event.text
                    else:
                        texts[event.contender] += event.text
                    if time.monotonic() - drawn >= _PERIOD:
                        drawn = time.monotonic()
                        live.update(self._frame(texts, whole=False), refresh=True)
        finally:
            if any(texts.values()):
                self._console.print(self._frame(texts, whole=True))
                self._console.print()

    def _frame(self, texts: Mapping[Contender, str], *, whole: bool) -> Text:
        from rich.text import Text

        rule = " │ " if "utf" in self._console.encoding.lower() else " | "
        width = (self._console.width + len(rule)) // len(texts) - len(rule)
        # Room for the names, and for the cursor below.
        rows = None if whole else max(1, self._console.height - 3)
        columns = [self._lines(visible(text), width, rows) for text in texts.values()]
        frame = Text(no_wrap=True, overflow="ignore")
        frame.append(_row([shorten(self._names[contender], width) for contender in texts], width, rule), style="bold")
        for cells in zip_longest(*columns, fillvalue=""):
            frame.append("\n" + _row(cells, width, rule))
        return frame

    def _lines(self, text: str, width: int, rows: int | None) -> list[str]:
        """Text in lines of a width; only the last `rows`, where that is given."""
        from rich.text import Text

        written = text.rstrip("\n").split("\n")
        if rows is not None:
            # A line is at least one row, so none before these is seen.
            written = written[-rows:]
        wrapped = Text("\n".join(line.expandtabs(_TAB) for line in written)).wrap(self._console, width, overflow="fold")
        lines = [line.plain.rstrip() for line in wrapped]
        return lines if rows is None else lines[-rows:]


def _row(cells: Sequence[str], width: int, rule: str) -> str:
    from rich.cells import cell_len

    return rule.join(cell + " " * (width - cell_len(cell)) for cell in cells).rstrip()


def choose_view(paper: Paper, names: Mapping[Contender, str]) -> OneByOne | SideBySide:
    """The best way to show answers as the terminal is now.

    Args:
        names: What to call those who answer.
    """
    if paper.on_terminal and len(names) > 1:
        from rich.console import Console

        console = Console(file=paper.file, highlight=False, markup=False, emoji=False)
        if console.is_terminal and not console.is_dumb_terminal and console.width >= _NARROWEST:
            return SideBySide(console, names)
    return OneByOne(paper, names)
