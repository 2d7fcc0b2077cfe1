"""Judging in a process of its own that is killed or interrupted: what was paid for is there afterwards."""

from __future__ import annotations

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
from mlx_distill.layout import ComparisonFolder, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.records import Verdict
from mlx_distill.scores import Duel
from tests.judges.judging import choice, comparison, scores
from tests.servers.messages_server import MODEL, MessagesServer

PROMPTS = 6
#: Two answers a prompt, and each pair in both orders.
QUESTIONS = 4 * PROMPTS

ANSWERS = {(f"p{n}", who): f"{who} {n}" for n in range(PROMPTS) for who in ("base", "distilled")}


def answer(question: str) -> str:
    return choice("A") if "[answer A " in question else scores(7)


@pytest.fixture
def server() -> Iterator[MessagesServer]:
    with MessagesServer(delay=0.05, answer=answer) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> ComparisonFolder:
    return comparison(tmp_path / "c", ANSWERS)


def command(folder: ComparisonFolder) -> list[str]:
    return ["judge", str(folder.root), "--judge", f"anthropic:{MODEL}", "--pairwise", "--concurrency", "3"]


def start(folder: ComparisonFolder, server: MessagesServer) -> subprocess.Popen[str]:
    root = str(Path(mlx_distill.__file__).parent.parent)
    environment = {**os.environ, **server.environment, "PYTHONPATH": root}
    whole = [sys.executable, "-m", "mlx_distill", *command(folder)]
    return subprocess.Popen(whole, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: ComparisonFolder, server: MessagesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, command(folder))
    assert result.exit_code == 0, result.output
    verdicts, duels = read_rows(folder.verdicts, Verdict), read_rows(folder.duels, Duel)
    assert sorted((v.prompt_id, v.contender) for v in verdicts) == sorted(ANSWERS)
    assert len(duels) == len({(d.prompt_id, d.first) for d in duels}) == 2 * PROMPTS
    assert all(v.overall == 7 for v in verdicts)
    assert {d.winner for d in duels} == {"first"}
    assert len(server.billed) == QUESTIONS


def test_a_killed_judge_pays_twice_only_for_what_was_under_way(
    folder: ComparisonFolder, server: MessagesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = start(folder, server)
    server.wait_for_journal(8)
    child.kill()
    child.communicate()
    with Ledger(folder.judge_ledger) as ledger:
        answered, cut = ledger.counts()["answered"], ledger.counts()["sent"]
    assert 0 < answered < QUESTIONS
    finish(folder, server, monkeypatch)
    assert len(server.journal) <= QUESTIONS + cut


def test_an_interrupted_judge_keeps_every_verdict_it_paid_for(
    folder: ComparisonFolder, server: MessagesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = start(folder, server)
    server.wait_for_journal(5)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    kept = len(read_rows(folder.verdicts, Verdict)) + len(read_rows(folder.duels, Duel))
    assert kept == len(server.journal) < QUESTIONS
    finish(folder, server, monkeypatch)
    assert set(server.billed.values()) == {1}
