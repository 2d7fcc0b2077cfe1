"""What is known of a request while it is on the wire, beside its answer.

An SDK sends a request again by itself when the connection breaks. The first sending may have been accepted, and
billed, all the same: its fate is not known. A teacher that can see this counts it here, and asks before it sends
again whether that may still be paid for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mlx_distill.records import Request


async def _always() -> bool:
    return True


@dataclass
class Sending:
    """One call of `Teacher.ask`, as seen on the wire.

    Attributes:
        note_cut: Called once for each sending that was cut off and is to be followed by another, before that leaves.
            Notes the first where it outlives the process; False where another may not be paid for.
        cut: How many sendings were cut off so far: each may have been billed, and gave no answer.
        noted: How many of them `note_cut` has noted.
    """

    note_cut: Callable[[], Awaitable[bool]] = _always
    cut: int = 0
    noted: int = 0

    @property
    def cut_last(self) -> int:
        """How many were cut off and not followed by another."""
        return self.cut - self.noted


_current: ContextVar[Sending | None] = ContextVar("sending", default=None)


def current() -> Sending:
    """The sending that this task makes; one that nobody looks at, where none was opened."""
    return _current.get() or Sending()


@contextmanager
def watched(sending: Sending) -> Iterator[Sending]:
    """Let a teacher asked within note what happens on the wire."""
    token = _current.set(sending)
    try:
        yield sending
    finally:
        _current.reset(token)


@runtime_checkable
class Paced(Protocol):
    """A teacher whose provider says how fast it may be asked."""

    async def enter(self, request: Request) -> None:
        """Wait until the request may be sent. Each call is followed by `leave` when its answer is there."""
        ...

    def leave(self) -> None:
        """Say that a request is no longer under way."""
        ...
