"""How a step tells what it is doing, without knowing who watches.

A step takes a `Progress` and reports to it. This class itself is the silent one, for use as a library; the
command line passes one that draws bars on standard error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Bar:
    """One task under way."""

    def advance(self, amount: float = 1, **fields: str) -> None:
        """Move on by `amount`, and show the fields, such as `loss="1.234"`, beside the bar."""


class Progress:
    """Reports nothing."""

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        """Show a task while the context is open.

        Args:
            title: What is being done, such as "Training".
            total: Amount after which it is done; None where that is not known.
            unit: What is counted, such as "answers".
        """
        yield Bar()

    def say(self, line: str) -> None:
        """Tell something worth a line of its own."""


SILENT = Progress()
