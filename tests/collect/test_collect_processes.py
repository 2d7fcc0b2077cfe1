"""Real processes: killed, interrupted, and two at once. A clean run after that finds nothing lost."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import mlx_distill
from mlx_distill.cli.main import main
from mlx_distill.layout import DataFolder, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.records import ChatRow
from tests.servers.messages_server import MODEL, MessagesServer

PROMPTS = 24


@pytest.fixture
def server() -> Iterator[MessagesServer]:
    with MessagesServer(delay=0.05) as running:
        yield running


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"question {n}\n" for n in range(PROMPTS)), encoding="utf-8")
    return [
        *(sys.executable, "-m", "mlx_distill", "collect", "--prompts", str(prompts), "--out", str(tmp_path / "out")),
        *("--teacher", f"anthropic:{MODEL}", "--accept-terms", "--concurrency", "4"),
        *("--valid-fraction", "0", "--test-fraction", "0"),
    ]


def start(command: list[str], server: MessagesServer) -> subprocess.Popen[str]:
    root = str(Path(mlx_distill.__file__).parent.parent)
    environment = {**os.environ, **server.environment, "PYTHONPATH": root}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ledger_of(tmp_path: Path) -> dict[str, tuple[str, str | None]]:
    """Prompt → state and text."""
    with Ledger(DataFolder(tmp_path / "out").ledger) as ledger:
        return {
            entry.request.messages[0].content or "": (entry.state, entry.reply.text if entry.reply else None)
            for entry in ledger.entries()
        }


def test_killed_at_several_moments_then_a_clean_run(
    server: MessagesServer, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, tuple[str, str | None]] = {}
    cut: list[str] = []
    for moment in (2, 13):
        child = start(command, server)
        server.wait_for_journal(moment)
        child.kill()
        child.communicate()
        now = ledger_of(tmp_path)
        assert {prompt: entry for prompt, entry in known.items() if entry[0] == "answered"}.items() <= now.items()
        cut += [prompt for prompt, (state, _) in now.items() if state == "sent"]
        known = now
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    clean = CliRunner().invoke(main, [*command[3:], "--json"])
    assert clean.exit_code == 0, clean.stderr
    result = json.loads(clean.stdout)
    assert (result["answered"], result["failed"], result["rows"]["train"]) == (PROMPTS, 0, PROMPTS)
    rows = read_rows(tmp_path / "out" / "train.jsonl", ChatRow)
    assert [[m.content for m in row.messages] for row in rows] == [
        [f"question {n}", f"Answer to: question {n}"] for n in range(PROMPTS)
    ]
    # Nothing was paid for twice but what was under way when the process died.
    assert all(times <= 1 + cut.count(prompt) for prompt, times in server.billed.items())
    assert len(server.billed) == PROMPTS


def test_killed_with_several_samples_then_a_clean_run(
    server: MessagesServer, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count()
    server.answer = lambda prompt: f"{prompt} answer {next(numbers)}"
    command += ["--samples", "3", "--duplicate-threshold", "0"]

    def answered() -> dict[tuple[str, int], str]:
        with Ledger(DataFolder(tmp_path / "out").ledger) as ledger:
            return {
                (entry.request.messages[0].content or "", entry.request.sample): entry.reply.text
                for entry in ledger.entries()
                if entry.reply is not None
            }

    known: dict[tuple[str, int], str] = {}
    cut = 0
    for moment in (4, 29):
        child = start(command, server)
        server.wait_for_journal(moment)
        child.kill()
        child.communicate()
        assert known.items() <= answered().items()
        known = answered()
        with Ledger(DataFolder(tmp_path / "out").ledger) as ledger:
            cut += ledger.counts()["sent"]
    assert 0 < len(known) < 3 * PROMPTS
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    clean = CliRunner().invoke(main, [*command[3:], "--json"])
    assert clean.exit_code == 0, clean.stderr
    result = json.loads(clean.stdout)
    assert (result["prompts"], result["samples"], result["answered"]) == (PROMPTS, 3, 3 * PROMPTS)
    found = answered()
    assert known.items() <= found.items()
    rows = read_rows(tmp_path / "out" / "train.jsonl", ChatRow)
    assert [[m.content for m in row.messages] for row in rows] == [
        [f"question {n}", found[f"question {n}", sample]] for n in range(PROMPTS) for sample in range(3)
    ]
    assert len(set(found.values())) == 3 * PROMPTS
    # Nothing was paid for twice but what was under way when the process died.
    assert 3 * PROMPTS <= sum(server.billed.values()) <= 3 * PROMPTS + cut


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_paid_for(
    server: MessagesServer,
    command: list[str],
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = start(command, server)
    server.wait_for_journal(6)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    answered = [prompt for prompt, (state, _) in ledger_of(tmp_path).items() if state == "answered"]
    assert sorted(answered) == sorted(server.journal)
    assert len(answered) < PROMPTS
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(main, command[3:]).exit_code == 0
    assert set(server.billed.values()) == {1}
    assert len(server.billed) == PROMPTS


def test_a_second_process_is_refused_with_the_first_ones_id(
    server: MessagesServer, command: list[str], tmp_path: Path
) -> None:
    server.delay = 1.0
    first = start(command, server)
    server.wait_for_journal(1)
    second = start(command, server)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"in use by process {first.pid}" in err
    first.kill()
    first.communicate()
    assert server.journal.count("question 0") == 1
