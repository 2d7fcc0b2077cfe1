"""Answers that were cut are asked again with more tokens, and nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_distill.cli.main import main
from mlx_distill.collect.requests import limits
from mlx_distill.collect.run import collect_from_spec
from mlx_distill.config import CollectConfig
from mlx_distill.layout import DataFolder, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.records import ChatRow
from tests.servers.messages_server import MODEL, Fault, MessagesServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MessagesServer]:
    with MessagesServer() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        running.answer = lambda prompt: " ".join(f"w{n}" for n in range(int(prompt)))
        yield running


@pytest.fixture
def config(tmp_path: Path) -> CollectConfig:
    """Prompts say how many words their answer has: 5, 15, 35 and 100."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("5\n15\n35\n100\n", encoding="utf-8")
    return CollectConfig(
        prompts=prompts,
        teacher=f"anthropic:{MODEL}",
        out=tmp_path / "out",
        accept_terms=True,
        valid_fraction=0,
        test_fraction=0,
        max_tokens=10,
        max_tokens_ceiling=50,
    )


def asked(server: MessagesServer) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for _, body in server.requests:
        found.setdefault(body["messages"][0]["content"], []).append(body["max_tokens"])
    return found


def test_each_limit_is_asked_once_up_to_the_ceiling(server: MessagesServer, config: CollectConfig) -> None:
    manifest = collect_from_spec(config)
    assert asked(server) == {"5": [10], "15": [10, 20], "35": [10, 20, 40], "100": [10, 20, 40, 50]}
    assert (manifest.answered, manifest.asked_again, manifest.prompts) == (3, 6, 4)
    assert [(drop.reason, drop.count) for drop in manifest.dropped] == [("truncated", 1)]
    rows = read_rows(config.out / "train.jsonl", ChatRow)
    assert [len((row.messages[-1].content or "").split()) for row in rows] == [5, 15, 35]
    # Every answer is paid for, the cut ones as well, and every one is kept.
    assert manifest.usage.output_tokens == 5 + (10 + 15) + (10 + 20 + 35) + (10 + 20 + 40 + 50)
    assert manifest.cost_usd == pytest.approx((10 * 3 + manifest.usage.output_tokens * 15) / 1e6)
    with Ledger(DataFolder(config.out).ledger) as ledger:
        kept = [(e.request.prompt_id, e.request.max_tokens, e.state) for e in ledger.entries()]
    assert len(kept) == 10
    assert sum(state == "truncated" for *_, state in kept) == 7


def test_a_second_run_asks_nothing_and_a_higher_ceiling_only_what_is_cut(
    server: MessagesServer, config: CollectConfig
) -> None:
    first = collect_from_spec(config)
    count = len(server.requests)
    assert collect_from_spec(config) == first
    assert len(server.requests) == count
    higher = collect_from_spec(config.model_copy(update={"max_tokens_ceiling": 200}))
    assert higher.answered == 4
    # The limit of 50 was the old ceiling; from 40 the way now leads to 80.
    assert asked(server)["100"] == [10, 20, 40, 50, 80, 160]


def test_a_run_that_was_left_between_two_limits_goes_on_from_there(
    server: MessagesServer, config: CollectConfig
) -> None:
    collect_from_spec(config.model_copy(update={"max_tokens_ceiling": 20}))
    before = asked(server)
    assert before["35"] == [10, 20]
    server.faults["35"].append(Fault("status", status=400))
    failed = collect_from_spec(config)
    assert {drop.reason: drop.count for drop in failed.dropped} == {"failed": 1, "truncated": 1}
    assert collect_from_spec(config).answered == 3
    assert asked(server)["35"] == [10, 20, 40, 40]


def test_the_longest_answers_are_streamed(server: MessagesServer, config: CollectConfig) -> None:
    config.prompts.write_text("9000\n", encoding="utf-8")
    manifest = collect_from_spec(config.model_copy(update={"max_tokens": 4096, "max_tokens_ceiling": 16384}))
    assert (manifest.answered, manifest.asked_again) == (1, 2)
    assert [bool(body.get("stream")) for _, body in server.requests] == [False, False, True]


def test_refusals_keep_their_category_and_the_summary_gives_shares(
    server: MessagesServer, config: CollectConfig
) -> None:
    server.faults["5"].append(Fault("stop", stop_reason="refusal", category="bio", text=""))
    server.faults["15"].append(Fault("stop", stop_reason="refusal", text=""))
    arguments = [
        *("collect", "--prompts", str(config.prompts), "--teacher", config.teacher, "--out", str(config.out)),
        *("--accept-terms", "--valid-fraction", "0", "--test-fraction", "0", "--max-tokens", "10"),
        *("--max-tokens-ceiling", "50"),
    ]
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 0, told.output
    assert "Of all prompts: whole 25.0%, refused 50.0%, truncated 25.0%." in told.stdout
    assert "Refusals by the provider's category: bio 1, none given 1." in told.stdout
    assert "5 answers were cut by their limit and asked again with more tokens, up to 50" in told.stdout


def test_limits() -> None:
    assert limits(4096, 16384) == [4096, 8192, 16384]
    assert limits(1000, 3000) == [1000, 2000, 3000]
    assert limits(30_000, 30_000) == [30_000]
