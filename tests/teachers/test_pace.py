"""Following a provider's rate limits: the arithmetic with a clock of our own, and real headers of a strict server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_distill.asking import ask_all
from mlx_distill.ledger import Ledger
from mlx_distill.records import Message, Request
from mlx_distill.teachers.anthropic import AnthropicTeacher
from mlx_distill.teachers.pace import Pace
from tests.servers.messages_server import MODEL, Fault, MessagesServer


class Clock:
    """Seconds that the test sets; the wall clock runs with it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + 1_700_000_000

    def date(self, seconds: float) -> str:
        return datetime.fromtimestamp(self.wall() + seconds, UTC).isoformat()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(clock, clock.wall)


def limits(clock: Clock, kind: str, remaining: int, reset: float) -> dict[str, str]:
    prefix = f"anthropic-ratelimit-{kind}"
    return {f"{prefix}-remaining": str(remaining), f"{prefix}-reset": clock.date(reset)}


async def test_what_is_left_may_be_used_and_no_more(clock: Clock, pace: Pace) -> None:
    pace.observe(200, limits(clock, "requests", 3, 20))
    for _ in range(3):
        assert pace.wait() == 0
        await pace.enter()
    assert pace.wait() == pytest.approx(20)
    clock.now += 20.1
    assert pace.wait() == 0


async def test_what_is_under_way_may_not_be_counted_yet(clock: Clock, pace: Pace) -> None:
    for _ in range(5):
        await pace.enter()
    pace.observe(200, limits(clock, "requests", 5, 20))
    pace.leave()
    assert pace.wait() == 0
    await pace.enter()
    assert pace.wait() == pytest.approx(20)


async def test_tokens_are_reckoned_from_answers(clock: Clock, pace: Pace) -> None:
    pace.used(100, 900)
    pace.observe(200, limits(clock, "output-tokens", 1000, 30))
    await pace.enter()
    assert pace.wait() == pytest.approx(30)


@pytest.mark.parametrize("status", [429, 529])
async def test_too_much_pauses_all_and_halves_what_may_be_under_way(clock: Clock, pace: Pace, status: int) -> None:
    for _ in range(8):
        await pace.enter()
    pace.observe(status, {"retry-after": "7"})
    assert pace.wait() == pytest.approx(7)
    clock.now += 7.1
    assert pace.wait() > 0
    for _ in range(4):
        pace.leave()
    assert pace.wait() > 0
    pace.leave()
    assert pace.wait() == 0
    for _ in range(4):  # A round of good answers: one more.
        pace.observe(200, {})
    await pace.enter()
    assert pace.wait() == 0


def test_a_clock_of_ours_that_is_an_hour_late_does_not_matter(clock: Clock, pace: Pace) -> None:
    theirs = datetime.fromtimestamp(clock.wall() + 3600, UTC)
    headers = {
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": datetime.fromtimestamp(clock.wall() + 3610, UTC).isoformat(),
        "date": format_datetime(theirs, usegmt=True),
    }
    pace.observe(200, headers)
    assert 9 <= pace.wait() <= 11


@pytest.mark.parametrize("value", ["", "soon", "-5", "nan", "1e400"])
def test_headers_that_make_no_sense_hold_nobody_back(clock: Clock, pace: Pace, value: str) -> None:
    pace.observe(200, {"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": value})
    pace.observe(429, {"retry-after": value})
    clock.now += 61
    assert pace.wait() == 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MessagesServer]:
    with MessagesServer() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def requests_for(count: int) -> list[Request]:
    return [
        Request(
            prompt_id=f"p{n}",
            family=f"p{n}",
            teacher=f"anthropic:{MODEL}",
            messages=(Message(role="user", content=f"question {n}"),),
            max_tokens=50,
        )
        for n in range(count)
    ]


async def test_a_limit_that_is_announced_is_kept(server: MessagesServer, tmp_path: Path) -> None:
    server.rate = (8, 0.6)
    teacher = AnthropicTeacher(MODEL)
    requests = requests_for(24)
    start = time.monotonic()
    with Ledger(tmp_path / "ledger.db") as ledger:
        # One first, as the limits are not known before an answer.
        await ask_all(requests[:1], teacher, ledger, concurrency=1)
        await ask_all(requests, teacher, ledger, concurrency=16)
        assert ledger.counts()["answered"] == 24
    await teacher.close()
    assert server.refused_by_rate == 0
    assert time.monotonic() - start > 1.0
    assert set(server.billed.values()) == {1}


async def test_a_retry_after_holds_back_those_who_were_not_refused(server: MessagesServer, tmp_path: Path) -> None:
    server.faults["question 0"].append(Fault("status", status=429, error_type="rate_limit_error", retry_after=0.5))
    server.delay = 0.02
    teacher = AnthropicTeacher(MODEL)
    arrivals: list[float] = []
    server.on_event = lambda event: arrivals.append(time.monotonic()) if event == "arrived" else None
    with Ledger(tmp_path / "ledger.db") as ledger:
        await ask_all(requests_for(30), teacher, ledger, concurrency=2)
        assert ledger.counts()["answered"] == 30
    await teacher.close()
    pauses = [later - earlier for earlier, later in pairwise(arrivals)]
    assert max(pauses) > 0.3
    assert arrivals.index(next(t for t, p in zip(arrivals, pauses, strict=False) if p > 0.3)) <= 4
