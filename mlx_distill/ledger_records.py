"""What a ledger says of a request: its state, what came back, and what it may have cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_distill.records import Reply, Request, StopReason

State = Literal["planned", "sent", "answered", "refused", "truncated", "failed"]

#: States that a request leaves only by being sent (again).
UNSENT: tuple[State, ...] = ("planned", "sent", "failed")


@dataclass(frozen=True)
class Entry:
    """One request as the ledger knows it.

    Attributes:
        reply: What came back; None while planned, sent or failed.
        cost_usd: Cost of the reply at the prices of `prices_dated`; None where the price is not known.
        attempts: How often it was sent.
        cut: How many of its sendings were cut off, so that they may have been billed without a reply.
        cut_usd: The most that these can have cost.
        batch: Number of the batch that it was last sent in; None where it was sent alone.
        error: Why it failed the last time.
        planned_at: When, in UTC, as ISO 8601; so are `sent_at` and `done_at`.
    """

    request: Request
    state: State
    reply: Reply | None
    cost_usd: float | None
    prices_dated: str | None
    attempts: int
    cut: int
    cut_usd: float
    batch: int | None
    error: str | None
    planned_at: str
    sent_at: str | None
    done_at: str | None


@dataclass(frozen=True)
class Spending:
    """US dollars that all requests of a ledger came to.

    Attributes:
        paid: For replies that are kept, at the prices of their day.
        cut: The most that sendings which were cut off can have cost.
        under_way: The most that what is sent and open can cost.
        cut_sendings: How many were cut off.
    """

    paid: float
    cut: float
    under_way: float
    cut_sendings: int

    @property
    def most(self) -> float:
        """The most that has been spent, all told."""
        return self.paid + self.cut + self.under_way

    def __add__(self, other: Spending) -> Spending:
        return Spending(
            self.paid + other.paid,
            self.cut + other.cut,
            self.under_way + other.under_way,
            self.cut_sendings + other.cut_sendings,
        )


@dataclass(frozen=True)
class Standing:
    """Where a request stands, in brief.

    Attributes:
        stop: Why the teacher stopped, where there is a reply.
        batch: Number of the batch that it was last sent in.
    """

    state: State
    stop: StopReason | None
    batch: int | None

    @property
    def in_batch(self) -> bool:
        """Whether it is under way in a batch."""
        return self.state == "sent" and self.batch is not None

    @property
    def to_send(self) -> bool:
        """Whether it is to be sent, or sent again."""
        return self.state in UNSENT and not self.in_batch


def state_of(stop: StopReason) -> State:
    """The state of a request whose reply stopped for this reason."""
    return "answered" if stop == "end" else "refused" if stop == "refusal" else "truncated"
