"""How fast a provider may be asked, from the rate-limit headers of its replies.

Every reply of the Messages API says how many requests and tokens are left and when the count starts afresh
(`anthropic-ratelimit-KIND-remaining`, `-limit` and `-reset`, for the kinds below). A request is held back while one
of the counts, less what is under way and may not be counted yet, has no room for it; and all are held back until
`retry-after` is over. How many may be under way at once is halved when the provider says "too many" or
"overloaded", and grows by one a round of good replies, up to what was asked for.

It does not send anything again: that is the SDK's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

KINDS = ("requests", "tokens", "input-tokens", "output-tokens")

#: Never wait longer than this without looking again: a reply under way may bring news.
_LONGEST_WAIT = 5.0

#: Seconds by which two clocks may differ; a provider's `date` has no fractions.
_CLOCKS_AGREE = 2.0

#: Seconds within which two moments are the same.
_SAME_RESET = 0.01

#: Statuses by which a provider says that it is asked too much.
_TOO_MUCH = (429, 529)


@dataclass
class _Count:
    """What is left until `reset`, on our clock, and how much there is after it; as told, or guessed after a reset."""

    remaining: float
    reset: float
    limit: float
    guessed: bool = False


class Pace:
    """Holds requests back.

    Args:
        clock: Seconds that only grow.
        wall: Seconds since 1970, to read the provider's dates with.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._counts: dict[str, _Count] = {}
        self._not_before = 0.0
        self._under_way = 0
        self._allowed: float | None = None
        self._news = asyncio.Event()
        #: Mean tokens of an answered request, in and out, once there was one.
        self._mean = {"input-tokens": 0.0, "output-tokens": 0.0}

    @property
    def under_way(self) -> int:
        """Requests that entered and did not leave."""
        return self._under_way

    async def enter(self) -> None:
        """Wait until one more request may be sent."""
        while (wait := self.wait()) > 0:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), min(wait, _LONGEST_WAIT))
            except TimeoutError:
                continue
        self._under_way += 1
        for kind, count in self._counts.items():
            count.remaining -= self._need(kind)

    def leave(self) -> None:
        """A request is no longer under way."""
        self._under_way -= 1
        self._news.set()

    def wait(self) -> float:
        """Seconds until one more request may be sent, as far as is known now; 0 for at once."""
        now = self._clock()
        if now < self._not_before:
            return self._not_before - now
        if self._allowed is not None and self._under_way >= max(1.0, self._allowed):
            return _LONGEST_WAIT
        for kind, count in self._counts.items():
            if count.reset <= now and count.limit:
                # It starts afresh. Until a reply tells more, no more than that is used.
                count.remaining = count.limit - self._under_way * self._need(kind)
                count.reset, count.guessed = now + _LONGEST_WAIT, True
        waits = [
            count.reset - now
            for kind, count in self._counts.items()
            if count.remaining < self._need(kind) and count.reset > now
        ]
        return max(waits, default=0.0)

    def observe(self, status: int, headers: Mapping[str, str]) -> None:
        """Take note of a reply's status and headers, of an error as well as of an answer."""
        now = self._clock()
        for kind in KINDS:
            remaining = _number(headers.get(f"anthropic-ratelimit-{kind}-remaining"))
            reset = self._moment(headers.get(f"anthropic-ratelimit-{kind}-reset"), headers.get("date"))
            if remaining is None or reset is None:
                continue
            # Some of what is under way may not be counted yet. At worst the room is used a little later.
            remaining -= max(0, self._under_way - 1) * self._need(kind)
            known = self._counts.get(kind)
            if known is not None and not known.guessed and reset <= known.reset + _SAME_RESET:
                # Of the same count; replies come in any order, and an older one says more is left than is.
                known.remaining = min(known.remaining, remaining)
            elif reset > now or known is None:
                limit = _number(headers.get(f"anthropic-ratelimit-{kind}-limit")) or 0.0
                self._counts[kind] = _Count(remaining, reset, limit)
        if status in _TOO_MUCH:
            seconds = _number(headers.get("retry-after")) or 0.0
            self._not_before = max(self._not_before, now + seconds)
            self._allowed = max(1.0, (self._under_way if self._allowed is None else self._allowed) / 2)
        elif status < 400 and self._allowed is not None:
            self._allowed += 1 / max(1.0, self._allowed)
        self._news.set()

    def used(self, input_tokens: int, output_tokens: int) -> None:
        """Take note of what an answer came to; the tokens of the next are reckoned from it."""
        for kind, tokens in (("input-tokens", input_tokens), ("output-tokens", output_tokens)):
            self._mean[kind] = tokens if not self._mean[kind] else 0.9 * self._mean[kind] + 0.1 * tokens

    def _need(self, kind: str) -> float:
        if kind == "requests":
            return 1.0
        if kind == "tokens":
            return sum(self._mean.values())
        return self._mean[kind]

    def _moment(self, text: str | None, date: str | None) -> float | None:
        """A date of the provider on our own clock; its own idea of now counts where ours is far from it."""
        try:
            moment = datetime.fromisoformat(text or "")
        except ValueError:
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        now = self._wall()
        with contextlib.suppress(ValueError):
            theirs = parsedate_to_datetime(date or "").timestamp()
            now = theirs if abs(theirs - now) > _CLOCKS_AGREE else now
        return self._clock() + moment.timestamp() - now


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return max(0.0, number) if math.isfinite(number) else None
