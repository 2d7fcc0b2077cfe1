"""What a command prints: progress and notes on standard error, its result on standard output."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from mlx_distill.progress import Bar, Progress


@dataclass(frozen=True)
class Summary:
    """How a command ended.

    Attributes:
        data: The one JSON object of `--json`.
        lines: The same for a person: short, in plain sentences or aligned rows; or what makes them for the columns of
            the terminal, None where there is none. Styles are left out where they would not be seen.
        failed: Whether the command must exit 1 although nothing was raised.
        silent: Whether another process prints it.
    """

    data: dict[str, Any]
    lines: Sequence[str] | Callable[[int | None], Sequence[str]] = field(default_factory=tuple)
    failed: bool = False
    silent: bool = False

    def print(self, *, as_json: bool) -> None:
        """Write to standard output."""
        if self.silent:
            return
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Paths may hold bytes that are no text, and terminals may lack characters: shown as escapes, not refused.
            sys.stdout.reconfigure(errors="backslashreplace")
        if as_json:
            plain = "utf" not in (sys.stdout.encoding or "").lower()
            sys.stdout.write(json.dumps(self.data, ensure_ascii=plain) + "\n")
        else:
            on_terminal = sys.stdout.isatty()
            lines = self.lines
            if callable(lines):
                lines = lines(shutil.get_terminal_size().columns if on_terminal else None)
            coloured = on_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
            sys.stdout.write("".join(f"{line if coloured else click.unstyle(line)}\n" for line in lines))
        sys.stdout.flush()


class TerminalProgress(Progress):
    """Draws bars where standard error is a terminal, and a line every few seconds where it is not."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        if self._live:
            with _rich_bar(title, total, unit) as bar:
                yield bar
        else:
            bar = _LineBar(title, total, unit)
            yield bar
            bar.finish()

    def say(self, line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@contextmanager
def _rich_bar(title: str, total: float | None, unit: str) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(title, total=total, note="")

        class RichBar(Bar):
            def advance(self, amount: float = 1, **fields: str) -> None:
                note = "  ".join(f"{key.replace('_', ' ')} {value}" for key, value in fields.items())
                progress.advance(task, amount)
                if fields:
                    progress.update(task, note=note)

        yield RichBar()


class _LineBar(Bar):
    """A line at the start, then one every few seconds, for logs and pipes."""

    PERIOD_SECONDS = 5.0

    def __init__(self, title: str, total: float | None, unit: str) -> None:
        import time

        self._clock = time.monotonic
        self._title, self._total, self._unit = title, total, unit
        self._done = 0.0
        self._note = ""
        self._start = self._last = self._clock()
        self._print()

    def advance(self, amount: float = 1, **fields: str) -> None:
        self._done += amount
        if fields:
            self._note = "  ".join(f"{key.replace('_', ' ')} {value}" for key, value in fields.items())
        if self._clock() - self._last >= self.PERIOD_SECONDS:
            self._last = self._clock()
            self._print()

    def finish(self) -> None:
        self._print(f"{self._clock() - self._start:.1f} s")

    def _print(self, ending: str = "") -> None:
        count = f"{self._done:g}" if self._total is None else f"{self._done:g}/{self._total:g}"
        words = [f"{self._title}:", count, self._unit, self._note, ending]
        sys.stderr.write(" ".join(word for word in words if word) + "\n")
        sys.stderr.flush()
