"""What the loopback server can be told to do wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "status",  # answer with an error status
    "drop before",  # close the connection, nothing accepted
    "drop after",  # accept (and bill), then close the connection without an answer
    "stop",  # answer, and give this stop reason
    "cut stream",  # accept, stream half of the answer, then end the stream as if it were whole
    "break stream",  # accept, stream half of the answer, then close the connection in the middle of a chunk
    "error event",  # accept, stream half of the answer, then an error event
    "text page",  # answer 200 with a page of text, as a proxy does
    "half surrogate",  # answer with half of a surrogate pair
    "stall",  # accept, then say nothing for `seconds`, then answer
    "redirect",  # answer 302 to another host
    # Of batches and their results:
    "expire",  # the request ends expired
    "cancel",  # the request ends canceled
    "error",  # the request ends errored
    "cut at line",  # the list of results ends early, at the end of a line, as if it were whole
    "cut in line",  # the list of results ends early, inside a line, as if it were whole
    "cut short",  # the connection breaks in the middle of the results
    "reorder",  # the results come in reverse
    "twice",  # every result comes twice
    "elsewhere",  # the results are said to lie on another host
]


@dataclass(frozen=True)
class Fault:
    """What to do to one request instead of answering it."""

    kind: Kind
    status: int = 500
    error_type: str = "api_error"
    message: str = "broken on command"
    error_code: str | None = None
    retry_after: float | None = None
    stop_reason: str = "end_turn"
    text: str | None = None
    category: str | None = None
    seconds: float = 0.0
