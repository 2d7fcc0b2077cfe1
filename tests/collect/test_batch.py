"""Collecting in batches: what is handed over, what comes back, and what happens when any step is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_distill.collect.run import collect_from_spec
from mlx_distill.config import CollectConfig
from mlx_distill.errors import TeacherError, TeacherUnavailableError
from mlx_distill.layout import DataFolder, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.records import ChatRow
from mlx_distill.teachers.anthropic_batch import AnthropicBatches
from tests.servers.messages_server import MODEL, Fault, MessagesServer

QUICK = 0.01


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MessagesServer]:
    monkeypatch.setattr("mlx_distill.collect.batch.POLL_SECONDS", (0.01, 0.02))
    with MessagesServer() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def config(tmp_path: Path) -> CollectConfig:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"question {n}\n" for n in range(20)), encoding="utf-8")
    return CollectConfig(
        prompts=prompts,
        teacher=f"anthropic:{MODEL}",
        out=tmp_path / "out",
        batch=True,
        accept_terms=True,
        valid_fraction=0,
        test_fraction=0,
    )


def changed(config: CollectConfig, **changes: object) -> CollectConfig:
    return config.model_copy(update=changes)


def batches_of(server: MessagesServer) -> list[int]:
    return [len(batch.requests) for batch in server.batches.all]


def creations(server: MessagesServer) -> int:
    return len(server.batches.all)


def test_a_batch_answers_all_at_half_the_price(server: MessagesServer, config: CollectConfig) -> None:
    server.looks = 3
    manifest = collect_from_spec(config)
    assert (manifest.answered, manifest.rows["train"], manifest.batch_answers) == (20, 20, 20)
    usage = manifest.usage
    assert manifest.cost_usd == pytest.approx((usage.input_tokens * 3 + usage.output_tokens * 15) / 1e6 / 2)
    assert batches_of(server) == [20]
    rows = read_rows(config.out / "train.jsonl", ChatRow)
    assert [[m.content for m in row.messages] for row in rows] == [
        [f"question {n}", f"Answer to: question {n}"] for n in range(20)
    ]
    assert collect_from_spec(config) == manifest
    assert creations(server) == 1


def test_it_leaves_and_comes_back(server: MessagesServer, config: CollectConfig) -> None:
    server.looks = 2
    left = collect_from_spec(changed(config, wait=False))
    assert (left.in_batch, left.answered, left.rows) == (20, 0, {"train": 0, "valid": 0, "test": 0})
    assert not (config.out / "manifest.json").exists()
    # Whether it is asked to send in batches or not: what is under way is not sent again.
    back = collect_from_spec(changed(config, batch=False))
    assert (back.answered, back.batch_answers, back.in_batch) == (20, 20, 0)
    assert (creations(server), set(server.billed.values())) == (1, {1})


def test_it_splits_by_number_and_by_size(
    server: MessagesServer, config: CollectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnthropicBatches, "most_requests", 8)
    assert collect_from_spec(config).answered == 20
    assert batches_of(server) == [8, 8, 4]
    monkeypatch.setattr(AnthropicBatches, "most_requests", 100_000)
    monkeypatch.setattr(AnthropicBatches, "most_bytes", 1500)
    assert collect_from_spec(changed(config, max_tokens=5000)).answered == 20
    assert len(batches_of(server)) > 4
    assert sum(batches_of(server)[3:]) == 20
    monkeypatch.setattr(AnthropicBatches, "most_bytes", 100)
    with pytest.raises(TeacherError, match="larger than a batch"):
        collect_from_spec(changed(config, max_tokens=5001))


def test_cut_answers_go_into_a_second_batch(server: MessagesServer, config: CollectConfig) -> None:
    server.answer = lambda prompt: "word " * (30 if prompt == "question 3" else 5)
    manifest = collect_from_spec(changed(config, max_tokens=10, max_tokens_ceiling=40))
    assert (manifest.answered, manifest.asked_again) == (20, 2)
    assert batches_of(server) == [20, 1, 1]
    assert server.billed["question 3"] == 3
    assert manifest.usage.output_tokens == 19 * 5 + 10 + 20 + 30


def test_what_did_not_succeed_is_sent_again_alone(server: MessagesServer, config: CollectConfig) -> None:
    for n, kind in enumerate(("expire", "cancel", "error")):
        server.faults[f"question {n}"].append(Fault(kind))  # type: ignore[arg-type]
    server.faults["question 9"].append(Fault("stop", stop_reason="refusal", category="cyber", text=""))
    first = collect_from_spec(config)
    assert {drop.reason: drop.prompt_ids for drop in first.dropped}.keys() == {"failed", "refused"}
    assert (first.answered, first.refusals) == (16, {"cyber": 1})
    second = collect_from_spec(config)
    assert (second.answered, batches_of(server)) == (19, [20, 3])
    assert set(server.billed.values()) == {1}
    assert second.cut_sendings == 0


@pytest.mark.parametrize("kind", ["reorder", "twice"])
def test_results_in_any_order_and_number(server: MessagesServer, config: CollectConfig, kind: str) -> None:
    server.faults["batches results"].append(Fault(kind))  # type: ignore[arg-type]
    manifest = collect_from_spec(config)
    assert (manifest.answered, manifest.rows["train"]) == (20, 20)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut at line", "results for 10 of 20 requests"),
        ("cut in line", "broke off after"),
        ("cut short", "broke off after"),
        ("text page", "broke off after"),
    ],
)
def test_a_short_list_is_an_error_and_what_was_read_stays(
    server: MessagesServer, config: CollectConfig, kind: str, words: str
) -> None:
    server.faults["batches results"].append(Fault(kind))  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match=words):
        collect_from_spec(config)
    with Ledger(DataFolder(config.out).ledger) as ledger:
        kept = ledger.counts()["answered"]
    assert kept == (0 if kind == "text page" else 10)
    manifest = collect_from_spec(config)
    assert (manifest.answered, creations(server)) == (20, 1)


@pytest.mark.parametrize("kind", ["elsewhere", "redirect"])
def test_results_on_another_host_are_refused(server: MessagesServer, config: CollectConfig, kind: str) -> None:
    key = "batches retrieve" if kind == "elsewhere" else "batches results"
    server.faults[key].append(Fault(kind))  # type: ignore[arg-type]
    with pytest.raises(TeacherUnavailableError, match=r"key is not sent there|not on 127\.0\.0\.1"):
        collect_from_spec(config)
    assert collect_from_spec(config).answered == 20


def test_a_creation_cut_after_it_was_accepted_is_adopted_at_once(server: MessagesServer, config: CollectConfig) -> None:
    server.faults["batches create"].append(Fault("drop after"))
    manifest = collect_from_spec(config)
    assert (manifest.answered, manifest.cut_sendings, creations(server)) == (20, 0, 1)


def test_a_creation_cut_before_it_was_accepted_is_reported_and_never_sent_in_silence(
    server: MessagesServer, config: CollectConfig
) -> None:
    server.faults["batches create"].append(Fault("drop before"))
    for _ in range(2):
        with pytest.raises(
            TeacherError, match=r"cut off at[^\n]*probably never accepted[^\n]*\n.*--batch-orphan adopt"
        ):
            collect_from_spec(config)
    assert creations(server) == 0
    abandoned = collect_from_spec(changed(config, batch_orphan="resubmit"))
    assert (abandoned.answered, creations(server)) == (20, 1)
    assert abandoned.cut_sendings == 20
    assert abandoned.cut_usd > 0


def test_an_abandoned_batch_fails_and_a_later_command_asks_again(server: MessagesServer, config: CollectConfig) -> None:
    server.faults["batches create"].append(Fault("drop before"))
    with pytest.raises(TeacherError):
        collect_from_spec(config)
    with pytest.raises(TeacherError, match="20 failed"):
        collect_from_spec(changed(config, batch_orphan="abandon"))
    assert creations(server) == 0
    assert collect_from_spec(config).answered == 20


@pytest.mark.parametrize("status", [500, 529])
def test_a_creation_that_fails_at_the_provider_is_not_sent_twice(
    server: MessagesServer, config: CollectConfig, status: int
) -> None:
    server.faults["batches create"].append(Fault("status", status=status, retry_after=QUICK))
    with pytest.raises(TeacherError, match="creation of a batch"):
        collect_from_spec(config)
    assert (len(server.faults["batches create"]), creations(server)) == (0, 0)
    assert collect_from_spec(changed(config, batch_orphan="resubmit")).answered == 20


@pytest.mark.parametrize("status", [400, 401, 413, 429])
def test_a_refused_creation_can_simply_be_given_again(
    server: MessagesServer, config: CollectConfig, status: int
) -> None:
    server.faults["batches create"].append(Fault("status", status=status, retry_after=QUICK))
    with pytest.raises(TeacherError):
        collect_from_spec(config)
    manifest = collect_from_spec(config)
    assert (manifest.answered, manifest.cut_sendings, creations(server)) == (20, 0, 1)


def foreign_batch(server: MessagesServer, words: str) -> str:
    """Somebody else's batch of the same number of requests."""
    body = {
        "requests": [
            {
                "custom_id": f"x{n}",
                "params": {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": f"{words} {n}"}]},
            }
            for n in range(20)
        ]
    }
    return server.batches.add(body, "2026-10-21").id


def orphan(server: MessagesServer, config: CollectConfig, kind: str) -> None:
    """Leave a batch whose creation was cut, and which was not found."""
    server.faults["batches create"].append(Fault(kind))  # type: ignore[arg-type]
    # The list is read before the creation, and again when that broke.
    server.faults["batches list"].extend([Fault("stall"), Fault("text page")])
    with pytest.raises(TeacherError):
        collect_from_spec(config)


def test_an_older_batch_is_never_taken_for_the_orphan(server: MessagesServer, config: CollectConfig) -> None:
    server.looks = 1
    foreign_batch(server, "older")
    server.faults["batches create"].append(Fault("drop before"))
    with pytest.raises(TeacherError, match="probably never accepted"):
        collect_from_spec(config)


def test_another_batch_that_ended_is_told_apart_by_its_results(server: MessagesServer, config: CollectConfig) -> None:
    orphan(server, config, "drop after")
    foreign_batch(server, "theirs")
    assert collect_from_spec(config).answered == 20


def test_several_that_it_can_be_are_named_and_one_is_chosen(server: MessagesServer, config: CollectConfig) -> None:
    server.looks = 2
    orphan(server, config, "drop after")
    theirs = foreign_batch(server, "theirs")
    own = server.batches.all[0].id
    with pytest.raises(TeacherError, match=rf"several that it can be: {theirs}, {own}"):
        collect_from_spec(config)
    assert collect_from_spec(changed(config, batch_orphan=f"adopt={own}")).answered == 20
    assert set(server.billed.values()) == {1}


def test_a_wrong_adoption_is_found_out_and_undone(server: MessagesServer, config: CollectConfig) -> None:
    server.looks = 2
    orphan(server, config, "drop before")
    foreign_batch(server, "theirs")
    with pytest.raises(TeacherError, match="is another"):
        collect_from_spec(config)
    with pytest.raises(TeacherError, match="probably never accepted"):
        collect_from_spec(config)
    assert collect_from_spec(changed(config, batch_orphan="resubmit")).answered == 20


def test_the_wall_holds_for_batches_too(server: MessagesServer, config: CollectConfig) -> None:
    # A request of some 75 tokens in and at most 1,000 out costs at most 0.8 cents in a batch, and these nearly do.
    server.answer = lambda prompt: "word " * 990
    limits = {"max_tokens": 1000, "max_tokens_ceiling": 1000}
    manifest = collect_from_spec(changed(config, **limits, max_cost=0.05))
    assert batches_of(server) == [6]
    assert (manifest.answered, manifest.unsent) == (6, 14)
    assert 0.04 < manifest.cost_usd <= 0.05
    more = collect_from_spec(changed(config, **limits, max_cost=1.0))
    assert (more.answered, batches_of(server)) == (20, [6, 14])


@pytest.mark.parametrize("status", [500, 529])
@pytest.mark.parametrize("key", ["batches list", "batches retrieve", "batches results"])
def test_reading_is_tried_again_by_the_sdk(
    server: MessagesServer, config: CollectConfig, key: str, status: int
) -> None:
    server.faults[key].append(Fault("status", status=status, retry_after=QUICK))
    assert collect_from_spec(config).answered == 20
    assert creations(server) == 1
