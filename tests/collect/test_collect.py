"""Collecting in one process: what is asked, what is kept when things go wrong, and what is asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import mlx_distill.asking
from mlx_distill.collect.run import collect, collect_from_spec
from mlx_distill.config import CollectConfig
from mlx_distill.errors import FolderError, InputError, TeacherError, TeacherUnavailableError
from mlx_distill.layout import DataFolder, lock, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.manifest import TeacherTerms
from mlx_distill.progress import Progress
from mlx_distill.prompts import load_prompts
from mlx_distill.records import ChatRow, Reply, Request
from tests.servers.messages_server import KEY, MODEL, Fault, MessagesServer

#: All families in train, so that rows can be counted in one place.
ALL_IN_TRAIN = {"valid_fraction": 0.0, "test_fraction": 0.0}


@dataclass
class ScriptedTeacher:
    """Answers in process: what to do with a prompt is decided by the test. `full` is set when `full_at` requests are
    under way."""

    act: Callable[[str], Reply] = field(default=lambda text: Reply(text=f"re: {text}", stop="end", model="m"))
    spec: str = "scripted:x"
    seconds: float = 0.0
    asked: list[str] = field(default_factory=list)
    full: asyncio.Event = field(default_factory=asyncio.Event)
    full_at: int = 0
    at_once: int = 0
    most_at_once: int = 0

    def terms(self) -> TeacherTerms:
        return TeacherTerms(teacher=self.spec, licence="MIT", summary="free")

    async def ask(self, request: Request) -> Reply:
        text = request.messages[-1].content or ""
        self.asked.append(text)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.at_once == self.full_at:
            self.full.set()
        try:
            await asyncio.sleep(self.seconds)
            return self.act(text)
        finally:
            self.at_once -= 1

    async def close(self) -> None:
        """Nothing is open."""


class Told(Progress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"question {n}\n" for n in range(20)), encoding="utf-8")
    return path


def config_for(prompts: Path, **changes: object) -> CollectConfig:
    values = {"prompts": prompts, "teacher": "scripted:x", "out": prompts.parent / "out", **ALL_IN_TRAIN, **changes}
    return CollectConfig.model_validate(values)


def states(config: CollectConfig) -> dict[str, str]:
    with Ledger(DataFolder(config.out).ledger) as ledger:
        return {entry.request.messages[0].content or "": entry.state for entry in ledger.entries()}


async def test_every_prompt_becomes_a_row_in_order(prompts: Path) -> None:
    teacher = ScriptedTeacher()
    config = config_for(prompts, system="S")
    manifest = await collect(config, teacher)
    rows = read_rows(config.out / "train.jsonl", ChatRow)
    assert [[m.content for m in row.messages] for row in rows] == [
        ["S", f"question {n}", f"re: question {n}"] for n in range(20)
    ]
    assert (manifest.name, manifest.teacher, manifest.prompts, manifest.answered) == ("out", "scripted:x", 20, 20)
    assert not manifest.terms.accepted


async def test_concurrency_is_a_bound_that_is_reached(prompts: Path) -> None:
    teacher = ScriptedTeacher(seconds=0.01)
    await collect(config_for(prompts, concurrency=5), teacher)
    assert teacher.most_at_once == 5


async def test_a_second_run_asks_nothing_and_changes_nothing(prompts: Path) -> None:
    config = config_for(prompts)
    first = await collect(config, ScriptedTeacher())
    again = ScriptedTeacher()
    assert await collect(config, again) == first
    assert again.asked == []


def test_more_prompts_ask_only_the_new_ones(prompts: Path) -> None:
    config = config_for(prompts)
    asyncio.run(collect(config, ScriptedTeacher()))
    prompts.write_text("one more\n" + prompts.read_text(encoding="utf-8"), encoding="utf-8")
    again = ScriptedTeacher()
    assert asyncio.run(collect(config, again)).rows["train"] == 21
    assert again.asked == ["one more"]


async def test_other_settings_are_other_requests_and_the_old_stay(prompts: Path) -> None:
    await collect(config_for(prompts), ScriptedTeacher())
    other = ScriptedTeacher(act=lambda text: Reply(text="other", stop="end", model="m2"))
    manifest = await collect(config_for(prompts, max_tokens=7), other)
    assert len(other.asked) == 20
    assert (manifest.rows["train"], manifest.teacher_models) == (20, ("m2",))
    back = ScriptedTeacher()
    assert (await collect(config_for(prompts), back)).teacher_models == ("m",)
    assert back.asked == []


async def test_one_failure_stops_nobody_and_is_asked_again(prompts: Path) -> None:
    def act(text: str) -> Reply:
        if text in ("question 3", "question 11"):
            raise TeacherError("no answer to this one")
        return Reply(text="yes", stop="end", model="m")

    config, told = config_for(prompts, concurrency=3), Told()
    manifest = await collect(config, ScriptedTeacher(act=act), told)
    assert [(drop.reason, drop.count) for drop in manifest.dropped] == [("failed", 2)]
    assert manifest.rows["train"] == 18
    assert any("no answer to this one" in line for line in told.lines)
    again = ScriptedTeacher()
    assert (await collect(config, again)).rows["train"] == 20
    assert again.asked == ["question 3", "question 11"]


async def test_refused_and_truncated_are_kept_and_not_asked_again(prompts: Path) -> None:
    def act(text: str) -> Reply:
        stop = {"question 0": "refusal", "question 1": "length"}.get(text, "end")
        return Reply.model_validate({"text": "x", "stop": stop, "model": "m"})

    config = config_for(prompts)
    first = await collect(config, ScriptedTeacher(act=act))
    assert {drop.reason: drop.count for drop in first.dropped} == {"refused": 1, "truncated": 1}
    again = ScriptedTeacher()
    assert await collect(config, again) == first
    assert again.asked == []


async def test_a_teacher_that_is_gone_for_all_stops_the_run_and_keeps_what_is_under_way(prompts: Path) -> None:
    teacher, busy, gone = ScriptedTeacher(), asyncio.Event(), asyncio.Event()

    async def ask(request: Request) -> Reply:
        text = request.messages[-1].content or ""
        teacher.asked.append(text)
        if text == "question 9":
            await busy.wait()
            gone.set()
            raise TeacherUnavailableError("a spend limit is reached", hint="Raise it.")
        if text == "question 11":
            busy.set()
        if text in ("question 8", "question 10", "question 11"):  # Still under way when number 9 fails.
            await gone.wait()
            await asyncio.sleep(0.01)
        return Reply(text="kept", stop="end", model="m")

    teacher.ask = ask  # type: ignore[method-assign]
    config = config_for(prompts, concurrency=4)
    with pytest.raises(TeacherUnavailableError, match=r"spend limit[^\n]*\n.*11 of 20 prompts.*\n.*Raise it"):
        await collect(config, teacher)
    assert len(teacher.asked) == 12
    found = states(config)
    assert sorted(found.values()) == ["answered"] * 11 + ["failed"] + ["planned"] * 8
    assert found["question 9"] == "failed"
    assert not (config.out / "manifest.json").exists()


async def test_cancelling_waits_for_answers_that_are_paid_for(prompts: Path) -> None:
    config, told, teacher = config_for(prompts, concurrency=4), Told(), ScriptedTeacher(seconds=0.1, full_at=4)
    task = asyncio.create_task(collect(config, teacher, told))
    await teacher.full.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(states(config).values()) == ["answered"] * 4 + ["planned"] * 16
    assert any("4 answers under way" in line for line in told.lines)


async def test_cancelling_twice_waits_no_longer(prompts: Path) -> None:
    config, teacher = config_for(prompts, concurrency=4), ScriptedTeacher(seconds=60, full_at=4)
    task = asyncio.create_task(collect(config, teacher))
    for _ in range(2):
        await teacher.full.wait()
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, timeout=5)
    assert sorted(states(config).values()) == ["planned"] * 16 + ["sent"] * 4


async def test_waiting_has_an_end(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_distill.asking, "DRAIN_SECONDS", 0.01)
    config, teacher = config_for(prompts, concurrency=2), ScriptedTeacher(seconds=60, full_at=2)
    task = asyncio.create_task(collect(config, teacher))
    await teacher.full.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, timeout=5)


async def test_a_bug_in_a_teacher_surfaces_and_the_others_keep_their_answers(prompts: Path) -> None:
    def act(text: str) -> Reply:
        if text == "question 1":
            raise ZeroDivisionError
        return Reply(text="kept", stop="end", model="m")

    config = config_for(prompts, concurrency=3)
    with pytest.raises(ZeroDivisionError):
        await collect(config, ScriptedTeacher(act=act, seconds=0.01))
    assert states(config)["question 0"] == states(config)["question 2"] == "answered"


def test_an_edited_record_is_asked_again(tmp_path: Path, prompts: Path) -> None:
    record = tmp_path / "record.jsonl"
    row = '{{"prompt": "question {0}", "answer": "{1} {0}"}}\n'
    config = config_for(prompts, teacher=f"recorded:{record}")
    for word in ("first", "second"):
        record.write_text("".join(row.format(n, word) for n in range(20)), encoding="utf-8")
        collect_from_spec(config)
        rows = read_rows(config.out / "train.jsonl", ChatRow)
        assert rows[7].messages[-1].content == f"{word} 7"


def test_no_answer_at_all_is_an_error_that_says_why(tmp_path: Path, prompts: Path) -> None:
    record = tmp_path / "record.jsonl"
    record.write_text('{"prompt": "something else", "answer": "x"}\n', encoding="utf-8")
    with pytest.raises(TeacherError, match=r"none has an answer to train on \(20 failed\)"):
        collect_from_spec(config_for(prompts, teacher=f"recorded:{record}"))


async def test_a_folder_in_use_names_its_process(prompts: Path) -> None:
    config, teacher = config_for(prompts), ScriptedTeacher()
    with lock(config.out), pytest.raises(FolderError, match=r"in use by process \d+"):
        await collect(config, teacher)
    assert teacher.asked == []


async def test_out_that_cannot_be_a_folder(prompts: Path) -> None:
    with pytest.raises(FolderError, match="cannot be made a folder"):
        await collect(config_for(prompts, out=prompts), ScriptedTeacher())


def test_bad_prompts_are_told_before_anything_is_made(prompts: Path) -> None:
    prompts.write_text("a\na\n", encoding="utf-8")
    config = config_for(prompts)
    with pytest.raises(InputError, match="same text"):
        asyncio.run(collect(config, ScriptedTeacher()))
    assert not config.out.exists()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MessagesServer]:
    with MessagesServer() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def test_without_consent_nothing_is_sent(server: MessagesServer, prompts: Path) -> None:
    config = config_for(prompts, teacher=f"anthropic:{MODEL}")
    with pytest.raises(TeacherError, match=r"authorisation.*\n.*--accept-terms"):
        collect_from_spec(config)
    assert server.requests == []
    assert not config.out.exists()


def test_faults_of_every_kind_then_a_clean_run(server: MessagesServer, prompts: Path) -> None:
    quick = 0.01
    for n, fault in enumerate(
        [
            Fault("status", status=429, error_type="rate_limit_error", retry_after=quick),
            Fault("status", status=500, retry_after=quick),
            Fault("status", status=529, error_type="overloaded_error", retry_after=quick),
            Fault("status", status=400, error_type="invalid_request_error"),
            Fault("text page"),
            Fault("drop before"),
            Fault("drop after"),
            Fault("stop", stop_reason="refusal"),
            Fault("stop", stop_reason="max_tokens"),
            Fault("cut stream"),
            Fault("break stream"),
        ]
    ):
        server.faults[f"question {n}"].append(fault)
    # Above the SDK's limit, so that every answer is streamed.
    config = config_for(prompts, teacher=f"anthropic:{MODEL}", accept_terms=True, max_tokens=30_000, concurrency=4)
    first = collect_from_spec(config)
    assert {drop.reason: drop.count for drop in first.dropped} == {"failed": 4, "refused": 1, "truncated": 1}
    assert first.terms.accepted
    second = collect_from_spec(config)
    assert {drop.reason: drop.count for drop in second.dropped} == {"refused": 1, "truncated": 1}
    ids = {p.id for p in load_prompts(prompts)}
    assert (second.prompts, second.rows["train"]) == (len(ids), 18)
    assert second.cost_usd == pytest.approx((second.usage.input_tokens * 3 + second.usage.output_tokens * 15) / 1e6)
    # Billed twice are exactly those that the network cut after they were accepted.
    billed = server.billed
    assert sorted(prompt for prompt, times in billed.items() if times != 1) == [
        "question 10", "question 6", "question 9",
    ]  # fmt: skip
    assert len(billed) == 20


def test_the_key_is_in_no_file(server: MessagesServer, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(prompts, teacher=f"anthropic:{MODEL}", accept_terms=True)
    server.faults["question 0"].append(Fault("status", status=400, message=f"odd header {KEY}"))
    collect_from_spec(config)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-other-0123456789")
    with pytest.raises(TeacherUnavailableError):
        collect_from_spec(config.model_copy(update={"max_tokens": 5}))
    content = b"".join(path.read_bytes() for path in config.out.rglob("*") if path.is_file())
    assert b"question 0" in content
    assert KEY.encode() not in content
    assert b"sk-other" not in content


def test_many_at_once_each_asked_once(server: MessagesServer, tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"question {n}\n" for n in range(64)), encoding="utf-8")
    server.delay = 0.2
    collect_from_spec(config_for(path, teacher=f"anthropic:{MODEL}", accept_terms=True, concurrency=16))
    assert 8 <= server.most_at_once <= 16
    assert set(server.billed.values()) == {1}
    assert len(server.billed) == 64
