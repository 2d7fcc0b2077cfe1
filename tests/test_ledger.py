"""The ledger: states, what is final, what survives, and whom it refuses."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.errors import FolderError, InputError, ResourceError
from mlx_distill.ledger import Ledger
from mlx_distill.ledger_schema import APPLICATION_ID, MIGRATIONS
from mlx_distill.records import Message, Reply, Request, StopReason, Usage, content_hash


def request_for(
    text: str,
    *,
    prompt_id: str = "p",
    family: str = "f",
    max_tokens: int = 9,
    sample: int = 0,
    temperature: float | None = None,
) -> Request:
    return Request(
        prompt_id=prompt_id,
        family=family,
        teacher="t",
        messages=(Message(role="user", content=text),),
        system="S",
        max_tokens=max_tokens,
        sample=sample,
        temperature=temperature,
    )


REQUEST = request_for("hi")
REPLY = Reply(
    text="hello\u2028\x00 \U0001f600",
    stop="end",
    stop_reason="end_turn",
    usage=Usage(input_tokens=3, output_tokens=5),
    model="m-1",
    seconds=0.25,
)


def test_a_reply_comes_back_from_another_connection_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        assert ledger.plan([REQUEST, request_for("other")]) == 2
        ledger.mark_sent(REQUEST.key)
        assert ledger.record_reply(REQUEST.key, REPLY, cost_usd=0.5, prices_dated="2026-11-01") == "answered"
        with Ledger(path) as second:
            entry = second.entry(REQUEST.key)
    assert entry is not None
    assert (entry.request, entry.reply) == (REQUEST, REPLY)
    assert entry.request.key == REQUEST.key
    assert (entry.state, entry.cost_usd, entry.prices_dated, entry.attempts) == ("answered", 0.5, "2026-11-01", 1)
    assert entry.planned_at <= (entry.sent_at or "") <= (entry.done_at or "")


@pytest.mark.parametrize(
    ("stop", "state"),
    [
        ("end", "answered"),
        ("length", "truncated"),
        ("context", "truncated"),
        ("other", "truncated"),
        ("refusal", "refused"),
    ],
)
def test_a_reply_is_final(tmp_path: Path, stop: StopReason, state: str) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan([REQUEST])
        ledger.mark_sent(REQUEST.key)
        assert ledger.record_reply(REQUEST.key, REPLY.model_copy(update={"stop": stop})) == state
        ledger.plan([REQUEST])
        assert ledger.unsent([REQUEST.key]) == []
        for change in (
            lambda: ledger.mark_sent(REQUEST.key),
            lambda: ledger.record_reply(REQUEST.key, REPLY.model_copy(update={"text": "another"})),
            lambda: ledger.record_failure(REQUEST.key, "no"),
        ):
            with pytest.raises(ValueError, match=f"is {state}"):
                change()
        entry = ledger.entry(REQUEST.key)
        assert entry is not None
        assert entry.reply == REPLY.model_copy(update={"stop": stop})


def test_planned_sent_and_failed_are_to_be_sent(tmp_path: Path) -> None:
    planned, sent, failed = requests = [request_for(text) for text in ("planned", "sent", "failed")]
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan(requests)
        ledger.mark_sent(sent.key)
        ledger.mark_sent(failed.key)
        ledger.record_failure(failed.key, "broken")
        assert ledger.unsent(r.key for r in requests) == [planned.key, sent.key, failed.key]
        assert ledger.counts() == {
            "planned": 1, "sent": 1, "failed": 1, "answered": 0, "refused": 0, "truncated": 0,
        }  # fmt: skip
        ledger.mark_sent(failed.key)
        ledger.record_reply(failed.key, REPLY)
        entry = ledger.entry(failed.key)
        assert entry is not None
        assert (entry.attempts, entry.error) == (2, None)
        assert ledger.counts([failed.key, sent.key, "unknown"])["answered"] == 1


def test_what_was_not_sent_gets_no_reply(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        with pytest.raises(ValueError, match="not planned"):
            ledger.mark_sent(REQUEST.key)
        ledger.plan([REQUEST])
        with pytest.raises(ValueError, match="is planned"):
            ledger.record_reply(REQUEST.key, REPLY)


def test_planning_again_keeps_the_reply_and_takes_the_new_name(tmp_path: Path) -> None:
    renamed = request_for("hi", prompt_id="new-name", family="new-family")
    other = request_for("hi", max_tokens=10)
    assert renamed.key == REQUEST.key != other.key
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan([REQUEST])
        ledger.mark_sent(REQUEST.key)
        ledger.record_reply(REQUEST.key, REPLY)
        assert ledger.plan([renamed, other]) == 1
        entries = list(ledger.entries())
    assert [entry.request for entry in entries] == [renamed, other]
    assert [entry.reply for entry in entries] == [REPLY, None]


def test_entries_follow_the_keys_given(tmp_path: Path) -> None:
    requests = [request_for(str(n)) for n in range(1203)]
    keys = [r.key for r in reversed(requests)]
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan(requests)
        assert [e.request.key for e in ledger.entries([*keys[:700], "unknown", *keys[700:]])] == keys
        assert [e.request for e in ledger.entries()] == requests


def test_what_was_committed_outlives_the_process(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from mlx_distill.ledger import Ledger
from mlx_distill.records import Message, Reply, Request
ledger = Ledger(Path({str(tmp_path / "ledger.db")!r}))
requests = [Request(prompt_id="p", family="f", teacher="t", messages=(Message(role="user", content=str(n)),),
                    max_tokens=1) for n in range(3)]
ledger.plan(requests)
for request in requests:
    ledger.mark_sent(request.key)
ledger.record_reply(requests[0].key, Reply(text="kept", stop="end", model="m"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert [entry.state for entry in ledger.entries()] == ["answered", "sent", "sent"]


def test_it_is_durable_by_its_settings(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        pragmas = {name: ledger.db.execute(f"PRAGMA {name}").fetchone()[0] for name in PRAGMAS}
    assert pragmas == PRAGMAS


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "fullfsync": 1, "checkpoint_fullfsync": 1, "user_version": 3}


def test_old_migrations_are_never_edited() -> None:
    """A ledger that went through them once has what they made then."""
    assert content_hash(MIGRATIONS[:2]) == "2e49ebde8f6cca3dceb77eab2994a26493f34005eb9b246849c10fd48911aa80"


#: Of `request_for("hi")`, written down when a request had neither sample nor temperature.
OLD_KEY = "55f41ab2e7bb331a3bfc1601d1b3ccba234c82ac0d7afb7027816d2562fadee5"


@pytest.fixture
def of_schema_2(tmp_path: Path) -> Path:
    """A ledger as it was before there were samples: one answer that was paid for, one request under way in a batch."""
    path = tmp_path / "ledger.db"
    with sqlite3.connect(path) as db:
        for statement in (*MIGRATIONS[0], *MIGRATIONS[1]):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("PRAGMA user_version = 2")
        db.execute(
            """
            INSERT INTO requests (key, prompt_id, family, teacher, system, messages, max_tokens, state, text, stop,
                stop_reason, model, input_tokens, output_tokens, seconds, cost_usd, prices_dated, attempts, planned_at,
                sent_at, done_at, cut, cut_usd, worst_usd)
            VALUES (?, 'p', 'f', 't', 'S', '[{"role": "user", "content": "hi"}]', 9, 'answered', ?, 'end',
                'end_turn', 'm-1', 3, 5, 0.25, 0.5, '2026-11-01', 2, '2026-11-01T00:00:00.000+00:00',
                '2026-11-01T00:00:01.000+00:00', '2026-11-01T00:00:02.000+00:00', 1, 0.75, 0.75)
            """,
            (OLD_KEY, REPLY.text),
        )
        db.execute(
            """
            INSERT INTO requests (key, prompt_id, family, teacher, messages, max_tokens, state, attempts, batch,
                worst_usd, planned_at)
            VALUES ('k', 'q', 'q', 't', '[{"role": "user", "content": "ho"}]', 9, 'sent', 1, 1, 0.25, 'then')
            """
        )
        db.execute(
            """
            INSERT INTO batches (teacher, state, requests, bytes, sha256, provider_id, intended_at)
            VALUES ('t', 'submitted', 1, 2, 'x', 'msgbatch_1', 'then')
            """
        )
        db.execute("INSERT INTO batch_members (batch, key) VALUES (1, 'k')")
    db.close()
    return path


def contents(path: Path) -> dict[str, list[dict[str, object]]]:
    """All that a ledger holds, by table."""
    with sqlite3.connect(path) as db:
        db.row_factory = sqlite3.Row
        found = {
            table: [dict(row) for row in db.execute(f"SELECT * FROM {table}")]
            for table in ("requests", "batches", "batch_members")
        }
    db.close()
    return found


def test_a_ledger_of_before_there_were_samples_loses_nothing(of_schema_2: Path) -> None:
    before = contents(of_schema_2)
    with Ledger(of_schema_2) as ledger:
        entry = ledger.entry(REQUEST.key)
        assert entry is not None
        assert (entry.request, entry.reply, REQUEST.key) == (REQUEST, REPLY, OLD_KEY)
        assert (entry.state, entry.cost_usd, entry.attempts, entry.cut, entry.cut_usd) == ("answered", 0.5, 2, 1, 0.75)
        assert (ledger.spending().paid, ledger.spending().under_way) == (0.5, 0.25)
        # It is found again, and not asked again; more answers to its prompt are requests of their own.
        assert ledger.plan([REQUEST]) == 0
        assert ledger.unsent([REQUEST.key, "k"]) == []
        more = [request_for("hi", sample=1), request_for("hi", temperature=0.5)]
        assert ledger.plan(more) == 2
        assert ledger.unsent(request.key for request in more) == [request.key for request in more]
    after = contents(of_schema_2)
    assert (after["batches"], after["batch_members"]) == (before["batches"], before["batch_members"])
    assert after["requests"][:2] == [{**row, "sample": 0, "temperature": None} for row in before["requests"]]
    with Ledger(of_schema_2) as ledger:
        assert [entry.request for entry in ledger.entries()][2:] == more


@given(st.integers(0, 10**6), st.none() | st.floats(0, 2))
def test_sample_and_temperature_come_back_to_the_last_bit(sample: int, temperature: float | None) -> None:
    request = request_for("hi", sample=sample, temperature=temperature)
    with Ledger(Path(":memory:")) as ledger:
        ledger.plan([request])
        entry = ledger.entry(request.key)
    assert entry is not None
    assert entry.request == request
    assert entry.request.key == request.key


def test_a_newer_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(InputError, match="newer mlx-distill"):
        Ledger(path)
    assert path.read_bytes() == before


def test_files_that_are_no_ledger_are_refused_and_left_alone(tmp_path: Path) -> None:
    text, foreign = tmp_path / "text.db", tmp_path / "foreign.db"
    text.write_text("this is a diary, not a database\n" * 100, encoding="utf-8")
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE diary (day TEXT)")
    db.close()
    for path in (text, foreign):
        before = path.read_bytes()
        with pytest.raises(InputError, match="not a ledger"):
            Ledger(path)
        assert path.read_bytes() == before
    with pytest.raises(FolderError):
        Ledger(tmp_path / "nowhere" / "ledger.db")


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan([REQUEST])
        ledger.mark_sent(REQUEST.key)
        pages = ledger.db.execute("PRAGMA page_count").fetchone()[0]
        ledger.db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(ResourceError, match="full"):
            ledger.record_reply(REQUEST.key, REPLY.model_copy(update={"text": "x" * 100_000}))
        assert ledger.state(REQUEST.key) == "sent"
        ledger.db.execute("PRAGMA max_page_count = 100000")
        ledger.record_reply(REQUEST.key, REPLY)
        assert ledger.state(REQUEST.key) == "answered"


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(asked: str, answered: str) -> None:
    request = request_for(asked)
    with Ledger(Path(":memory:")) as ledger:
        ledger.plan([request])
        ledger.mark_sent(request.key)
        ledger.record_reply(request.key, REPLY.model_copy(update={"text": answered}))
        entry = ledger.entry(request.key)
    assert entry is not None
    assert entry.reply is not None
    assert (entry.request.messages[0].content, entry.reply.text) == (asked, answered)
